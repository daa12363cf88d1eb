"""What all studies have in common: arms, where their runs come from, and the page."""

import abc
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import flax.linen as nn
import numpy as np
from scipy.stats import binomtest

from benchmarks import console, data, records, training
from benchmarks.console import Display, check_seeds, refuse
from benchmarks.data import DataError, Dataset, Split, Splits
from benchmarks.methods import Method
from benchmarks.models import build_model
from benchmarks.models.layers import Classifier
from benchmarks.records import RESULTS, Record, RecordError, Run
from benchmarks.training import Plan, Workload
from benchmarks.workloads.images import ImageData, ImageWorkload

CHANCE = 0.1  # accuracy; ten classes
# Losses of the two parts that a study measures, and what pictures call the parts.
LOSSES = {"train_loss": "train", "validation_loss": "held-out"}

Found = TypeVar("Found")


class Arm(NamedTuple):
  """One curve of a study.

  Attributes:
    name: Its name, unique within the study.
    method: Its optimizer; one compilation for arms with the same `compiled`.
    compiled: Name of the program; arms that differ only in rate share it.
    rate: What `method` takes as its rate: a number, or several.
    network: Network of `benchmarks.models`.
    width: Factor on its channels.
    norm: Its normalisation.
    num_heads: Number of heads, where `method` needs them.
    body: The network without its output layer, where `network`, then just its name, is
      not one of `benchmarks.models`.
    workload: What makes the workload, called like `ImageWorkload`.
  """

  name: str
  method: Method
  compiled: str
  rate: Any = None
  network: str = "small_cnn"
  width: float = 1.0
  norm: Any = "batch"
  num_heads: int = 10
  body: nn.Module | None = None
  workload: Callable[..., ImageWorkload] = ImageWorkload


# --- Where runs come from


class Source(abc.ABC):
  """Where the runs of a study come from.

  Attributes:
    study: Name of the study.
    used: What the numbers come from, each with ``environment`` and ``date``.
  """

  def __init__(self, study: str):
    """Keeps its argument.

    Args:
      study: Name of the study.
    """
    self.study = study
    self.used: list[Record] = []

  @abc.abstractmethod
  def run(self, runner: "Runner", arm: Arm, seed: int) -> Run:
    """Returns a run.

    Args:
      runner: What the run trains on.
      arm: Its arm.
      seed: Its seed.

    Raises:
      RecordError: There is no such run, or its file is damaged.
    """

  @abc.abstractmethod
  def cost(self, settings: Record, measure: Callable[[], Any]) -> list:
    """Returns the seconds of steps that have been timed.

    Args:
      settings: What they depend on.
      measure: Times them.

    Raises:
      RecordError: They have not been timed.
    """


class Archived(Source):
  """The runs of an archive; nothing is trained, and no data is loaded."""

  def __init__(self, study: str, results: Path):
    """Reads the archive.

    Args:
      study: Name of the study.
      results: Folder of the archives.

    Raises:
      RecordError: The archive is missing or damaged.
    """
    super().__init__(study)
    self._path = results / f"{study}.jsonl"
    self._runs: dict[tuple[str, int], list[Run]] = {}
    for run in records.load([self._path]):
      key = (run.config["arm"], run.config["seed"])
      self._runs.setdefault(key, []).append(run)

  def run(self, runner: "Runner", arm: Arm, seed: int) -> Run:
    """Returns a run, of equal options.

    Args:
      runner: What the run trains on.
      arm: Its arm.
      seed: Its seed.

    Raises:
      RecordError: The archive lacks it.
    """
    wanted = json.loads(json.dumps(runner.config(arm, seed)))
    for run in self._runs.get((arm.name, seed), ()):
      known = {k: v for k, v in run.config.items() if k not in runner.from_data}
      if known == wanted:
        self.used.append(run.summary)
        return run
    raise self._lacks(f"the run of {arm.name}, seed {seed}, with these options")

  def cost(self, settings: Record, measure: Callable[[], Any]) -> list:
    """Returns the seconds that the archive holds.

    Args:
      settings: What they depend on.
      measure: Not called.

    Raises:
      RecordError: The archive lacks them.
    """
    del measure
    for found in records.load_costs([self._path]):
      if found.get("settings") == settings:
        self.used.append(found)
        return found["seconds"]
    raise self._lacks(f"times of steps with {settings}")

  def _lacks(self, what: str) -> RecordError:
    return RecordError(
      f"{self._path} lacks {what}. `python -m benchmarks study {self.study}` trains "
      f"what is missing; `python -m benchmarks collect {self.study}` adds it."
    )


