"""The papers' main table: networks on CIFAR-10, Alrao beside what users would pick.

    python -m benchmarks.cifar10 run --network vgg19 --optimizer alrao
    python -m benchmarks.cifar10 sweep --preset reduced
    python -m benchmarks.cifar10 report

Every command has `--help`. Killed, `run --resume` and `sweep` go on after the last
whole epoch. All of it works on scikit-learn's digits too, without any files.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import jax
import tyro

from benchmarks import engine, report, sweeps
from benchmarks.data import DataError
from benchmarks.data.cache import cache_dir
from benchmarks.experiments import Experiment, OptionError, Workshop
from benchmarks.progress import Display
from benchmarks.records import RecordError


@dataclasses.dataclass(frozen=True)
class Run:
  """Train one network once with one optimizer, and test it."""

  experiment: Annotated[Experiment, tyro.conf.arg(name="")] = Experiment()
  out: Path = Path("out/cifar10")
  """Folder for the run's records and checkpoint."""
  resume: bool = False
  """Continue where a killed run left off; keep the results of one that has ended."""
  data_dir: Path | None = None
  """Folder below which CIFAR-10 lies, in any of its layouts."""
  download: bool = False
  """Download CIFAR-10 where there is none."""

  def __call__(self) -> None:
    """Trains, and prints the outcome."""
    workshop = Workshop(self.data_dir, self.download)
    with Display() as display:
      plan = workshop.plan(self.experiment, self.out)
      program = workshop.program(self.experiment)
      summary = engine.train(program, plan, display, resume=self.resume)
      display.say(sweeps.describe(summary))
      display.say(f"records: {plan.path}")


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Train a whole table, or what is missing of it."""

  preset: sweeps.PresetName = "reduced"
  """Which table; see PRESETS in benchmarks/sweeps.py."""
  out: Path | None = None
  """Folder for records and checkpoints, by default out/ and the preset's name."""
  networks: tuple[str, ...] = ()
  """Only these networks of the preset, to run it in pieces."""
  optimizers: tuple[str, ...] = ()
  """Only these optimizers of the preset."""
  data_dir: Path | None = None
  """Folder below which CIFAR-10 lies, in any of its layouts."""
  download: bool = False
  """Download CIFAR-10 where there is none."""

  def __call__(self) -> None:
    """Trains what is missing."""
    workshop = Workshop(self.data_dir, self.download)
    preset = sweeps.select(sweeps.PRESETS[self.preset], self.networks, self.optimizers)
    with Display() as display:
      sweeps.sweep(preset, workshop, self.out or Path("out", self.preset), display)


@dataclasses.dataclass(frozen=True)
class Report:
  """Write RESULTS.md and its pictures from the records of runs."""

  results: tuple[Path, ...] = (Path("benchmarks/results"),)
  """Folders of records, searched with their subfolders."""
  out: Path = Path("benchmarks")
  """Folder for RESULTS.md and its pictures."""

  def __call__(self) -> None:
    """Writes the report."""
    print(report.write(self.results, self.out))


def main() -> None:
  """Runs a command; exits with 2 where options or data are not as they should be."""
  command = tyro.cli(Run | Sweep | Report, description=__doc__)  # pyright: ignore
  jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
  try:
    command()
  except (DataError, OptionError, RecordError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print(
      "\ninterrupted; the same command (run: with --resume) goes on after the last "
      "whole epoch.",
      file=sys.stderr,
    )
    sys.exit(130)


if __name__ == "__main__":
  main()
