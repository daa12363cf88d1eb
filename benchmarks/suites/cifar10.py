"""The papers' main table: networks on CIFAR-10, Alrao next to what users would pick.

    python -m benchmarks run cifar10 --network vgg19 --optimizer alrao
    python -m benchmarks sweep cifar10 --preset reduced

All of it works on scikit-learn's digits too, without any files.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from benchmarks import data
from benchmarks.console import OptionError, refuse
from benchmarks.methods import IMAGE_METHODS, METHODS, PEERS, MethodName
from benchmarks.models import build_model
from benchmarks.suites._suite import ACCURACY, LOSS, Preset, Suite, check_options
from benchmarks.tables import TableKind
from benchmarks.training import Plan, make_plan
from benchmarks.workloads.images import ImageData, ImageWorkload

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SIZES = ("num_train", "num_validation", "num_test")


@dataclasses.dataclass(frozen=True)
class ImageOptions:
  """All that determines a result. The defaults are the papers' protocol."""

  dataset: Literal["cifar10", "digits"] = "cifar10"
  """Images to classify; digits needs no files."""
  network: Literal["googlenet", "vgg19", "mobilenet_v2", "small_cnn", "mlp"] = (
    "googlenet"
  )
  """Network to train."""
  width: float = 1.0
  """Factor on all numbers of channels; the papers use 1 and 3."""
  norm: Literal["batch", "none"] = "batch"
  """Normalisation within the network."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Of the computation; parameters and batch normalisation are float32 always."""
  optimizer: MethodName = "alrao"
  """Optimizer; benchmarks/methods.py says where its settings come from."""
  rate: float | None = None
  """Learning rate, for sgd."""
  num_heads: int = 10
  """Number of Alrao's heads."""
  seed: int = 0
  """Determines initial weights, batches, augmentation and Alrao's rates."""
  batch_size: int = 32
  """Images in a step."""
  max_epochs: int = 200
  """Maximum number of epochs; a run says if it hit it."""
  patience: int = 20
  """Epochs without a better validation loss after which a run stops."""
  augment: bool = True
  """Shift training images by up to 4 pixels and mirror them (digits: only shift)."""
  num_train: int | None = None
  """Number of training images, by default all that do not validate."""
  num_validation: int | None = None
  """Number of validation images, by default a fifth of the training data."""
  num_test: int | None = None
  """Number of test images, by default all."""

  def check(self) -> None:
    """Checks what can be without the data.

    Raises:
      OptionError: Options out of range, or that do not go together.
    """
    check_options(self, ("num_heads", "batch_size", "max_epochs", "patience"))
    if not 0 < self.width < float("inf"):
      refuse("width", "must be positive", self.width)


@dataclasses.dataclass(frozen=True)
class ImagePlace:
  """Where the data is."""

  data_dir: Path | None = None
  """Folder below which CIFAR-10 lies, in any of its layouts."""
  download: bool = False
  """Download CIFAR-10 where there is none."""


def _papers(networks_and_widths, **options) -> tuple[ImageOptions, ...]:
  return tuple(
    ImageOptions(network=network, width=width, **options)
    for network, width in networks_and_widths
  )


_SMALL = ImageOptions(
  network="small_cnn",
  num_train=10_000,
  num_validation=2_000,
  max_epochs=10,
)

PRESETS: dict[str, Preset] = {
  # Minutes on two cores, from whatever data there is.
  "reduced": Preset(
    bases=(
      ImageOptions(
        network="small_cnn",
        num_train=4_000,
        num_validation=1_000,
        num_test=2_000,
        max_epochs=5,
      ),
    ),
    optimizers=("alrao", "sgd", "adam", *PEERS, "sgd_tuned"),
    without_data={
      "dataset": "digits",
      "num_train": None,
      "num_validation": None,
      "num_test": None,
    },
  ),
  # A CPU, narrow versions of the papers' networks.
  "tier_a": Preset(
    bases=_papers(
      [
        ("mobilenet_v2", 1 / 8),
        ("vgg19", 1 / 4),
        ("googlenet", 1 / 8),
        ("mobilenet_v2", 3 / 8),
        ("vgg19", 3 / 4),
        ("googlenet", 3 / 8),
      ],
      num_train=2_000,
      num_validation=1_000,
      num_test=5_000,
      max_epochs=5,
    ),
    optimizers=("alrao", "sgd", "adam"),
  ),
  # A CPU, all optimizers on one small network.
  "tier_b": Preset(
    bases=(_SMALL, dataclasses.replace(_SMALL, norm="none")),
    optimizers=IMAGE_METHODS,
  ),
  # An accelerator, the papers' networks for a while.
  "tier_c": Preset(
    bases=_papers(
      [("mobilenet_v2", 1.0), ("googlenet", 1.0), ("vgg19", 1.0)], max_epochs=20
    ),
    optimizers=("alrao", "sgd", "adam"),
    rates=(1e-1, 1e-2),
    num_rate_seeds=3,
  ),
  # The papers' whole table.
  "paper": Preset(
    bases=_papers(
      (network, width)
      for network in ("mobilenet_v2", "googlenet", "vgg19")
      for width in (1.0, 3.0)
    ),
    optimizers=IMAGE_METHODS,
  ),
}

