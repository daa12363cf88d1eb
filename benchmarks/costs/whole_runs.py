"""What a whole run costs with large output layers, where heads leave, beside SGD's.

    python -m benchmarks cost whole_runs --cases words lstm_words lstm_words_6

A run is the benchmarks' own loop, from the draw of the first parameters to the last
step, with all its compilations, each as for the first time; validation is left out.
Runs of one seed take turns within one process, in an order drawn anew. The same command
goes on after the last seed that has ended.
"""

import dataclasses
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import records
from benchmarks.console import refuse
from benchmarks.costs._cost import (
  Cost,
  check_known,
  check_positive,
  make_record,
  render,
)
from benchmarks.methods import METHODS
from benchmarks.records import Record
from benchmarks.suites.arena import ArenaSuite, ShortOptions, ShortPlace
from benchmarks.suites.ptb import PennTreebank, TextOptions, TextPlace
from benchmarks.training import Workload

REFERENCE = "sgd"


class RunCase(NamedTuple):
  """What is trained.

  Attributes:
    title: Its name in tables.
    suite: The suite.
    place: What says where its data is.
    options: The suite's options, but for optimizer and seed.
    rate: SGD's learning rate, a good one of the archived runs.
    epochs: Number of epochs.
  """

  title: str
  suite: Any
  place: Any
  options: Any
  rate: float
  epochs: int


def _lstm(epochs: int) -> RunCase:
  options = TextOptions(
    level="words", max_epochs=epochs, num_validation=20_000, num_test=20_000
  )
  title = f"LSTM, 10,000 words, {epochs} epoch{'s' * (epochs > 1)}"
  return RunCase(title, PennTreebank, TextPlace, options, 1.0, epochs)


CASES = {
  "words": RunCase(
    "Arena's words, 1,000 of them",
    ArenaSuite,
    ShortPlace,
    ShortOptions("words"),
    1.0,
    8,
  ),
  "lstm_words": _lstm(1),
  "lstm_words_6": _lstm(6),
}


@dataclasses.dataclass(frozen=True)
class WholeRuns(Cost):
  """Time whole runs in which heads leave beside those of SGD."""

  name = "whole_runs"
  cases: tuple[str, ...] = ("words",)
  """What to train; see CASES in benchmarks/costs/whole_runs.py."""
  methods: tuple[str, ...] = (
    "alrao_hopeful",
    "alrao",
    "schedule_free_alrao_hopeful",
    "schedule_free_alrao",
  )
  """Methods, beside SGD."""
  seeds: int = 5
  """Number of runs of each."""
  data_dir: Path | None = None
  """Folder below which to look for data; by default ALRAO_DATA_DIR."""

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: An unknown name, or no seed.
    """
    check_known("cases", self.cases, CASES)
    check_known("methods", self.methods, METHODS)
    for name in self.methods:
      if METHODS[name].takes_rate:
        refuse("methods", "must take no rate", name)
    check_positive(seeds=self.seeds)

  def measure(self) -> Iterator[tuple[str, Record]]:
    """Yields each case's measurements, after every seed."""
    # A program read from the cache would not have been compiled in the time it took.
    jax.config.update("jax_enable_compilation_cache", False)
    names = (REFERENCE, *self.methods)
    for case in self.cases:
      kept = self._kept(case, names)
      workloads = _workloads(CASES[case], names, self.data_dir)
      for seed in range(len(kept[REFERENCE]), self.seeds):
        order = np.random.default_rng(seed).permutation(names).tolist()
        for name in order:
          kept[name].append(run(CASES[case], workloads[name], name, seed))
        yield case, _record(CASES[case], kept)

  def _kept(self, case: str, names: tuple[str, ...]) -> dict[str, list[Record]]:
    """The runs of an earlier command, seed by seed, if it had the same methods."""
    written = make_record(self.name, case, {})["case"]
    path = self.out / f"{self.name}-{written}.jsonl"
    kept: dict[str, list[Record]] = {name: [] for name in names}
    if path.exists():
      (found,) = records.read(path)
      if [row["optimizer"] for row in found["rows"]] == list(names):
        kept = {row["optimizer"]: row["runs"] for row in found["rows"]}
    return kept