class Trained(Source):
  """The runs in a folder, where those that are missing are trained."""

  def __init__(self, study: str, out: Path, display: Display):
    """Keeps its arguments.

    Args:
      study: Name of the study.
      out: Folder of records and checkpoints.
      display: Where progress is shown.
    """
    super().__init__(study)
    self._out, self._display = out, display

  def run(self, runner: "Runner", arm: Arm, seed: int) -> Run:
    """Returns a run, trained if it has not ended before.

    Args:
      runner: What the run trains on.
      arm: Its arm.
      seed: Its seed.

    Raises:
      RecordError: Its file is damaged.
      DataError: There is no data to train on.
    """
    plan = runner.plan(arm, seed, self._out)
    if records.read_summary(plan.path) is None:
      # Damaged, a checkpoint would end the study each time at the same run.
      training.train(runner.workload(arm), plan, self._display, restart=True)
    else:
      training.delete(plan.checkpoints)  # of a run killed at its very end
    *epochs, summary = records.read(plan.path)
    self.used.append(summary)
    return Run(summary, epochs)

  def cost(self, settings: Record, measure: Callable[[], Any]) -> list:
    """Returns the seconds of steps, timed if they have not been before.

    Args:
      settings: What they depend on.
      measure: Times them.

    Raises:
      RecordError: The file of costs is damaged.
    """
    path = self._out / "costs.jsonl"
    kept = records.read(path) if path.exists() else []
    for found in kept:
      if found.get("settings") == settings:
        break
    else:
      found = {
        "kind": "cost",
        "study": self.study,
        "settings": settings,
        "seconds": measure(),
        **records.now(),
      }
      records.write(path, [*kept, found])
    self.used.append(found)
    return found["seconds"]


class Runner(abc.ABC):
  """Arms of a study, on what a subclass says.

  Attributes:
    suite: The kind of what is trained, as records name it.
    from_data: Options of records that are known only where the data is.
  """

  suite: ClassVar[str]
  from_data: ClassVar[tuple[str, ...]] = ("chance",)

  def __init__(self, source: Source, options: Any, posteriors_per_epoch: int = 10):
    """Keeps its arguments; no data is loaded yet.

    Args:
      source: Where the runs come from.
      options: A dataclass that says what to train on, with `epochs` and `check`.
      posteriors_per_epoch: As in `benchmarks.training.Plan`.

    Raises:
      OptionError: Options out of range.
    """
    options.check()
    self._source, self._options = source, options
    self._posteriors = posteriors_per_epoch
    self._workload: tuple[Any, Workload] | None = None

  def run(self, arms: Iterable[Arm], seeds: Sequence[int]) -> list[Run]:
    """Returns runs, by arm and seed; ``config["arm"]`` names the arm.

    Args:
      arms: The arms; put those that share a program side by side.
      seeds: Seeds of each.

    Raises:
      RecordError: A run is missing from an archive, or a file is damaged.
      DataError: There is no data to train on.
    """
    return [self._source.run(self, arm, seed) for arm in arms for seed in seeds]

  def config(self, arm: Arm, seed: int) -> Record:
    """Returns the options that determine a run, but for what only the data tells.

    Args:
      arm: The arm.
      seed: The seed.
    """
    return {
      "study": self._source.study,
      "suite": self.suite,
      "arm": arm.name,
      "rate": arm.rate,
      "num_heads": arm.num_heads if arm.method.has_heads else None,
      "seed": seed,
      **self._describe(arm),
    }

  def plan(self, arm: Arm, seed: int, out: Path) -> Plan:
    """Returns how a run is trained.

    Args:
      arm: The arm.
      seed: The seed.
      out: Folder of records and checkpoints.
    """
    found, chance = self._find_in_data()
    config = {**self.config(arm, seed), **found}
    epochs = self._options.epochs
    return Plan(
      name=run_name(config),
      config={**config, "chance": chance},
      out=out,
      seed=seed,
      rate=arm.rate,
      max_epochs=epochs,
      patience=epochs + 1,
      posteriors_per_epoch=self._posteriors,
    )

  def workload(self, arm: Arm) -> Any:
    """Returns an arm's workload, the one before where it is shared.

    Args:
      arm: The arm.
    """
    names = ("compiled", "network", "width", "norm", "num_heads", "body", "workload")
    wanted = tuple(getattr(arm, name) for name in names)
    if self._workload is None or self._workload[0] != wanted:
      self._workload = None  # frees the one before
      self._workload = (wanted, self._make_workload(arm))
    return self._workload[1]

  @abc.abstractmethod
  def _describe(self, arm: Arm) -> Record:
    """What determines a run beside method and seed, as far as options tell."""

  @abc.abstractmethod
  def _find_in_data(self) -> tuple[Record, float]:
    """What else determines it, and its score by chance."""

  @abc.abstractmethod
  def _make_workload(self, arm: Arm) -> Workload:
    """Makes what is trained; nothing is compiled yet."""


