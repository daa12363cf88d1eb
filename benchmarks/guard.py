"""What the guard is worth: a small CNN without normalisation, with wide intervals.

    python -m benchmarks.guard
    python -m benchmarks.guard --runs 6 --steps 200

Trains the same network from many seeds, with and without ``alrao(guard=...)``, on
intervals that reach far beyond what the network bears, and counts the runs that end
finite and those that learn. *Finite*: all parameters and the loss on the test images
are. *Learns*: the accuracy on the test images is above chance by more than half of what
the best rate of plain SGD, chosen on validation images, reaches above it in as many
steps.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import binomtest

import alrao_jax
from benchmarks import data, records
from benchmarks.data import DataError
from benchmarks.data.cache import cache_dir
from benchmarks.images import ImageData, ImageProgram
from benchmarks.models import build_model
from benchmarks.optimizers import OPTIMIZERS, SGD_RATES, Optimizer

CHANCE = 0.1  # ten classes
MIN_RATE = 1e-5
COUNTED = ("finite", "learns")


@dataclasses.dataclass(frozen=True)
class Options:
  """Count the runs that end finite, and that learn, with and without the guard."""

  dataset: Literal["auto", "cifar10", "digits"] = "auto"
  """Images to classify; auto takes digits where there is no CIFAR-10."""
  runs: int = 30
  """Number of seeds of each line."""
  steps: int = 300
  """Number of steps of a run."""
  intervals: tuple[float, ...] = (10.0, 1e3)
  """Upper ends of the intervals; the lower end is 1e-5."""
  limit: float = alrao_jax.guard().limit
  """The guard's limit."""
  slowdown: float = alrao_jax.guard().slowdown
  """The guard's slowdown."""
  width: float = 0.5
  """Factor on the network's 16, 32 and 64 channels."""
  batch_size: int = 32
  """Images in a step."""
  sgd_runs: int = 3
  """Number of seeds of each rate of SGD."""
  out: Path = Path("out/guard/guard.jsonl")
  """File of the records."""
  data_dir: Path | None = None
  """Folder below which CIFAR-10 lies."""


