"""The studies' arms on images: what they train on, and what comes of them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.stats import binomtest

from benchmarks import data
from benchmarks.data import DataError, Split, Splits
from benchmarks.images import ImageData, ImageProgram
from benchmarks.models import build_model
from benchmarks.models.layers import Classifier
from benchmarks.planning import refuse
from benchmarks.progress import Display
from benchmarks.records import Record
from benchmarks.results import RunRecords
from benchmarks.studies.runner import Arm, Runner

CHANCE = 0.1  # ten classes


@dataclasses.dataclass(frozen=True)
class Images:
  """On which images a study trains, and for how long."""

  dataset: Literal["cifar10", "digits"] = "cifar10"
  """Images to classify; digits needs no files, and has 1,500 to train on and
  hold out."""
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
        refuse(name, "must be at least 1", getattr(self, name))
    if self.num_train < self.batch_size:
      rule = f"must be at least --batch-size ({self.batch_size})"
      refuse("num_train", rule, self.num_train)

  @property
  def amount(self) -> str:
    """Which images, how many, and how often, for the page of numbers."""
    return (
      f"{self.dataset}, {self.num_train:,} training and {self.num_held_out:,} held-out "
      f"images, {self.epochs} epoch{'s' * (self.epochs > 1)}"
    )

  def describe(self) -> str:
    """Returns what it is, for the page of numbers."""
    return f"{self.amount}, batches of {self.batch_size}"


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


def threshold(accuracies: Mapping[float, Sequence[float]]) -> tuple[float, float]:
  """Returns the best rate of SGD, and the accuracy above which a run has learned.

  That is chance, and half of what the best rate reaches above it.

  Args:
    accuracies: Of SGD's runs, by rate.
  """
  means = {rate: float(np.mean(values)) for rate, values in accuracies.items()}
  best = max(means, key=lambda rate: means[rate])
  return best, CHANCE + (means[best] - CHANCE) / 2


def share(which: Sequence[bool]) -> str:
  """Returns a share of runs, with its exact 95 % binomial interval.

  Args:
    which: Whether each run is of the share.

  Example:
    >>> share([True] * 29 + [False])
    '29 of 30 (83 to 100 %)'
  """
  found = binomtest(sum(which), len(which)).proportion_ci(method="exact")
  low, high = 100 * found.low, 100 * found.high
  return f"{sum(which)} of {len(which)} ({low:.0f} to {high:.0f} %)"


def by_arm(runs: Iterable[RunRecords]) -> dict[str, list[RunRecords]]:
  """Returns runs by the name of their arm, in order.

  Args:
    runs: The runs.
  """
  found: dict[str, list[RunRecords]] = {}
  for run in runs:
    found.setdefault(run.config["arm"], []).append(run)
  return found


class Trainer(Runner):
  """Trains the arms of one study, on images."""

  task = "images"

  def __init__(
    self,
    study: str,
    images: Images,
    out: Path,
    display: Display,
    posteriors_per_epoch: int = 10,
    used: list[Record] | None = None,
    *,
    halve: bool = False,
  ):
    """Loads the data.

    Args:
      study: Name of the study.
      images: What to train on.
      out: Folder for its records and checkpoints.
      display: Where progress is shown.
      posteriors_per_epoch: As in the engine's `Plan`.
      used: As in `Runner`.
      halve: Whether every second of the held-out images stands in for a test image, to
        score what the others have chosen. Otherwise all of them do.

    Raises:
      DataError: The data is missing or damaged.
      OptionError: Options out of range.
    """
    super().__init__(study, images, out, display, posteriors_per_epoch, used)
    images.check()
    found = data.load(images.dataset, images.data_dir)
    try:
      splits = found.split(images.num_train, images.num_held_out)
    except ValueError as error:
      raise DataError(f"{images.dataset}: {error}") from error
    if halve:
      splits = Splits(splits.train, *_halves(splits.validation))
    else:
      splits = splits._replace(test=splits.validation)
    self._data, self._flip, self._halved = ImageData(splits), found.can_flip, halve

  def _describe(self, arm: Arm) -> tuple[Record, float]:
    config = {
      "network": arm.network,
      "width": arm.width,
      "norm": arm.norm,
      **dataclasses.asdict(self._options),
    }
    del config["data_dir"]
    if self._halved:
      config["halved"] = True
    return config, CHANCE

  def _make_program(self, arm: Arm) -> ImageProgram:
    num_heads = arm.num_heads if arm.optimizer.has_heads else None
    if arm.body is None:
      model = build_model(
        arm.network, num_heads=num_heads, width=arm.width, norm=arm.norm
      )
    else:
      model = Classifier(arm.body, num_heads=num_heads)
    return arm.program(
      model,
      arm.optimizer,
      self._data,
      batch_size=self._options.batch_size,
      max_epochs=self._options.epochs,
      flip=self._flip,
      any_rate=arm.rate,
    )


def _halves(part: Split) -> list[Split]:
  # Every second one, for neighbours are alike: the digits lie in order of writers.
  return [Split(part.images[i::2], part.labels[i::2]) for i in range(2)]
