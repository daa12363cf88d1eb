"""How often training works: draws of rates and weights, beside Adam's.

The papers report that not a single run of Alrao failed. Here a run learns if its
held-out accuracy after the last epoch is above chance by more than half of what the
best rate of plain SGD reaches above it, which is fixed before the draws are looked at.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import pictures
from benchmarks.console import refuse
from benchmarks.methods import ALRAO, METHODS, SGD, SGD_RATES
from benchmarks.records import Run
from benchmarks.studies._study import (
  CHANCE,
  Arm,
  ImageRunner,
  Images,
  Source,
  Study,
  final_accuracy,
  share,
  threshold,
)
from benchmarks.tables import markdown
from benchmarks.training import Loop
from benchmarks.workloads.images import ImageWorkload, Snapshot, State

PyTree = Any

COMPARED = {"Alrao": ("alrao", ALRAO), "Adam": ("adam", METHODS["adam"])}


class SideBySideState(NamedTuple):
  """What training several networks changes.

  Attributes:
    states: Of the networks, stacked on axis 0.
    finite: Whether all train losses of each were finite, (draws,).
  """

  states: State
  finite: Any


class SideBySideSnapshot(NamedTuple):
  """What predictions of several networks need.

  Attributes:
    predictions: Of the networks, stacked on axis 0.
    finite: As in `SideBySideState`.
  """

  predictions: Snapshot
  finite: Any


class SideBySideWorkload(ImageWorkload):
  """Trains networks side by side, each from a seed of its own.

  Each trains as it would alone, up to the order in which numbers are summed. The run of
  seed `i` has the draws from ``i * draws`` on.
  """

  def __init__(self, *args: Any, draws: int, **options: Any):
    """Makes the workload; nothing is compiled yet.

    Args:
      *args: As of `ImageWorkload`.
      draws: Number of networks.
      **options: As of `ImageWorkload`.
    """
    super().__init__(*args, **options)
    self._draws = draws
    self._each_survives = self.survives_divergence
    self.survives_divergence = True  # one network that fails does not end the others
    self.examples_per_epoch *= draws
    self.step = Loop(self._train_all)

  def init(self, seed: int, rate: Any) -> SideBySideState:
    """Returns the states that training starts from.

    Args:
      seed: Seed of the run.
      rate: As of `ImageWorkload`.
    """
    init = super().init
    states = _stack([init(draw, rate) for draw in self._seeds(seed)], axis=0)
    return jax.device_put(SideBySideState(states, np.ones(self._draws, bool)))

  def batches(self, seed: int, epoch: int) -> dict[str, np.ndarray]:
    """Returns an epoch's batches, of all networks.

    Args:
      seed: Seed of the run.
      epoch: Number of the epoch.
    """
    batches = super().batches
    return _stack([batches(draw, epoch) for draw in self._seeds(seed)], axis=1)

  def snapshot(
    self, state: SideBySideState, seed: int, epoch: int
  ) -> SideBySideSnapshot:
    """Returns what predictions need.

    Args:
      state: The state after `epoch`.
      seed: Seed of the run.
      epoch: Number of the epoch; 0 before training.
    """
    snapshot, states = super().snapshot, jax.device_get(state.states)
    found = [
      snapshot(
        jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), states), draw, epoch
      )
      for i, draw in enumerate(self._seeds(seed))
    ]
    return SideBySideSnapshot(_stack(found, axis=0), jax.device_get(state.finite))

  def evaluate(self, snapshot: SideBySideSnapshot, part: str) -> dict[str, Any]:
    """Returns mean ``loss``, and all ``accuracies``, nan of a network that failed.

    Args:
      snapshot: What `snapshot` returned.
      part: As of `ImageWorkload`.
    """
    evaluate, losses, accuracies = super().evaluate, [], []
    for i, finite in enumerate(np.asarray(snapshot.finite).tolist()):
      one = jax.tree.map(lambda leaf, i=i: leaf[i], snapshot.predictions)
      found = evaluate(one, part)
      whole = self._each_survives or (finite and math.isfinite(found["loss"]))
      losses.append(found["loss"])
      accuracies.append(found["accuracy"] if whole else math.nan)
    return {"loss": float(np.mean(losses)), "accuracies": accuracies}

  def _seeds(self, seed: int) -> range:
    return range(seed * self._draws, (seed + 1) * self._draws)

  def _train_all(self, state: SideBySideState, data, batch):
    train = jax.vmap(self._train_step, in_axes=(0, None, 0))
    states, outputs = train(state.states, data, batch)
    finite = state.finite & jnp.isfinite(outputs["loss"])
    means = jax.tree.map(lambda leaf: leaf.mean(axis=0), outputs)
    return SideBySideState(states, finite), means


def _stack(trees: Sequence[PyTree], axis: int) -> PyTree:
  return jax.tree.map(lambda *leaves: np.stack(leaves, axis), *trees)


class Learned(NamedTuple):
  """What was found of one network.

  Attributes:
    rate: The best rate of SGD.
    threshold: The accuracy above which a run has learned.
    accuracies: Of all runs, by method.
  """

  rate: float
  threshold: float
  accuracies: dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class SeedsStudy(Study[dict[str, Learned]]):
  """The share of runs that learn, over many draws, of Alrao and of Adam."""

  name = "seeds"
  images: Annotated[Images, tyro.conf.arg(name="")] = Images()
  seeds: int = 3
  """Number of runs of each rate of SGD."""
  mlp_draws: int = 300
  """Number of runs of the MLP, of each method."""
  block: int = 50
  """Number of them that train side by side; divides --mlp-draws."""
  cnn_draws: int = 30
  """Number of runs of the CNN, of each method."""
  mlp_width: float = 1 / 4
  """Factor on the MLP's two layers of 512 units."""
  cnn_width: float = 1.0
  """Factor on the CNN's 16, 32 and 64 channels."""
  out: Path = Path("out/studies/seeds")
  """Folder for records, numbers and picture."""

  @property
  def spread(self) -> str:
    """How many runs there are, and how they are summed up."""
    return f"{self.seeds} seeds of each rate of SGD. Runs that failed are at chance."

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: Draws that make no whole blocks, or no draws.
    """
    super().check()
    for name in ("mlp_draws", "block", "cnn_draws"):
      if getattr(self, name) < 1:
        refuse(name, "must be at least 1", getattr(self, name))
    if self.mlp_draws % self.block:
      refuse("block", f"must divide --mlp-draws ({self.mlp_draws})", self.block)

  def find(self, source: Source) -> dict[str, Learned]:
    """Returns accuracies by network and method.

    Args:
      source: Where all runs come from.
    """
    runner = ImageRunner(source, self.images, 1)
    return {
      f"MLP, width {self.mlp_width:g}": self._mlp(runner),
      f"CNN, width {self.cnn_width:g}": self._cnn(runner),
    }

  def _mlp(self, runner: ImageRunner) -> Learned:
    size: dict[str, Any] = {"network": "mlp", "width": self.mlp_width}
    sgd = self._sgd(runner, size)
    workload = functools.partial(SideBySideWorkload, draws=self.block)
    accuracies = {}
    for label, (name, method) in COMPARED.items():
      name = f"{name}-mlp-{self.block}draws"
      arm = Arm(name, method, name, **size, workload=workload)
      blocks = runner.run([arm], range(self.mlp_draws // self.block))
      accuracies[label] = [found for run in blocks for found in block_accuracies(run)]
    return Learned(*threshold(sgd), accuracies)

  def _cnn(self, runner: ImageRunner) -> Learned:
    size: dict[str, Any] = {"network": "small_cnn", "width": self.cnn_width}
    sgd = self._sgd(runner, size)
    accuracies = {}
    for label, (name, method) in COMPARED.items():
      arm = Arm(f"{name}-cnn", method, name, **size)
      runs = runner.run([arm], range(self.cnn_draws))
      accuracies[label] = [final_accuracy(run) for run in runs]
    return Learned(*threshold(sgd), accuracies)

  def _sgd(self, runner: ImageRunner, size: dict) -> dict[float, list[float]]:
    """SGD's accuracies by rate."""
    found = {}
    for rate in SGD_RATES:
      arm = Arm(f"sgd-{size['network']}-{rate:g}", SGD, "sgd", rate, **size)
      found[rate] = [
        final_accuracy(run) for run in runner.run([arm], range(self.seeds))
      ]
    return found

  def table(self, found: dict[str, Learned]) -> list[str]:
    """Returns the shares of runs that learn.

    Args:
      found: The accuracies.
    """
    lines = ["A run learns if its last held-out accuracy is above"]
    rows = []
    for network, one in found.items():
      lines.append(
        f"- {network}: {100 * one.threshold:.1f} %, half-way from chance to the mean "
        f"of SGD's best rate, {one.rate:g}."
      )
      for method, accuracies in one.accuracies.items():
        values = 100 * np.array(accuracies)
        learned = share([accuracy > one.threshold for accuracy in accuracies])
        cells = [f"{q:.1f}" for q in (values.min(), np.median(values), values.max())]
        rows.append([network, method, learned, *cells])
    header = ["network", "method", "runs that learn", "least accuracy", "median"]
    return [
      *lines,
      "",
      "Shares with exact (Clopper-Pearson) 95 % intervals; accuracy in %.",
      "",
      *markdown([*header, "largest"], rows),
    ]

  def draw(self, found: dict[str, Learned], path: Path) -> None:
    """Draws the distributions of accuracies.

    Args:
      found: The accuracies.
      path: The PNG file.
    """
    figure, axes = pictures.subplots(len(found))
    for axis, (network, one) in zip(axes, found.items(), strict=True):
      for method, accuracies in one.accuracies.items():
        axis.ecdf(100 * np.array(accuracies), label=method)
      axis.axvline(
        100 * one.threshold, color="0.5", linestyle="--", linewidth=1, label="learns"
      )
      axis.set(
        xlabel="held-out accuracy, %",
        ylabel="share of runs at or below",
        title=network,
        xlim=(0, None),
      )
      axis.legend(loc="upper left", fontsize=8)
    pictures.save(figure, path)


def block_accuracies(run: Run) -> list[float]:
  """Returns the last accuracies of networks that trained side by side.

  Args:
    run: A run of `SideBySideWorkload`; a network that failed is at chance.
  """
  found = run.epochs[-1]["validation_accuracies"]
  return [CHANCE if accuracy is None else accuracy for accuracy in found]


STUDY = SeedsStudy
