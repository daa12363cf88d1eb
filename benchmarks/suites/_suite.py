"""What all suites have in common: from options to a run, and whole tables of runs."""

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import jax
import tyro

from benchmarks import console, records, training
from benchmarks.console import Display, OptionError, refuse
from benchmarks.data import DataError
from benchmarks.methods import METHODS
from benchmarks.records import Record
from benchmarks.tables import Measure, TableKind, mean_validation_loss
from benchmarks.training import Plan, Workload
from benchmarks.workloads.devices import watch_hosts

LOSS = Measure("loss", "loss")
ACCURACY = Measure("accuracy", "accuracy, %", 100.0, 2, True)
BITS = Measure("bits", "bits a symbol")
RETURN = Measure("return", "return", 1.0, 1, True)

# A dataclass with the fields `optimizer`, `rate`, `seed` and whatever its suite needs.
Options = TypeVar("Options")
# A dataclass that says where a suite's data is, and on what to train.
Place = TypeVar("Place")
PresetName = TypeVar("PresetName")


class Preset(NamedTuple):
  """A table of runs.

  Attributes:
    bases: Options for each network, without optimizer and seed.
    optimizers: Names of the methods that each of them trains with.
    rates: Rates of those that take one; None: those that the method tries.
    num_seeds: Number of runs of a method; of the best rate only, where it has several.
    num_rate_seeds: Number of runs of every rate.
    without_data: What to replace in `bases` where their data is missing; None makes
      that an error.
  """

  bases: tuple[Any, ...]
  optimizers: tuple[str, ...]
  rates: tuple[float, ...] | None = None
  num_seeds: int = 3
  num_rate_seeds: int = 1
  without_data: dict[str, Any] | None = None

  def rates_of(self, name: str) -> tuple[Any, ...]:
    """Returns the rates at which a method is tried, none if it takes none.

    Args:
      name: Name of the method.
    """
    tried = METHODS[name].rates
    return tried if self.rates is None or not tried else self.rates


class Suite(abc.ABC, Generic[Options, Place]):
  """Workloads x methods x seeds; data and compiled programs are shared where possible.

  Attributes:
    name: Its name on the command line, and in records.
    options: A dataclass: all that determines a result.
    place: A dataclass: where the data is, and on what to train.
    presets: Its tables, by name, the default first.
    kind: How its tables look; None: like no other's.
    prefix: What the folder of a preset's results begins with.
    sweep_command: A callable dataclass in place of `SweepCommand`.
  """

  name: ClassVar[str]
  options: ClassVar[type]
  place: ClassVar[type]
  presets: ClassVar[Mapping[str, Preset]]
  kind: ClassVar[TableKind | None] = None
  prefix: ClassVar[str] = ""
  sweep_command: ClassVar[type | None] = None

  def __init__(self, place: Place | None = None):
    """Prepares; nothing is loaded yet.

    Args:
      place: Where the data is, and on what to train; by default as options say.

    Raises:
      OptionError: There is no such place.
    """
    self._place: Any = self.place() if place is None else place
    self._workload: tuple[Any, Workload] | None = None

  def begin(self) -> None:
    """Joins the other hosts, if there are any; called before anything is trained.

    Raises:
      OptionError: They did not meet.
    """

  def check(self, options: Any) -> None:
    """Checks what can be without the data.

    Args:
      options: Of a run.

    Raises:
      OptionError: Options out of range, or that do not go together.
    """
    options.check()

  @abc.abstractmethod
  def find_data(self, options: Any) -> None:
    """Loads the data of a run.

    Args:
      options: Of the run.

    Raises:
      DataError: It is missing or damaged.
    """

  @abc.abstractmethod
  def plan(self, options: Any, out: Path) -> Plan:
    """Returns how a run is trained.

    Args:
      options: Of the run.
      out: Folder of the results.

    Raises:
      OptionError: The options make no run.
      DataError: The data is missing or damaged.
    """

  def workload(self, options: Any) -> Any:
    """Returns what is trained: the workload before, if only seed and rate differ.

    Args:
      options: Such that `plan` has accepted.
    """
    wanted = dataclasses.replace(options, seed=0, rate=None)
    if self._workload is None or self._workload[0] != wanted:
      self._workload = None  # frees the one before
      self._workload = (wanted, self._make_workload(options))
    return self._workload[1]

  @abc.abstractmethod
  def _make_workload(self, options: Any) -> Workload:
    """Makes what is trained; nothing is compiled yet."""


