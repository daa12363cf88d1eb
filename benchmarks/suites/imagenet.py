"""The papers' ImageNet rows: networks on ImageNet, or on ten of its classes.

    python -m benchmarks run imagenet --network resnet50 --width 3 --workers 16
    python -m benchmarks sweep imagenet --preset reduced

Killed, both go on after the last checkpoint, of which an epoch has several. The data
lies below `--data-dir` as Parquet shards, as the Hugging Face hub has them, or as
folders of images.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from benchmarks.console import OptionError, refuse
from benchmarks.data.image_files import ImageFiles, Name, Part, find_images
from benchmarks.methods import METHODS, MethodName
from benchmarks.models import IMAGENET_BODIES, build_model
from benchmarks.suites._suite import ACCURACY, LOSS, Preset, Suite, check_options
from benchmarks.suites.cifar10 import DTYPES, SIZES
from benchmarks.tables import TableKind
from benchmarks.training import Plan, make_plan
from benchmarks.workloads import devices
from benchmarks.workloads.devices import make_mesh
from benchmarks.workloads.image_stream import StreamWorkload, use_local_statistics

NUM_IMAGENET = 1_281_167  # training images
MIN_SIZE = 63  # pixels; AlexNet shrinks less to nothing


@dataclasses.dataclass(frozen=True)
class StreamOptions:
  """All that determines a result. The defaults are the papers' protocol."""

  dataset: Name = "imagenet"
  """Images to classify; imagenette is ten of ImageNet's classes."""
  network: Literal["alexnet", "densenet121", "resnet50"] = "resnet50"
  """Network to train."""
  width: float = 1.0
  """Factor on all numbers of channels; the papers use 1 and 3."""
  norm: Literal["batch", "none"] | None = None
  """Normalisation within the network, by default its own: none in AlexNet."""
  norm_parts: int = 1
  """Parts of a batch that batch normalisation sees apart: 1 synchronises all devices,
  the number of --mesh-data spares them that."""
  image_size: int = 224
  """Side of the images, in pixels."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Of the computation; parameters and batch normalisation are float32 always."""
  optimizer: MethodName = "alrao"
  """Optimizer; benchmarks/methods.py says where its settings come from."""
  rate: float | None = None
  """Learning rate, for sgd."""
  num_heads: int = 10
  """Number of Alrao's heads."""
  seed: int = 0
  """Determines initial weights, batches, crops, dropout and Alrao's rates."""
  batch_size: int = 256
  """Images in a step, of all devices together."""
  max_epochs: int = 200
  """Maximum number of epochs; a run says if it hit it."""
  patience: int = 20
  """Epochs without a better validation loss after which a run stops."""
  num_train: int | None = None
  """Number of training images, by default all that do not validate."""
  num_validation: int | None = None
  """Number of validation images, from the end of the training data; by default a fifth
  of it, at most 50,000."""
  num_test: int | None = None
  """Number of test images, which are the official validation images; by default all."""

  def check(self) -> None:
    """Checks what can be without the data.

    Raises:
      OptionError: Options out of range, or that do not go together.
    """
    positive = ("num_heads", "batch_size", "max_epochs", "patience", "norm_parts")
    check_options(self, positive)
    if not 0 < self.width < float("inf"):
      refuse("width", "must be positive", self.width)
    if self.image_size < MIN_SIZE:
      refuse("image_size", f"must be at least {MIN_SIZE}", self.image_size)
    if self.norm_parts > 1 and self.full_norm == "none":
      rule = f"must be 1 without batch normalisation (--network {self.network})"
      refuse("norm_parts", rule, self.norm_parts)

  @property
  def full_norm(self) -> str:
    """Normalisation within the network, its own where none is asked for."""
    return self.norm or IMAGENET_BODIES[self.network][1]


