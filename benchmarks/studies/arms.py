"""What the studies compare: arms, each an optimizer on a network, and running them."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks import data, engine
from benchmarks.data import DataError
from benchmarks.images import ImageData, ImageProgram
from benchmarks.models import build_model
from benchmarks.optimizers import Optimizer
from benchmarks.planning import OptionError
from benchmarks.progress import Display
from benchmarks.records import read, read_summary
from benchmarks.results import RunRecords


@dataclasses.dataclass(frozen=True)
class Images:
  """On which images a study trains, and for how long."""

  dataset: Literal["cifar10", "digits"] = "cifar10"
  """Images to classify; digits needs no files, and has 1,437 training images."""
  num_train: int = 4_000
  """Number of training images."""
  num_held_out: int = 2_000
  """Number of images, from the end of the training data, on which every epoch is
  measured. The test images have no part in a study."""
  epochs: int = 4
  """Number of epochs."""
  batch_size: int = 32
  """Images in a step."""
  data_dir: Path | None = None
  """Folder below which CIFAR-10 lies, in any of its layouts."""

  def check(self) -> None:
    """Checks what can be without the data.

    Raises:
      OptionError: Options out of range.
    """
    for name in ("epochs", "batch_size"):
      if getattr(self, name) < 1:
        rule = f"--{name.replace('_', '-')} must be at least 1"
        raise OptionError(f"{rule}, got {getattr(self, name)}.")
    if self.num_train < self.batch_size:
      raise OptionError(
        f"--num-train must be at least --batch-size ({self.batch_size}), got "
        f"{self.num_train}."
      )


class Arm(NamedTuple):
  """One curve of a study.

  Attributes:
    name: Its name, unique within the study.
    optimizer: Its optimizer; one compilation for arms with the same `compiled`.
    rate: What `optimizer` takes as its rate: a number, or several.
    network: Network of `benchmarks.models`.
    width: Factor on its channels.
    norm: Its normalisation.
    num_heads: Number of heads, where `optimizer` needs them.
    compiled: Name of the program; arms that differ only in rate share it.
  """

  name: str
  optimizer: Optimizer
  compiled: str
  rate: Any = None
  network: str = "small_cnn"
  width: float = 1.0
  norm: Any = "batch"
  num_heads: int = 10


def final_accuracy(run: RunRecords) -> float:
  """Returns the accuracy on the held-out images after the last epoch.

  Args:
    run: A run; one that failed is at chance.
  """
  if run.summary["ending"] == "failed":
    return run.config["chance"]
  return run.epochs[-1]["validation_accuracy"]


def final_losses(run: RunRecords) -> tuple[float, float]:
  """Returns train and held-out loss of the last epoch; nan for a run that failed.

  Args:
    run: A run.
  """
  last = run.epochs[-1]
  losses = [last["train_loss"], last["validation_loss"]]
  if run.summary["ending"] == "failed":
    losses = [None, None]
  train, held_out = np.array(losses, float).tolist()
  return train, held_out


class Trainer:
  """Trains the arms of one study."""

  def __init__(
    self,
    study: str,
    images: Images,
    out: Path,
    display: Display,
    posteriors_per_epoch: int = 10,
  ):
    """Loads the data.

    Args:
      study: Name of the study.
      images: What to train on.
      out: Folder for its records and checkpoints.
      display: Where progress is shown.
      posteriors_per_epoch: As in the engine's `Plan`.

    Raises:
      DataError: The data is missing or damaged.
      OptionError: Options out of range.
    """
    images.check()
    found = data.load(images.dataset, images.data_dir)
    try:
      splits = found.split(images.num_train, images.num_held_out)
    except ValueError as error:
      raise DataError(f"{images.dataset}: {error}") from error
    self._data = ImageData(splits)
    self._study, self._images, self._out = study, images, out
    self._posteriors = posteriors_per_epoch
    self._flip, self._display = found.can_flip, display
    self._program: tuple[Any, ImageProgram] | None = None

  def run(self, arms: Iterable[Arm], seeds: Sequence[int]) -> list[RunRecords]:
    """Trains what is missing.

    Args:
      arms: The arms; put those that share a program side by side.
      seeds: Seeds of each.

    Returns:
      The records of all runs, by arm and seed; ``config["arm"]`` names the arm.
    """
    runs = []
    for arm in arms:
      for seed in seeds:
        plan = self._plan(arm, seed)
        if read_summary(plan.path) is None:
          engine.train(self._make_program(arm), plan, self._display)
        *epochs, summary = read(plan.path)
        runs.append(RunRecords(summary, epochs))
    return runs

  def _plan(self, arm: Arm, seed: int) -> engine.Plan:
    config = {
      "study": self._study,
      "task": "images",
      "arm": arm.name,
      "rate": arm.rate,
      "network": arm.network,
      "width": arm.width,
      "norm": arm.norm,
      "num_heads": arm.num_heads if arm.optimizer.has_heads else None,
      "seed": seed,
      **dataclasses.asdict(self._images),
    }
    del config["data_dir"]
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return engine.Plan(
      name=f"{arm.name}-s{seed}-{digest[:8]}",
      config={**config, "chance": 0.1},
      out=self._out,
      seed=seed,
      rate=arm.rate,
      max_epochs=self._images.epochs,
      patience=self._images.epochs + 1,
      posteriors_per_epoch=self._posteriors,
    )

  def _make_program(self, arm: Arm) -> ImageProgram:
    wanted = (arm.compiled, arm.network, arm.width, arm.norm, arm.num_heads)
    if self._program is None or self._program[0] != wanted:
      has_heads = arm.optimizer.has_heads
      model = build_model(
        arm.network,
        num_heads=arm.num_heads if has_heads else None,
        width=arm.width,
        norm=arm.norm,
      )
      program = ImageProgram(
        model,
        arm.optimizer,
        self._data,
        batch_size=self._images.batch_size,
        max_epochs=self._images.epochs,
        flip=self._flip,
        any_rate=arm.rate,
      )
      self._program = (wanted, program)
    return self._program[1]