def check_options(options: Any, positive: tuple[str, ...]) -> None:
  """Checks the options that all suites have: numbers, seed and rate.

  Args:
    options: A dataclass.
    positive: Names of those that are at least 1, or None.

  Raises:
    OptionError: One is out of range, or the rate does not suit the optimizer.
  """
  for name in positive:
    value = getattr(options, name)
    if value is not None and value < 1:
      refuse(name, "must be at least 1", value)
  console.check_seed(options.seed)
  optimizer, rate = options.optimizer, options.rate
  takes_rate = METHODS[optimizer].takes_rate
  if takes_rate and (rate is None or not 0 < rate < float("inf")):
    refuse("rate", f"must be positive for --optimizer {optimizer}", rate)
  if not takes_rate and rate is not None:
    refuse("rate", f"must be left out for --optimizer {optimizer}", rate)


def select(
  preset: Preset, networks: tuple[str, ...], optimizers: tuple[str, ...]
) -> Preset:
  """Returns a part of a preset.

  Args:
    preset: The preset.
    networks: Networks to keep; empty for all.
    optimizers: Methods to keep; empty for all.

  Raises:
    OptionError: One that the preset does not hold.
  """
  known_networks = sorted({network_of(base) for base in preset.bases})
  for given, known in (
    (networks, known_networks),
    (optimizers, sorted(preset.optimizers)),
  ):
    unknown = set(given) - set(known)
    if unknown:
      raise OptionError(
        f"the preset has {', '.join(known)}; it does not have {sorted(unknown)}."
      )
  return preset._replace(
    bases=tuple(b for b in preset.bases if not networks or network_of(b) in networks),
    optimizers=tuple(n for n in preset.optimizers if not optimizers or n in optimizers),
  )


def network_of(options: Any) -> str:
  """Returns what tells the tables of a preset apart on the command line.

  Args:
    options: Of a run.
  """
  for name in ("network", "environment", "task"):
    if hasattr(options, name):
      return getattr(options, name)
  raise TypeError(f"{type(options).__name__} has no network, environment or task.")


def sweep(preset: Preset, suite: Suite, out: Path, display: Display) -> list[Record]:
  """Runs what is missing of a table.

  Args:
    preset: The table.
    suite: Where its runs are prepared.
    out: Folder of the results; runs that have ended there are not repeated.
    display: Where progress is shown.

  Returns:
    The summaries of all runs.

  Raises:
    DataError: The data is missing or damaged.
  """
  bases = preset.bases
  for base in bases:  # before hours of training, not after
    for name in preset.optimizers:
      rate = next(iter(preset.rates_of(name)), None)
      suite.check(dataclasses.replace(base, optimizer=name, rate=rate))
  if preset.without_data is not None:
    try:
      suite.find_data(bases[0])
    except DataError as error:
      display.say(f"{error}\nGoing on without it: {preset.without_data}.")
      bases = [dataclasses.replace(base, **preset.without_data) for base in bases]
  summaries: list[Record] = []

  def run(options: Any) -> Record:
    plan = suite.plan(options, out)
    summary = records.read_summary(plan.path)
    if summary is None:
      workload = suite.workload(options)
      # Damaged, a checkpoint would end this sweep each time at the same run.
      summary = training.train(workload, plan, display, restart=True)
    else:
      training.delete(plan.checkpoints)  # of a run killed at its very end
    summaries.append(summary)
    display.say(f"[{len(summaries)}/{total}] {console.describe(summary)}")
    return summary

  total = len(bases) * sum(_num_runs(preset, name) for name in preset.optimizers)
  for base in bases:
    for name in preset.optimizers:
      for options in _with_best_rate(preset, name, base, run):
        run(options)
  return summaries


