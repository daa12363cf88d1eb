"""Whole tables of runs: which experiments they hold, and running what is missing."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks import engine, records
from benchmarks.data import DataError
from benchmarks.experiments import Experiment, OptionError, Workshop
from benchmarks.optimizers import OPTIMIZERS, PEERS, SGD_RATES
from benchmarks.progress import Display

PresetName = Literal["reduced", "tier_a", "tier_b", "tier_c", "paper"]


class Preset(NamedTuple):
  """A table of runs.

  Attributes:
    bases: An experiment for each network, without optimizer and seed.
    optimizers: Names of the optimizers that each of them trains with.
    rates: Rates of those that take one.
    num_seeds: Number of runs of an optimizer; of the best rate only, where it has
      several.
    num_rate_seeds: Number of runs of every rate.
    without_cifar10: What to replace in `bases` where there is no CIFAR-10; None makes
      that an error.
  """

  bases: tuple[Experiment, ...]
  optimizers: tuple[str, ...]
  rates: tuple[float, ...] = SGD_RATES
  num_seeds: int = 3
  num_rate_seeds: int = 1
  without_cifar10: dict[str, Any] | None = None


def _papers(networks_and_widths, **options) -> tuple[Experiment, ...]:
  return tuple(
    Experiment(network=network, width=width, **options)
    for network, width in networks_and_widths
  )


_SMALL = Experiment(
  network="small_cnn",
  num_train=10_000,
  num_validation=2_000,
  max_epochs=10,
)

PRESETS: dict[PresetName, Preset] = {
  # Minutes on two cores, from whatever data there is.
  "reduced": Preset(
    bases=(
      Experiment(
        network="small_cnn",
        num_train=4_000,
        num_validation=1_000,
        num_test=2_000,
        max_epochs=5,
      ),
    ),
    optimizers=("alrao", "sgd", "adam", *PEERS, "sgd_tuned"),
    without_cifar10={
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
    optimizers=tuple(OPTIMIZERS),
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
    optimizers=tuple(OPTIMIZERS),
  ),
}


def select(
  preset: Preset, networks: tuple[str, ...], optimizers: tuple[str, ...]
) -> Preset:
  """Returns a part of a preset.

  Args:
    preset: The preset.
    networks: Networks to keep; empty for all.
    optimizers: Optimizers to keep; empty for all.

  Raises:
    OptionError: One that the preset does not hold.
  """
  for given, known in (
    (networks, sorted({base.network for base in preset.bases})),
    (optimizers, sorted(preset.optimizers)),
  ):
    unknown = set(given) - set(known)
    if unknown:
      raise OptionError(
        f"the preset has {', '.join(known)}; it does not have {sorted(unknown)}."
      )
  return preset._replace(
    bases=tuple(b for b in preset.bases if not networks or b.network in networks),
    optimizers=tuple(n for n in preset.optimizers if not optimizers or n in optimizers),
  )


def sweep(
  preset: Preset, workshop: Workshop, out: Path, display: Display
) -> list[records.Record]:
  """Runs what is missing of a table.

  Args:
    preset: The table.
    workshop: Where its experiments are prepared.
    out: Folder of the results; runs that have ended there are not repeated.
    display: Where progress is shown.

  Returns:
    The summaries of all runs.

  Raises:
    DataError: The data is missing or damaged.
  """
  bases = preset.bases
  if preset.without_cifar10 is not None:
    try:
      workshop.dataset("cifar10")
    except DataError as error:
      display.say(f"{error}\nGoing on without CIFAR-10.")
      bases = [dataclasses.replace(base, **preset.without_cifar10) for base in bases]
  summaries: list[records.Record] = []

  def run(experiment: Experiment) -> records.Record:
    plan = workshop.plan(experiment, out)
    summary = records.read_summary(plan.path)
    if summary is None:
      summary = engine.train(workshop.program(experiment), plan, display)
    summaries.append(summary)
    display.say(f"[{len(summaries)}/{total}] {describe(summary)}")
    return summary

  total = len(bases) * sum(_num_runs(preset, name) for name in preset.optimizers)
  for base in bases:
    for name in preset.optimizers:
      for experiment in _with_best_rate(preset, name, base, run):
        run(experiment)
  return summaries


def _num_runs(preset: Preset, name: str) -> int:
  if not OPTIMIZERS[name].takes_rate:
    return preset.num_seeds
  rate_seeds = preset.num_rate_seeds
  return len(preset.rates) * rate_seeds + max(0, preset.num_seeds - rate_seeds)


def _with_best_rate(preset, name, base, run) -> Iterator[Experiment]:
  """Runs all rates, if there are any; yields what else is to run."""
  base = dataclasses.replace(base, optimizer=name)
  seeds = range(preset.num_seeds)
  if OPTIMIZERS[name].takes_rate:
    losses = {}
    for rate in preset.rates:
      ended = [
        run(dataclasses.replace(base, rate=rate, seed=seed))
        for seed in range(preset.num_rate_seeds)
      ]
      losses[rate] = mean_validation_loss(ended)
    base = dataclasses.replace(base, rate=min(losses, key=lambda rate: losses[rate]))
    seeds = seeds[preset.num_rate_seeds :]
  for seed in seeds:
    yield dataclasses.replace(base, seed=seed)


def mean_validation_loss(summaries: list[records.Record]) -> float:
  """Returns what the best rate is chosen by: inf if any run has no finite loss.

  Args:
    summaries: Of runs of one rate.
  """
  losses = [summary["validation_loss"] for summary in summaries]
  return math.inf if None in losses else sum(losses) / len(losses)


def describe(summary: records.Record) -> str:
  """Returns a run's outcome in a line.

  Args:
    summary: The run's summary.
  """
  if summary["test_loss"] is None:
    outcome = "no epoch with a finite validation loss"
  else:
    outcome = (
      f"test loss {summary['test_loss']:.4f}, "
      f"accuracy {summary['test_accuracy']:.2%}, at epoch {summary['best_epoch']}"
    )
  ending = {
    "early": f"stopped early after {summary['epochs']}",
    "maximum": f"hit the maximum of {summary['epochs']}",
    "failed": f"FAILED in epoch {summary['epochs']}: a loss was not finite",
  }[summary["ending"]]
  return f"{summary['name']}: {outcome} ({ending}; {summary['seconds']:.0f} s)"
