"""One experiment on ImageNet or its like: its options, its name, and its program."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax

from benchmarks.data.imagenet import ImageFiles, Name, Part, find_images
from benchmarks.devices import make_mesh
from benchmarks.engine import Plan
from benchmarks.experiments import DTYPES, SIZES
from benchmarks.image_stream_program import ImageStreamProgram
from benchmarks.local_statistics import use_local_statistics
from benchmarks.models import IMAGENET_BODIES, build_model
from benchmarks.optimizers import OPTIMIZERS, OptimizerName
from benchmarks.planning import OptionError, check_rate, check_seed, make_plan, refuse

NUM_IMAGENET = 1_281_167  # training images
MIN_SIZE = 63  # pixels; AlexNet shrinks less to nothing


@dataclasses.dataclass(frozen=True)
class Experiment:
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
  optimizer: OptimizerName = "alrao"
  """Optimizer; benchmarks/optimizers.py says where its settings come from."""
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
    for name in positive:
      if getattr(self, name) < 1:
        refuse(name, "must be at least 1", getattr(self, name))
    check_seed(self.seed)
    if not 0 < self.width < float("inf"):
      refuse("width", "must be positive", self.width)
    if self.image_size < MIN_SIZE:
      refuse("image_size", f"must be at least {MIN_SIZE}", self.image_size)
    check_rate(self.optimizer, self.rate)
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


class Workshop:
  """Prepares experiments; files and compiled programs are shared where they can be."""

  def __init__(self, data_dir: Path | None = None, machine: Machine | None = None):
    """Makes the workshop; nothing is loaded yet.

    Args:
      data_dir: Folder below which data is looked for.
      machine: On what to train.

    Raises:
      OptionError: There is no such machine.
    """
    self._data_dir, self._machine = data_dir, machine or Machine()
    self._machine.check()
    self._files: dict[str, ImageFiles] = {}
    self._program: tuple[Any, ImageStreamProgram] | None = None

  def check(self, experiment: Experiment) -> None:
    """Checks what can be without the data, and that the machine suits it.

    Args:
      experiment: The experiment.

    Raises:
      OptionError: Options out of range, or that do not go together.
    """
    experiment.check()
    parts, count = self._machine.mesh_heads, experiment.num_heads
    if parts > 1 and not OPTIMIZERS[experiment.optimizer].has_heads:
      rule = f"must be 1 for --optimizer {experiment.optimizer}, which has no heads"
      refuse("mesh_heads", rule, parts)
    if count % parts and OPTIMIZERS[experiment.optimizer].has_heads:
      refuse("mesh_heads", f"must divide the number of heads, {count}", parts)

  def find_data(self, experiment: Experiment) -> None:
    """Finds the data of an experiment.

    Args:
      experiment: The experiment.

    Raises:
      DataError: The data is missing or damaged.
    """
    self._find(experiment.dataset)

  def plan(self, experiment: Experiment, out: Path) -> Plan:
    """Returns how the engine shall run an experiment.

    Args:
      experiment: The experiment.
      out: Folder of the results.

    Raises:
      OptionError: The options make no experiment.
      DataError: The data is missing or damaged.
    """
    self.check(experiment)
    optimizer, files = OPTIMIZERS[experiment.optimizer], self._find(experiment.dataset)
    sizes = {name: len(part.indices) for name, part in self._split(experiment).items()}
    if experiment.batch_size > sizes["train"]:
      rule = f"must be at most {sizes['train']}"
      refuse("batch_size", rule, experiment.batch_size)
    for name, parts in (
      ("mesh_data", self._machine.mesh_data),
      ("norm_parts", experiment.norm_parts),
    ):
      if experiment.batch_size % parts:
        rule = f"must be a multiple of --{name.replace('_', '-')}, {parts}"
        refuse("batch_size", rule, experiment.batch_size)
    config = {
      **dataclasses.asdict(experiment),
      **{f"num_{name}": size for name, size in sizes.items()},
      "norm": experiment.full_norm,
      "num_heads": experiment.num_heads if optimizer.has_heads else None,
      "num_classes": files.num_classes,
    }
    is_real = (
      files.num_classes == 1000
      and sizes["train"] + sizes["validation"] == NUM_IMAGENET
      and sizes["test"] == len(files.held_out.labels)
    )
    return make_plan(
      [experiment.dataset, experiment.network, f"w{experiment.width:.4g}"],
      config,
      {
        "task": "imagenet",
        "real_data": is_real,
        "chance": 1 / files.num_classes,  # accuracy; classes are of about one size
        "mesh": [self._machine.mesh_data, self._machine.mesh_heads],
      },
      out,
      patience=experiment.patience,
    )

  def program(self, experiment: Experiment) -> ImageStreamProgram:
    """Returns the program, the one before if only seed and rate differ.

    Args:
      experiment: One that `plan` has accepted.
    """
    wanted = dataclasses.replace(experiment, seed=0, rate=None)
    if self._program is None or self._program[0] != wanted:
      optimizer, machine = OPTIMIZERS[experiment.optimizer], self._machine
      dtype = DTYPES[experiment.dtype]
      model = build_model(
        experiment.network,
        self._find(experiment.dataset).num_classes,
        experiment.num_heads if optimizer.has_heads else None,
        experiment.width,
        dtype,
        experiment.norm,
      )
      if experiment.norm_parts > 1:
        model = use_local_statistics(model, experiment.norm_parts)
      is_one = machine.mesh_data == machine.mesh_heads == jax.process_count() == 1
      program = ImageStreamProgram(
        model,
        optimizer,
        self._split(experiment),
        image_size=experiment.image_size,
        batch_size=experiment.batch_size,
        max_epochs=experiment.max_epochs,
        checkpoint_steps=machine.checkpoint_steps,
        workers=machine.workers,
        max_corrupt=machine.max_corrupt,
        dtype=dtype,
        mesh=None if is_one else make_mesh(machine.mesh_data, machine.mesh_heads),
      )
      self._program = (wanted, program)
    return self._program[1]

  def _find(self, name: Name) -> ImageFiles:
    if name not in self._files:
      self._files[name] = find_images(name, self._data_dir)
    return self._files[name]

  def _split(self, experiment: Experiment) -> dict[str, Part]:
    sizes = [getattr(experiment, name) for name in SIZES]
    files = self._find(experiment.dataset)
    try:
      return files.split(*sizes)
    except ValueError as error:
      options = "--num-train, --num-validation, --num-test"
      raise OptionError(f"{options}: {error}") from error