class Bench:
  """The data, and programs on it."""

  def __init__(self, options: Options):
    """Loads the data.

    Args:
      options: The command's.

    Raises:
      DataError: There is no such data.
    """
    self.options = options
    dataset = _load(options)
    self.name = dataset.name
    splits = dataset.split(num_train=min(10_000, len(dataset.train_labels) * 4 // 5))
    self.data = ImageData(splits)

  def program(self, optimizer: Optimizer) -> ImageProgram:
    """Returns the program that trains with an optimizer.

    Args:
      optimizer: The optimizer.
    """
    model = build_model(
      "small_cnn",
      num_heads=optimizer.num_heads if optimizer.has_heads else None,
      width=self.options.width,
      norm="none",
    )
    return ImageProgram(
      model,
      optimizer,
      self.data,
      batch_size=self.options.batch_size,
      max_epochs=1,
      flip=False,
      augmented=False,
    )

  def train(
    self, program: ImageProgram, seed: int, rate: float | None = None
  ) -> records.Record:
    """Trains once; returns what came of it.

    Args:
      program: What to train.
      seed: Determines weights, batches and Alrao's rates.
      rate: Learning rate of SGD.
    """
    state, steps, epoch, losses = program.init(seed, rate), 0, 0, []
    while steps < self.options.steps:
      epoch += 1
      rest = self.options.steps - steps
      batches = jax.tree.map(lambda x, n=rest: x[:n], program.batches(seed, epoch))
      state, outputs = program.step(state, program.data, batches)
      losses.append(outputs["loss"])
      steps += len(outputs["loss"])
    snapshot = program.snapshot(state, seed, 0)
    test = program.evaluate(snapshot, "test")
    leaves = jax.device_get(jax.tree.leaves(state.params))
    finite = all(np.isfinite(leaf).all() for leaf in leaves)
    scalars = {}
    if rate is None:
      scalars = jax.device_get(alrao_jax.scalars(state.opt_state))
    return {
      "seed": seed,
      "validation_accuracy": program.evaluate(snapshot, "validation")["accuracy"],
      "test_loss": test["loss"],
      "test_accuracy": test["accuracy"],
      "parameters_finite": finite,
      "finite": finite and math.isfinite(test["loss"]),
      "nonfinite_steps": int(np.sum(~np.isfinite(np.concatenate(losses)))),
      "units_guarded": float(scalars.get("alrao/units_guarded", 0.0)),
      "guard_trips": int(scalars.get("alrao/guard_trips", 0)),
    }

  def cost(self, programs: list[ImageProgram], rounds: int = 100) -> np.ndarray:
    """Times programs in turns; returns seconds a step, (rounds, number of programs).

    Args:
      programs: What to time.
      rounds: How many turns of ten steps each gets.
    """
    states = [program.init(0, None) for program in programs]
    batches = jax.tree.map(lambda x: x[:10], programs[0].batches(0, 1))
    seconds = np.zeros((rounds + 1, len(programs)))
    for turn in range(rounds + 1):  # the first compiles
      for i, program in enumerate(programs):
        start = time.perf_counter()
        states[i], _ = program.step(states[i], program.data, batches)
        jax.block_until_ready(states[i])
        seconds[turn, i] = (time.perf_counter() - start) / 10
    return seconds[1:]


def main(options: Options) -> None:
  """Trains all runs, writes the records and prints the table.

  Args:
    options: The command's.
  """
  console, bench = Console(), Bench(options)
  config = {**dataclasses.asdict(options), "dataset": bench.name}
  config = {name: str(x) if isinstance(x, Path) else x for name, x in config.items()}
  environment = records.environment()
  found = [{"kind": "guard", "config": config, **environment}]

  def keep(**result: Any) -> records.Record:
    found.append({"kind": "guard", **result})
    records.write(options.out, found)
    return found[-1]

  program = bench.program(OPTIMIZERS["sgd"])
  chosen_by, accuracies = {}, {}
  for rate in track(SGD_RATES, "SGD", console=console):
    runs = [bench.train(program, seed, rate) for seed in range(options.sgd_runs)]
    for run in runs:
      keep(method="sgd", rate=rate, **run)
    for found_by, name in ((chosen_by, "validation"), (accuracies, "test")):
      found_by[rate] = float(np.mean([run[f"{name}_accuracy"] for run in runs]))
  best = max(chosen_by, key=lambda rate: chosen_by[rate])
  threshold = CHANCE + (accuracies[best] - CHANCE) / 2

  table, seconds = Table(box=box.SIMPLE), []
  for column in ("interval", "guard", "finite", "learn", "accuracy", "guarded"):
    table.add_column(column, no_wrap=True)
  for high in options.intervals:
    pair = [bench.program(_alrao(options, high, on)) for on in (False, True)]
    for program, word in zip(pair, ("no", "yes"), strict=True):
      title, runs = f"[1e-5, {high:g}], guard: {word}", []
      for seed in track(range(options.runs), title, console=console):
        run = bench.train(program, seed)
        learns = run["finite"] and run["test_accuracy"] > threshold
        settings = {"max_rate": high, "guard": word == "yes"}
        runs.append(keep(method="alrao", **settings, **run, learns=learns))
      table.add_row(f"[1e-5, {high:g}]", word, *_cells(runs))
    seconds.append(bench.cost(pair))
  console.print(table)
  console.print(
    f"{bench.name}, {options.steps} steps; shares with exact 95 % intervals; median "
    f"accuracy; mean share of units guarded. Best SGD: rate {best:g}, mean accuracy "
    f"{accuracies[best]:.3f} of {options.sgd_runs} runs; to learn is to be above "
    f"{threshold:.3f}."
  )
  plain, guarded = np.concatenate(seconds).T
  ratios, step = guarded / plain, float(1e3 * np.median(plain))
  keep(method="cost", milliseconds=step, ratios=ratios.tolist())
  low, middle, high = np.percentile(ratios, [25, 50, 75])
  console.print(
    f"Step time with the guard over that without ({step:.1f} ms), in turns: median "
    f"{middle:.3f}, quartiles {low:.3f} to {high:.3f}."
  )
  console.print(f"records: {options.out}")


def _cells(runs: list[records.Record]) -> list[str]:
  """What the table says of runs with the same settings."""
  accuracy = np.median([run["test_accuracy"] for run in runs])
  guarded = np.mean([run["units_guarded"] for run in runs])
  shares = [_share(sum(run[name] for run in runs), len(runs)) for name in COUNTED]
  return [*shares, f"{accuracy:.3f}", f"{guarded:.0%}"]


def _load(options: Options) -> data.Dataset:
  if options.dataset != "auto":
    return data.load(options.dataset, options.data_dir)
  try:
    return data.load("cifar10", options.data_dir)
  except DataError:
    return data.load("digits")


def _alrao(options: Options, high: float, guarded: bool) -> Optimizer:
  """Alrao on the interval from 1e-5 to `high`, with a guard or not."""
  guard = alrao_jax.guard(options.limit, options.slowdown) if guarded else None

  def make(setting):
    return alrao_jax.alrao(setting.key, None, MIN_RATE, high, guard=guard)

  return Optimizer("Alrao", "the guard's own benchmark", make, has_heads=True)


def _share(count: int, total: int) -> str:
  interval = binomtest(count, total).proportion_ci(method="exact")
  return f"{count}/{total} ({100 * interval.low:.0f}-{interval.high:.0%})"


if __name__ == "__main__":
  jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
  try:
    main(tyro.cli(Options, description=__doc__))
  except DataError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
