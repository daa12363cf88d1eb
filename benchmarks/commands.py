"""What the command lines of all tasks share."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks import engine, report, sweeps
from benchmarks.data import DataError
from benchmarks.data.cache import cache_dir
from benchmarks.planning import OptionError
from benchmarks.progress import Display
from benchmarks.records import RecordError


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


def run(
  workshop: sweeps.Workshop, experiment: sweeps.Experiment, out: Path, resume: bool
) -> None:
  """Trains one experiment, and prints the outcome.

  Args:
    workshop: Prepares it.
    experiment: The experiment.
    out: Folder for its records and checkpoint.
    resume: Whether to continue a killed run, and to keep the results of an ended one.
  """
  with Display() as display:
    plan = workshop.plan(experiment, out)
    program = workshop.program(experiment)
    summary = engine.train(program, plan, display, resume=resume)
    display.say(sweeps.describe(summary))
    display.say(f"records: {plan.path}")


def sweep(workshop: sweeps.Workshop, preset: sweeps.Preset, out: Path) -> None:
  """Trains what is missing of a table.

  Args:
    workshop: Prepares its experiments.
    preset: The table.
    out: Folder for records and checkpoints.
  """
  with Display() as display:
    sweeps.sweep(preset, workshop, out, display)


def main(commands: Any, description: str | None) -> None:
  """Runs a command; exits with 2 where options or data are not as they should be.

  Args:
    commands: Callable dataclasses, one of which the command line fills.
    description: What `--help` begins with.
  """
  command = tyro.cli(commands, description=description)
  jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
  try:
    command()
  except (DataError, OptionError, RecordError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print(
      "\ninterrupted; the same command (run: with --resume) goes on after the last "
      "checkpoint.",
      file=sys.stderr,
    )
    sys.exit(130)