def run_name(config: Record) -> str:
  """Returns the name of a run, which no run of other options has.

  Args:
    config: All that determines it, hence without ``chance``.
  """
  digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
  return f"{config['arm']}-s{config['seed']}-{digest[:8]}"


# --- Arms on images


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


class ImageRunner(Runner):
  """Arms of a study, on images."""

  suite = "cifar10"

  def __init__(
    self,
    source: Source,
    images: Images,
    posteriors_per_epoch: int = 10,
    *,
    halve: bool = False,
  ):
    """Keeps its arguments; no data is loaded yet.

    Args:
      source: Where the runs come from.
      images: What to train on.
      posteriors_per_epoch: As in `benchmarks.training.Plan`.
      halve: Whether every second of the held-out images stands in for a test image, to
        score what the others have chosen. Otherwise all of them do.

    Raises:
      OptionError: Options out of range.
    """
    super().__init__(source, images, posteriors_per_epoch)
    self._halved = halve
    self._loaded: tuple[Dataset, ImageData] | None = None

  def load(self) -> tuple[Dataset, ImageData]:
    """Returns the data set, and its parts on the device, loaded once.

    Raises:
      DataError: The data is missing, damaged, or not enough.
    """
    if self._loaded is None:
      images: Images = self._options
      found = data.load(images.dataset, images.data_dir)
      try:
        splits = found.split(images.num_train, images.num_held_out)
      except ValueError as error:
        raise DataError(f"{images.dataset}: {error}") from error
      if self._halved:
        splits = Splits(splits.train, *_halves(splits.validation))
      else:
        splits = splits._replace(test=splits.validation)
      self._loaded = found, ImageData(splits)
    return self._loaded

  def _describe(self, arm: Arm) -> Record:
    config = {
      "network": arm.network,
      "width": arm.width,
      "norm": arm.norm,
      **dataclasses.asdict(self._options),
    }
    del config["data_dir"]
    return {**config, "halved": True} if self._halved else config

  def _find_in_data(self) -> tuple[Record, float]:
    return {}, CHANCE

  def _make_workload(self, arm: Arm) -> ImageWorkload:
    found, images = self.load()
    num_heads = arm.num_heads if arm.method.has_heads else None
    if arm.body is None:
      model = build_model(
        arm.network, num_heads=num_heads, width=arm.width, norm=arm.norm
      )
    else:
      model = Classifier(arm.body, num_heads=num_heads)
    return arm.workload(
      model,
      arm.method,
      images,
      batch_size=self._options.batch_size,
      max_epochs=self._options.epochs,
      flip=found.can_flip,
      any_rate=arm.rate,
    )


def _halves(part: Split) -> list[Split]:
  # Every second one, for neighbours are alike: the digits lie in order of writers.
  return [Split(part.images[i::2], part.labels[i::2]) for i in range(2)]


# --- What comes of runs