def _workloads(
  case: RunCase, names: tuple[str, ...], data_dir: Path | None
) -> dict[str, Workload]:
  suite = case.suite(case.place(data_dir))
  rates = {name: case.rate if name == REFERENCE else None for name in names}
  return {
    name: suite.workload(
      dataclasses.replace(case.options, optimizer=name, rate=rates[name])
    )
    for name in names
  }


def run(case: RunCase, workload: Workload, name: str, seed: int) -> Record:
  """Trains once, as for the first time in a process.

  Args:
    case: What is trained.
    workload: The same with a method.
    name: Name of the method.
    seed: Of the run.

  Returns:
    ``seconds``, ``cpu_seconds`` (of all threads), held-out ``loss``, and ``left``:
    pairs of a number of steps and the number of heads that are left from there on.
  """
  jax.clear_caches()
  gc.collect()
  weights = []
  start, cpu_start = time.perf_counter(), time.process_time()
  state = workload.init(seed, case.rate if name == REFERENCE else None)
  for epoch in range(1, case.epochs + 1):
    batches = workload.batches(seed, epoch)
    state, outputs = workload.step(state, workload.data, batches)
    weights.append(outputs["head_weights"])
  jax.block_until_ready(state)
  seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
  loss = workload.evaluate(workload.snapshot(state, seed, case.epochs), "validation")
  counts = np.count_nonzero(np.concatenate(weights), axis=1)
  changes = [0, *(np.flatnonzero(np.diff(counts)) + 1).tolist()]
  return {
    "seconds": seconds,
    "cpu_seconds": cpu_seconds,
    "loss": loss["loss"],
    "left": [[step, int(counts[step])] for step in changes],
  }


def _record(case: RunCase, kept: dict[str, list[Record]]) -> Record:
  rows = []
  for name, runs in kept.items():
    pairs = list(zip(runs, kept[REFERENCE], strict=True))
    ratios = {
      key: [run[key] / base[key] for run, base in pairs]
      for key in ("seconds", "cpu_seconds")
    }
    rows.append(
      {
        "label": METHODS[name].label,
        "optimizer": name,
        "ratio": float(np.median(ratios["seconds"])),
        "cpu_ratio": float(np.median(ratios["cpu_seconds"])),
        "runs": runs,
      }
    )
  return {"title": case.title, "rows": rows}


def table(found: Record) -> str:
  """Returns a case's measurements as a Markdown table with its conditions.

  Args:
    found: The record.
  """
  header = [
    "method",
    "whole run / SGD's",
    "CPU time / SGD's",
    "seconds",
    "held-out loss",
    "heads left, from which step",
  ]
  rows = []
  for row in found["rows"]:
    runs = row["runs"]
    losses = [run["loss"] for run in runs]
    left = ["; ".join(f"{n} from {step}" for step, n in run["left"]) for run in runs]
    rows.append(
      [
        row["label"],
        f"{row['ratio']:.2f}",
        f"{row['cpu_ratio']:.2f}",
        f"{np.median([run['seconds'] for run in runs]):.1f}",
        f"{np.mean(losses):.3f} ± {np.std(losses, ddof=len(losses) > 1):.3f}",
        ", or ".join(dict.fromkeys(left)) if runs[0]["left"][0][1] else "",
      ]
    )
  count = len(found["rows"][0]["runs"])
  conditions = (
    f"{count} seed{'s' * (count > 1)}; medians of times, means and deviations of "
    f"losses; {records.conditions(found)}"
  )
  return render(found["title"], header, rows, conditions)


COST = WholeRuns