@dataclasses.dataclass(frozen=True)
class Machine:
  """On what to train, and what reads; results depend on it by rounding alone.

  Except where `max_corrupt` ends a run: each host counts the images that it reads.
  """

  workers: int = 0
  """Processes that read, decode and crop images; 0: a thread beside the training."""
  checkpoint_steps: int = 500
  """Steps between two checkpoints within an epoch."""
  max_corrupt: int = 0
  """Damaged images to leave out, by name, before giving up; of several hosts, each
  counts those that it reads, and host 0 records its own."""
  mesh_data: int = 1
  """Number of devices, or groups of them, among which a batch is divided."""
  mesh_heads: int = 1
  """Number of devices in each group, among which Alrao's heads are divided."""

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: One is out of range.
    """
    for name in ("checkpoint_steps", "mesh_data", "mesh_heads"):
      if getattr(self, name) < 1:
        refuse(name, "must be at least 1", getattr(self, name))
    for name in ("workers", "max_corrupt"):
      if getattr(self, name) < 0:
        refuse(name, "must not be negative", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class StreamPlace:
  """Where the data is, and which host of several this is."""

  data_dir: Path | None = None
  """Folder below which the data lies, in any of its layouts."""
  machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()
  coordinator: str | None = None
  """Address and port of host 0, such as 10.0.0.1:8476, where there are several hosts.
  They share the folder of results."""
  num_hosts: int = 1
  """Number of hosts."""
  host: int = 0
  """Which host this is, from 0."""

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: One is out of range, or they do not go together.
    """
    for name, alone in (("num_hosts", 1), ("host", 0)):
      if self.coordinator is None and (value := getattr(self, name)) != alone:
        rule = f"must be given with --{name.replace('_', '-')} {value}"
        refuse("coordinator", rule, "none")
    self.machine.check()


NETWORKS = ("alexnet", "densenet121", "resnet50")
TABLE_METHODS = ("alrao", "sgd", "adam")
_REDUCED = StreamOptions(
  dataset="imagenette",
  image_size=64,
  width=1 / 4,
  batch_size=32,
  max_epochs=3,
  num_train=2_000,
  num_validation=500,
  num_test=2_000,
)
_ACCELERATOR = StreamOptions(
  dataset="imagenette", image_size=128, batch_size=64, max_epochs=20
)


def _each(base: StreamOptions) -> tuple[StreamOptions, ...]:
  return tuple(dataclasses.replace(base, network=network) for network in NETWORKS)


PRESETS: dict[str, Preset] = {
  # A CPU: narrow networks, small images, ten classes.
  "reduced": Preset(
    bases=_each(_REDUCED),
    optimizers=TABLE_METHODS,
    rates=(0.01, 0.1, 1.0),
  ),
  # A CPU: ResNet50 three times as wide, as in the papers' last row; one run of each.
  "reduced_wide": Preset(
    bases=(dataclasses.replace(_REDUCED, network="resnet50", width=3 / 4),),
    optimizers=TABLE_METHODS,
    rates=(0.01, 0.1, 1.0),
    num_seeds=1,
  ),
  # A CPU: of the network without normalisation, which draws of rates learn.
  "draws": Preset(
    bases=_each(_REDUCED)[:1],
    optimizers=("alrao", "alrao_guard", "schedule_free_alrao", "sgd", "adam"),
    rates=(0.01, 0.1, 1.0),
    num_seeds=30,
  ),
  # An accelerator: the papers' networks on ten classes for a while.
  "accelerator": Preset(bases=_each(_ACCELERATOR), optimizers=TABLE_METHODS),
  # Many accelerators: the papers' table.
  "paper": Preset(
    bases=(*_each(StreamOptions()), StreamOptions(network="resnet50", width=3.0)),
    optimizers=TABLE_METHODS,
    num_seeds=1,
  ),
}

KIND = TableKind(
  title="ImageNet",
  measures=(LOSS, ACCURACY),
  score=ACCURACY,
  curve=LOSS,
  curve_limit=1.13,
  table_options=("network", "width", "norm"),
  size_options=(
    "dataset",
    "num_classes",
    "image_size",
    "num_train",
    "num_validation",
    "num_test",
    "max_epochs",
    "patience",
    "batch_size",
    "norm_parts",
    "dtype",
  ),
  size="{dataset} at {image_size} pixels, {num_train:,} training images, at most "
  "{max_epochs} epochs",
  papers_key=("network",),
  not_real="Not ImageNet, but ten of its classes, or a part",
  note="The last training images validate, and the official validation images test. "
  "Curves end where a run does: early stopping cuts them off.",
  train_curves=True,
)


