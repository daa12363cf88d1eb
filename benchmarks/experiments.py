"""One experiment on images: its options, its name, and the program that runs it."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from benchmarks import data
from benchmarks.engine import Plan
from benchmarks.images import ImageData, ImageProgram
from benchmarks.models import build_model
from benchmarks.optimizers import OPTIMIZERS, OptimizerName
from benchmarks.planning import OptionError, check_rate, check_seed, make_plan, refuse

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SIZES = ("num_train", "num_validation", "num_test")


@dataclasses.dataclass(frozen=True)
class Experiment:
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
  optimizer: OptimizerName = "alrao"
  """Optimizer; benchmarks/optimizers.py says where its settings come from."""
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
    for name in ("num_heads", "batch_size", "max_epochs", "patience"):
      if getattr(self, name) < 1:
        refuse(name, "must be at least 1", getattr(self, name))
    check_seed(self.seed)
    if not 0 < self.width < float("inf"):
      refuse("width", "must be positive", self.width)
    check_rate(self.optimizer, self.rate)


class Workshop:
  """Prepares experiments; data and compiled programs are shared where they can be."""

  def __init__(self, data_dir: Path | None = None, download: bool = False):
    """Makes the workshop; nothing is loaded yet.

    Args:
      data_dir: Folder below which data is looked for.
      download: Whether to download what is missing.
    """
    self._data_dir, self._download = data_dir, download
    self._datasets: dict[str, data.Dataset] = {}
    self._data: tuple[Any, ImageData] | None = None
    self._program: tuple[Any, ImageProgram] | None = None

  def dataset(self, name: str) -> data.Dataset:
    """Returns a data set.

    Args:
      name: Its name.

    Raises:
      DataError: It is missing or damaged.
    """
    if name not in self._datasets:
      self._datasets[name] = data.load(name, self._data_dir, download=self._download)
    return self._datasets[name]

  def find_data(self, experiment: Experiment) -> None:
    """Loads the data of an experiment.

    Args:
      experiment: The experiment.

    Raises:
      DataError: The data is missing or damaged.
    """
    self.dataset(experiment.dataset)

  def plan(self, experiment: Experiment, out: Path) -> Plan:
    """Returns how the engine shall run an experiment.

    Args:
      experiment: The experiment.
      out: Folder of the results.

    Raises:
      OptionError: The options make no experiment.
      DataError: The data is missing or damaged.
    """
    experiment.check()
    optimizer = OPTIMIZERS[experiment.optimizer]
    sizes = [len(part.labels) for part in self._split(experiment)]
    if experiment.batch_size > sizes[0]:
      refuse("batch_size", f"must be at most {sizes[0]}", experiment.batch_size)
    config = {
      **dataclasses.asdict(experiment),
      **dict(zip(SIZES, sizes, strict=True)),
      "num_heads": experiment.num_heads if optimizer.has_heads else None,
    }
    return make_plan(
      [experiment.dataset, experiment.network, f"w{experiment.width:.4g}"],
      config,
      {
        "task": "images",
        "real_data": experiment.dataset == "cifar10",
        "chance": 0.1,  # accuracy; both data sets have ten classes of about one size
      },
      out,
      patience=experiment.patience,
    )

  def program(self, experiment: Experiment) -> ImageProgram:
    """Returns the program, the one before if only seed and rate differ.

    Args:
      experiment: One that `plan` has accepted.
    """
    wanted = dataclasses.replace(experiment, seed=0, rate=None)
    if self._program is None or self._program[0] != wanted:
      optimizer = OPTIMIZERS[experiment.optimizer]
      dtype = DTYPES[experiment.dtype]
      model = build_model(
        experiment.network,
        num_heads=experiment.num_heads if optimizer.has_heads else None,
        width=experiment.width,
        dtype=dtype,
        norm=experiment.norm,
      )
      program = ImageProgram(
        model,
        optimizer,
        self._on_device(experiment),
        batch_size=experiment.batch_size,
        max_epochs=experiment.max_epochs,
        flip=self.dataset(experiment.dataset).can_flip,
        augmented=experiment.augment,
        dtype=dtype,
      )
      self._program = (wanted, program)
    return self._program[1]

  def _split(self, experiment: Experiment) -> data.Splits:
    sizes = [getattr(experiment, name) for name in SIZES]
    dataset = self.dataset(experiment.dataset)
    try:
      return dataset.split(*sizes)
    except ValueError as error:
      raise OptionError(
        f"--num-train, --num-validation, --num-test: {error}"
      ) from error

  def _on_device(self, experiment: Experiment) -> ImageData:
    wanted = (experiment.dataset, *(getattr(experiment, name) for name in SIZES))
    if self._data is None or self._data[0] != wanted:
      self._data = (wanted, ImageData(self._split(experiment)))
    return self._data[1]