def _num_runs(preset: Preset, name: str) -> int:
  rates, rate_seeds = preset.rates_of(name), preset.num_rate_seeds
  if not rates:
    return preset.num_seeds
  return len(rates) * rate_seeds + max(0, preset.num_seeds - rate_seeds)


def _with_best_rate(preset, name, base, run) -> Iterator[Any]:
  """Runs all rates, if there are any; yields what else is to run."""
  base = dataclasses.replace(base, optimizer=name)
  seeds = range(preset.num_seeds)
  if rates := preset.rates_of(name):
    losses = {}
    for rate in rates:
      ended = [
        run(dataclasses.replace(base, rate=rate, seed=seed))
        for seed in range(preset.num_rate_seeds)
      ]
      losses[rate] = mean_validation_loss(ended)
    base = dataclasses.replace(base, rate=min(losses, key=lambda rate: losses[rate]))
    seeds = seeds[preset.num_rate_seeds :]
  for seed in seeds:
    yield dataclasses.replace(base, seed=seed)


@dataclasses.dataclass(frozen=True)
class RunCommand(Generic[Options, Place]):
  """Train once with one method, and test it."""

  options: Annotated[Options, tyro.conf.arg(name="")]
  place: Annotated[Place, tyro.conf.arg(name="")]
  out: Path
  """Folder for the run's records and checkpoint."""
  resume: bool = False
  """Continue where a killed run left off; keep the results of one that has ended."""


@dataclasses.dataclass(frozen=True)
class SweepCommand(Generic[Place, PresetName]):
  """Train a whole table, or what is missing of it."""

  place: Annotated[Place, tyro.conf.arg(name="")]
  preset: PresetName
  """Which table; see PRESETS in the suite's file."""
  out: Path | None = None
  """Folder for records and checkpoints, by default out/ and the preset's name."""
  networks: tuple[str, ...] = ()
  """Only these networks of the preset, to run it in pieces."""
  optimizers: tuple[str, ...] = ()
  """Only these methods of the preset."""


def run_from(suite: type[Suite], arguments: Sequence[str], prog: str) -> None:
  """Trains once, as a command line says, and prints the outcome.

  Args:
    suite: The suite.
    arguments: The command line behind the suite's name.
    prog: What stands before them.
  """
  options: Any = suite.options
  place: Any = suite.place
  default = RunCommand(options(), place(), Path("out", suite.name))
  command = tyro.cli(
    RunCommand[options, place], default=default, args=arguments, prog=prog
  )
  made = suite(command.place)
  made.begin()
  with watch_hosts(), _writing_to(command.out), Display() as display:
    plan = made.plan(command.options, command.out)
    workload = made.workload(command.options)
    summary = training.train(workload, plan, display, resume=command.resume)
    display.say(console.describe(summary))
    display.say(f"records: {plan.path}")


def sweep_from(suite: type[Suite], arguments: Sequence[str], prog: str) -> None:
  """Trains what is missing of a table, as a command line says.

  Args:
    suite: The suite.
    arguments: The command line behind the suite's name.
    prog: What stands before them.
  """
  if suite.sweep_command is not None:
    tyro.cli(suite.sweep_command, args=arguments, prog=prog)()
    return
  names: Any = Literal[tuple(suite.presets)]
  place: Any = suite.place
  default = SweepCommand(place(), next(iter(suite.presets)))
  command = tyro.cli(
    SweepCommand[place, names], default=default, args=arguments, prog=prog
  )
  chosen = suite.presets[command.preset]
  preset = select(chosen, command.networks, command.optimizers)
  out = command.out or Path("out", suite.prefix + command.preset)
  made = suite(command.place)
  made.begin()
  with watch_hosts(), _writing_to(out), Display() as display:
    sweep(preset, made, out, display)


def _writing_to(out: Path) -> contextlib.AbstractContextManager[None]:
  return console.writing_to(out, writes=jax.process_index() == 0)