class ImageNet(Suite[StreamOptions, StreamPlace]):
  """Networks for large images, which are read while training goes on."""

  name = "imagenet"
  prefix = "imagenet_"
  options = StreamOptions
  place = StreamPlace
  presets = PRESETS
  kind = KIND

  def __init__(self, place: StreamPlace | None = None):
    """Prepares; nothing is loaded yet.

    Args:
      place: Where the data is, and on what to train.

    Raises:
      OptionError: There is no such place.
    """
    super().__init__(place)
    self._place.check()
    self._files: dict[str, ImageFiles] = {}

  def begin(self) -> None:
    """Joins the other hosts, if there are any.

    Raises:
      OptionError: They did not meet.
    """
    place = self._place
    if place.coordinator is not None:
      devices.initialize_hosts(place.coordinator, place.num_hosts, place.host)

  def check(self, options: StreamOptions) -> None:
    """Checks what can be without the data, and that the machine suits it.

    Args:
      options: Of a run.

    Raises:
      OptionError: Options out of range, or that do not go together.
    """
    options.check()
    parts, count = self._place.machine.mesh_heads, options.num_heads
    if parts > 1 and not METHODS[options.optimizer].has_heads:
      rule = f"must be 1 for --optimizer {options.optimizer}, which has no heads"
      refuse("mesh_heads", rule, parts)
    if count % parts and METHODS[options.optimizer].has_heads:
      refuse("mesh_heads", f"must divide the number of heads, {count}", parts)

  def find_data(self, options: StreamOptions) -> None:
    """Finds the data of a run.

    Args:
      options: Of a run.

    Raises:
      DataError: The data is missing or damaged.
    """
    self._find(options.dataset)

  def plan(self, options: StreamOptions, out: Path) -> Plan:
    """Returns how a run is trained.

    Args:
      options: Of a run.
      out: Folder of the results.

    Raises:
      OptionError: The options make no run.
      DataError: The data is missing or damaged.
    """
    self.check(options)
    method, files = METHODS[options.optimizer], self._find(options.dataset)
    sizes = {name: len(part.indices) for name, part in self._split(options).items()}
    if options.batch_size > sizes["train"]:
      rule = f"must be at most {sizes['train']}"
      refuse("batch_size", rule, options.batch_size)
    for name, parts in (
      ("mesh_data", self._place.machine.mesh_data),
      ("norm_parts", options.norm_parts),
    ):
      if options.batch_size % parts:
        rule = f"must be a multiple of --{name.replace('_', '-')}, {parts}"
        refuse("batch_size", rule, options.batch_size)
    config = {
      **dataclasses.asdict(options),
      **{f"num_{name}": size for name, size in sizes.items()},
      "norm": options.full_norm,
      "num_heads": options.num_heads if method.has_heads else None,
      "num_classes": files.num_classes,
    }
    is_real = (
      files.num_classes == 1000
      and sizes["train"] + sizes["validation"] == NUM_IMAGENET
      and sizes["test"] == len(files.held_out.labels)
    )
    return make_plan(
      [options.dataset, options.network, f"w{options.width:.4g}"],
      config,
      {
        "suite": self.name,
        "real_data": is_real,
        "chance": 1 / files.num_classes,  # accuracy; classes are of about one size
        "mesh": [self._place.machine.mesh_data, self._place.machine.mesh_heads],
      },
      out,
      patience=options.patience,
    )

  def _make_workload(self, options: StreamOptions) -> StreamWorkload:
    method, machine = METHODS[options.optimizer], self._place.machine
    dtype = DTYPES[options.dtype]
    model = build_model(
      options.network,
      self._find(options.dataset).num_classes,
      options.num_heads if method.has_heads else None,
      options.width,
      dtype,
      options.norm,
    )
    if options.norm_parts > 1:
      model = use_local_statistics(model, options.norm_parts)
    is_one = machine.mesh_data == machine.mesh_heads == jax.process_count() == 1
    return StreamWorkload(
      model,
      method,
      self._split(options),
      image_size=options.image_size,
      batch_size=options.batch_size,
      max_epochs=options.max_epochs,
      checkpoint_steps=machine.checkpoint_steps,
      workers=machine.workers,
      max_corrupt=machine.max_corrupt,
      dtype=dtype,
      mesh=None if is_one else make_mesh(machine.mesh_data, machine.mesh_heads),
    )

  def _find(self, name: Name) -> ImageFiles:
    if name not in self._files:
      self._files[name] = find_images(name, self._place.data_dir)
    return self._files[name]

  def _split(self, options: StreamOptions) -> dict[str, Part]:
    sizes = [getattr(options, name) for name in SIZES]
    files = self._find(options.dataset)
    try:
      return files.split(*sizes)
    except ValueError as error:
      raise OptionError(
        f"--num-train, --num-validation, --num-test: {error}"
      ) from error


SUITE = ImageNet
