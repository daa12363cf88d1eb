"""Training goes on with the best head alone after the first epoch, or with all."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from scipy.stats import ttest_rel

import alrao_jax
from benchmarks import pictures
from benchmarks.console import refuse
from benchmarks.methods import ALRAO
from benchmarks.records import Run
from benchmarks.studies._study import (
  LOSSES,
  Arm,
  ImageRunner,
  Images,
  Source,
  Study,
  curves,
)
from benchmarks.tables import markdown, spread
from benchmarks.workloads.images import ImageWorkload, State

Runs = dict[str, list[Run]]  # by label
ALL, ONE = "all heads", "best head after epoch 1"


class CollapsedWorkload(ImageWorkload):
  """What follows a first epoch, with only the best heads kept.

  It starts from the state after that epoch, which it trains itself: the same, to the
  last bit, as an `ImageWorkload` of the same seed has after its first epoch.
  """

  def __init__(self, *args: Any, keep: int, **options: Any):
    """Makes the workload; nothing is compiled yet.

    Args:
      *args: As of `ImageWorkload`.
      keep: How many heads to keep.
      **options: As of `ImageWorkload`; `max_epochs` counts those that follow.
    """
    super().__init__(*args, **options)
    self._keep = keep

  def init(self, seed: int, rate: Any) -> State:
    """Returns the state after the first epoch, collapsed.

    Args:
      seed: As of `ImageWorkload`.
      rate: Likewise.
    """
    state, _ = self.step(super().init(seed, rate), self.data, super().batches(seed, 1))
    optimizer = self.make_optimizer(jax.random.key(0), rate)
    opt_state, params = alrao_jax.collapse(
      optimizer, state.opt_state, state.params, self._keep
    )
    return state._replace(params=params, opt_state=opt_state)

  def batches(self, seed: int, epoch: int) -> dict[str, np.ndarray]:
    """Returns the batches of the epoch after `epoch`.

    Args:
      seed: Seed of the run.
      epoch: Number of the epoch, from 1 after the first one.
    """
    return super().batches(seed, epoch + 1)


def check_epochs(images: Images) -> None:
  """Checks that training goes on after the first epoch.

  Args:
    images: What to train on.

  Raises:
    OptionError: It does not.
  """
  if images.epochs < 2:
    refuse("epochs", "must be at least 2", images.epochs)


def go_on(
  source: Source, images: Images, arm: Arm, keep: int, plain: Sequence[Run]
) -> list[Run]:
  """Returns runs that go on with fewer heads after their first epoch.

  Args:
    source: Where the runs come from.
    images: What the runs with all heads train on.
    arm: Their arm, of Alrao.
    keep: How many heads to keep.
    plain: The runs with all heads, with which these share the first epoch.

  Returns:
    The runs of all epochs, in the order of `plain`.
  """
  rest = dataclasses.replace(images, epochs=images.epochs - 1)
  fewer = arm._replace(
    name=f"{arm.name}-keep{keep}",
    compiled=f"{arm.compiled}-keep{keep}",
    workload=functools.partial(CollapsedWorkload, keep=keep),
  )
  seeds = [run.config["seed"] for run in plain]
  runs = ImageRunner(source, rest).run([fewer], seeds)
  return [
    Run(run.summary, [before.epochs[0], *run.epochs])
    for run, before in zip(runs, plain, strict=True)
  ]


@dataclasses.dataclass(frozen=True)
class CollapseStudy(Study[Runs]):
  """The curve with collapse to the best head after epoch 1 beside that without."""

  name = "collapse"
  images: Annotated[Images, tyro.conf.arg(name="")] = Images(num_train=10_000, epochs=6)
  seeds: int = 5
  """Number of runs of each."""
  network: str = "small_cnn"
  """Network of benchmarks/models."""
  out: Path = Path("out/studies/collapse")
  """Folder for records, numbers and picture."""

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: A single epoch, after which nothing is left.
    """
    super().check()
    check_epochs(self.images)

  def find(self, source: Source) -> Runs:
    """Returns runs with all heads, and with one.

    Args:
      source: Where all runs come from.
    """
    arm = Arm("alrao", ALRAO, "alrao", network=self.network)
    plain = ImageRunner(source, self.images).run([arm], range(self.seeds))
    return {ALL: plain, ONE: go_on(source, self.images, arm, 1, plain)}

  def table(self, found: Runs) -> list[str]:
    """Returns last losses and accuracies, and their difference.

    Args:
      found: The runs.
    """
    rows = []
    for label, runs in found.items():
      losses = [spread(curves(runs, name)[:, -1], 4) for name in LOSSES]
      accuracies = curves(runs, "validation_accuracy")[:, -1]
      rows.append([label, *losses, spread(accuracies, 1, 100)])
    header = ["", "last train loss", "last held-out loss", "last held-out accuracy, %"]
    with_all, with_one = (
      curves(found[label], "validation_loss")[:, -1] for label in (ALL, ONE)
    )
    change = with_one - with_all
    interval = ttest_rel(with_one, with_all).confidence_interval()
    return [
      *markdown(header, rows),
      "",
      f"Held-out loss with the best head alone less that with all, by seed: "
      f"{change.mean():+.4f} ± {change.std(ddof=1):.4f} (95 % interval of the mean, by "
      f"Student's t: {interval.low:+.4f} to {interval.high:+.4f}).",
    ]

  def draw(self, found: Runs, path: Path) -> None:
    """Draws every run's losses by epoch, and their means.

    Args:
      found: The runs.
      path: The PNG file.
    """
    figure, axes = pictures.subplots(2)
    for axis, (name, title) in zip(axes, LOSSES.items(), strict=True):
      for i, (label, runs) in enumerate(found.items()):
        losses = curves(runs, name)
        epochs = np.arange(1, losses.shape[1] + 1)
        axis.plot(epochs, losses.T, color=f"C{i}", linewidth=0.7, alpha=0.4)
        axis.plot(epochs, losses.mean(axis=0), "o-", color=f"C{i}", label=label)
      axis.axvline(1, color="0.7", linewidth=0.8, linestyle="--")
      axis.set(xlabel="epoch", ylabel="loss", title=title)
      axis.xaxis.get_major_locator().set_params(integer=True)
      axis.legend(fontsize=8)
    pictures.save(figure, path)


STUDY = CollapseStudy