KIND = TableKind(
  title="Images",
  measures=(LOSS, ACCURACY),
  score=ACCURACY,
  curve=LOSS,
  curve_limit=1.13,
  table_options=("network", "width", "norm"),
  size_options=(
    "dataset",
    "num_train",
    "num_validation",
    "num_test",
    "max_epochs",
    "patience",
    "batch_size",
    "augment",
    "dtype",
  ),
  size="{dataset}, {num_train:,} training images, at most {max_epochs} epochs",
  papers_key=("network",),
  not_real="Not CIFAR-10",
)


class Cifar10(Suite[ImageOptions, ImagePlace]):
  """Networks for small images."""

  name = "cifar10"
  options = ImageOptions
  place = ImagePlace
  presets = PRESETS
  kind = KIND

  def __init__(self, place: ImagePlace | None = None):
    """Prepares; nothing is loaded yet.

    Args:
      place: Where the data is.
    """
    super().__init__(place)
    self._datasets: dict[str, data.Dataset] = {}
    self._data: tuple[Any, ImageData] | None = None

  def dataset(self, name: str) -> data.Dataset:
    """Returns a data set.

    Args:
      name: Its name.

    Raises:
      DataError: It is missing or damaged.
    """
    if name not in self._datasets:
      self._datasets[name] = data.load(
        name, self._place.data_dir, download=self._place.download
      )
    return self._datasets[name]

  def find_data(self, options: ImageOptions) -> None:
    """Loads the data of a run.

    Args:
      options: Of a run.

    Raises:
      DataError: The data is missing or damaged.
    """
    self.dataset(options.dataset)

  def plan(self, options: ImageOptions, out: Path) -> Plan:
    """Returns how a run is trained.

    Args:
      options: Of a run.
      out: Folder of the results.

    Raises:
      OptionError: The options make no run.
      DataError: The data is missing or damaged.
    """
    options.check()
    method = METHODS[options.optimizer]
    sizes = [len(part.labels) for part in self._split(options)]
    if options.batch_size > sizes[0]:
      refuse("batch_size", f"must be at most {sizes[0]}", options.batch_size)
    config = {
      **dataclasses.asdict(options),
      **dict(zip(SIZES, sizes, strict=True)),
      "num_heads": options.num_heads if method.has_heads else None,
    }
    return make_plan(
      [options.dataset, options.network, f"w{options.width:.4g}"],
      config,
      {
        "suite": self.name,
        "real_data": options.dataset == "cifar10",
        "chance": 0.1,  # accuracy; both data sets have ten classes of about one size
      },
      out,
      patience=options.patience,
    )

  def _make_workload(self, options: ImageOptions) -> ImageWorkload:
    method = METHODS[options.optimizer]
    dtype = DTYPES[options.dtype]
    model = build_model(
      options.network,
      num_heads=options.num_heads if method.has_heads else None,
      width=options.width,
      dtype=dtype,
      norm=options.norm,
    )
    return ImageWorkload(
      model,
      method,
      self._on_device(options),
      batch_size=options.batch_size,
      max_epochs=options.max_epochs,
      flip=self.dataset(options.dataset).can_flip,
      augmented=options.augment,
      dtype=dtype,
    )

  def _split(self, options: ImageOptions) -> data.Splits:
    sizes = [getattr(options, name) for name in SIZES]
    dataset = self.dataset(options.dataset)
    try:
      return dataset.split(*sizes)
    except ValueError as error:
      raise OptionError(
        f"--num-train, --num-validation, --num-test: {error}"
      ) from error

  def _on_device(self, options: ImageOptions) -> ImageData:
    wanted = (options.dataset, *(getattr(options, name) for name in SIZES))
    if self._data is None or self._data[0] != wanted:
      self._data = (wanted, ImageData(self._split(options)))
    return self._data[1]


SUITE = Cifar10