def by_arm(runs: Iterable[Run]) -> dict[str, list[Run]]:
  """Returns runs by the name of their arm, in order.

  Args:
    runs: The runs.
  """
  found: dict[str, list[Run]] = {}
  for run in runs:
    found.setdefault(run.config["arm"], []).append(run)
  return found


def final_accuracy(run: Run) -> float:
  """Returns the accuracy on the held-out images after the last epoch.

  Args:
    run: A run; one that failed is at chance.
  """
  return run.config["chance"] if run.failed else run.epochs[-1]["validation_accuracy"]


def final_losses(run: Run) -> list[float]:
  """Returns train and held-out loss of the last epoch; nan for a run that failed.

  Args:
    run: A run.
  """
  return [np.nan if run.failed else float(run.curve(name)[-1]) for name in LOSSES]


def curves(runs: Sequence[Run], name: str) -> np.ndarray:
  """Returns what runs have recorded by epoch, (runs, epochs); nan where not finite.

  Args:
    runs: The runs, of equal length.
    name: What to return, as the records call it.
  """
  return np.stack([run.curve(name) for run in runs])


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


# --- The study


class Study(abc.ABC, Generic[Found]):
  """A study, whose options are the fields of its subclass, a frozen dataclass.

  Attributes:
    name: Its name on the command line, and of its archive.
    images: What it trains on; a study without them overrides `trained_on`.
    seeds: Number of runs of each arm.
    out: Folder for records, numbers and picture.
  """

  name: ClassVar[str]
  images: Images
  seeds: int
  out: Path

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: Options out of range, such as too few seeds.
    """
    check_seeds(self.seeds, at_least=2)  # for a spread

  @abc.abstractmethod
  def find(self, source: Source) -> Found:
    """Returns what table and picture show.

    Args:
      source: Where all runs come from.

    Raises:
      RecordError: A run is missing.
    """

  @abc.abstractmethod
  def table(self, found: Found) -> list[str]:
    """Returns the numbers, as lines of Markdown.

    Args:
      found: What `find` returned.
    """

  @abc.abstractmethod
  def draw(self, found: Found, path: Path) -> None:
    """Draws the picture.

    Args:
      found: What `find` returned.
      path: The PNG file.
    """

  @property
  def trained_on(self) -> str:
    """What the runs train on."""
    return self.images.describe()

  @property
  def spread(self) -> str:
    """How many runs there are, and how they are summed up."""
    return (
      f"{self.seeds} seeds; ± is the standard deviation over them. Runs that failed "
      "count as at chance."
    )

  def derive(self, results: Path = RESULTS) -> list[str]:
    """Returns the page of an archive, as lines of Markdown; nothing is trained.

    Args:
      results: Folder of the archives.

    Raises:
      RecordError: The archive is damaged, or lacks a run.
    """
    source = Archived(self.name, results)
    found = self.find(source)  # before the page, which tells what was used
    return self._page(source, found)

  def picture(self, results: Path, path: Path) -> None:
    """Draws the picture of an archive; nothing is trained.

    Args:
      results: Folder of the archives.
      path: The PNG file.

    Raises:
      RecordError: The archive is damaged, or lacks a run.
    """
    self.draw(self.find(Archived(self.name, results)), path)

  def __call__(self) -> None:
    """Trains what is missing; writes picture and numbers, and prints these.

    Raises:
      OptionError: Options out of range.
      OutputError: The folder can't be written.
    """
    self.check()
    path = self.out / f"{self.name}.md"
    with console.writing_to(self.out):
      with Display() as display:
        source = Trained(self.name, self.out, display)
        found = self.find(source)
      self.draw(found, path.with_suffix(".png"))
      text = "\n".join([f"# {self.name}", "", *self._page(source, found)]) + "\n"
      records.write_text(path, text)
    print(f"\n{text}\n{path}\n{path.with_suffix('.png')}")

  def _page(self, source: Source, found: Found) -> list[str]:
    """The numbers, what they were measured on, and the command that makes them."""
    return [
      *self.table(found),
      "",
      f"{self.trained_on}; {self.spread}",
      "",
      f"`python -m benchmarks study {self.name}`; "
      + records.conditions_of_all(source.used),
    ]
