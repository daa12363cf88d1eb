"""Runs that go on with fewer heads after their first epoch, and the curves of both."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.planning import refuse
from benchmarks.progress import Display
from benchmarks.records import Record
from benchmarks.results import RunRecords
from benchmarks.studies.arms import Images, Trainer
from benchmarks.studies.programs import Collapsed
from benchmarks.studies.runner import Arm

PARTS = {"train_loss": "train", "validation_loss": "held-out"}


def check_epochs(images: Images) -> None:
  """Checks that training goes on after the first epoch.

  Args:
    images: What to train on.

  Raises:
    OptionError: It does not.
  """
  if images.epochs < 2:
    refuse("epochs", "must be at least 2", images.epochs)


def rest_trainer(
  study: str, images: Images, out: Path, display: Display, used: list[Record]
) -> Trainer:
  """Returns what trains the epochs after the first one.

  Args:
    study: Name of the study.
    images: What to train on.
    out: Folder of the records.
    display: Where progress is shown.
    used: As in `Runner`.
  """
  rest = dataclasses.replace(images, epochs=images.epochs - 1)
  return Trainer(study, rest, out, display, used=used)


def go_on(
  rest: Trainer, arm: Arm, keep: int, plain: Sequence[RunRecords]
) -> list[RunRecords]:
  """Trains an arm with fewer heads after its first epoch.

  Args:
    rest: What `rest_trainer` returned.
    arm: The arm, of Alrao.
    keep: How many heads to keep.
    plain: The arm's runs with all heads, with which these share the first epoch.

  Returns:
    The runs of all epochs, in the order of `plain`.
  """
  fewer = arm._replace(
    name=f"{arm.name}-keep{keep}",
    compiled=f"{arm.compiled}-keep{keep}",
    program=functools.partial(Collapsed, keep=keep),
  )
  runs = rest.run([fewer], [run.config["seed"] for run in plain])
  return [
    RunRecords(run.summary, [before.epochs[0], *run.epochs])
    for run, before in zip(runs, plain, strict=True)
  ]


def curves(runs: Sequence[RunRecords], name: str) -> np.ndarray:
  """Returns what runs have recorded by epoch, (runs, epochs); nan where not finite.

  Args:
    runs: The runs, of equal length.
    name: What to return, as the records call it.
  """
  return np.array([[record[name] for record in run.epochs] for run in runs], float)
