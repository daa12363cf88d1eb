"""Tables of runs: their rows, what the papers have there, and their Markdown."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.methods import METHODS
from benchmarks.records import Record, Run

MISSING = "–"  # a cell without records
# Options that tell one row of a table from another.
ROW_OPTIONS = ("optimizer", "rate", "num_heads")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  """Returns the lines of a Markdown table.

  Args:
    header: Names of the columns.
    rows: Cells of each row.

  Example:
    >>> markdown(["a", "b"], [["1", "2"]])
    ['| a | b |', '| --- | --- |', '| 1 | 2 |']
  """
  lines = [header, ["---"] * len(header), *rows]
  return ["| " + " | ".join(line) + " |" for line in lines]


def spread(
  values: Sequence[float] | np.ndarray, digits: int, scale: float = 1.0
) -> str:
  """Returns mean and standard deviation; the mean alone of a single value.

  Args:
    values: At least one.
    digits: Number of decimals.
    scale: What the values are multiplied by.

  Example:
    >>> spread([0.1, 0.3], 1, scale=100)
    '20.0 ± 14.1'
  """
  scaled = scale * np.array(values)
  text = f"{scaled.mean():.{digits}f}"
  if len(values) == 1:
    return text
  return f"{text} ± {scaled.std(ddof=1):.{digits}f}"


# --- The papers' figures
#
# From *Learning with Random Learning Rates*, arXiv 1810.01322, both versions: test
# results (at width 1; for CIFAR-10 as the authors' project page gives them), and the
# numbers of parameters.


class Figure(NamedTuple):
  """A result of the papers.

  Attributes:
    mean: The mean over runs.
    sd: The standard deviation; None where the papers give none.
  """

  mean: float
  sd: float | None = None


# By name of the measure.
Figures = dict[str, Figure]


def _images(loss: float, loss_sd: float, accuracy: float, sd: float) -> Figures:
  """Figures of CIFAR-10; the papers give accuracies in percent."""
  return {
    "loss": Figure(loss, loss_sd),
    "accuracy": Figure(accuracy / 100, sd / 100),
  }


def _text(bits: float, accuracy: float) -> Figures:
  """Figures of Penn Treebank; the papers give accuracies in percent."""
  return {"bits": Figure(bits), "accuracy": Figure(accuracy / 100)}


# By data set, the options in `TableKind.papers_key`, and optimizer; SGD is at its best
# rate.
PAPERS = {
  ("cifar10", "mobilenet_v2", "sgd"): _images(0.37, 0.01, 90.2, 0.3),
  ("cifar10", "mobilenet_v2", "adam"): _images(1.01, 0.95, 78.0, 11.0),
  ("cifar10", "mobilenet_v2", "alrao"): _images(0.42, 0.02, 88.1, 0.6),
  ("cifar10", "googlenet", "sgd"): _images(0.45, 0.05, 89.6, 1.0),
  ("cifar10", "googlenet", "adam"): _images(0.47, 0.04, 89.8, 0.4),
  ("cifar10", "googlenet", "alrao"): _images(0.47, 0.03, 88.9, 0.8),
  ("cifar10", "vgg19", "sgd"): _images(0.42, 0.02, 89.5, 0.2),
  ("cifar10", "vgg19", "adam"): _images(0.43, 0.02, 88.9, 0.4),
  ("cifar10", "vgg19", "alrao"): _images(0.45, 0.03, 87.5, 0.4),
  ("ptb", "characters", "lstm", "sgd"): _text(1.566, 66.1),
  ("ptb", "characters", "lstm", "adam"): _text(1.587, 65.6),
  ("ptb", "characters", "lstm", "alrao_fast"): _text(1.67, 64.1),
  ("ptb", "characters", "lstm", "alrao"): _text(1.706, 63.4),
  ("gymnasium", "pendulum", "sgd"): {"return": Figure(-372)},
  ("gymnasium", "pendulum", "adam"): {"return": Figure(-414)},
  ("gymnasium", "pendulum", "alrao"): {"return": Figure(-371)},
  ("gymnasium", "lunar_lander", "sgd"): {"return": Figure(188)},
  ("gymnasium", "lunar_lander", "adam"): {"return": Figure(155)},
  ("gymnasium", "lunar_lander", "alrao"): {"return": Figure(186)},
}

# Numbers of parameters at width 1, with an ordinary output layer and with 10 heads.
PAPERS_PARAMETERS = {
  "googlenet": (6_166_250, 6_258_500),
  "vgg19": (20_040_522, 20_086_692),
  "mobilenet_v2": (2_296_922, 2_412_212),
}


# --- Kinds of tables, tables, rows


class Measure(NamedTuple):
  """A column of results.

  Attributes:
    name: Its name in the records, behind ``test_`` and ``validation_``.
    label: Its name in tables.
    scale: What its values are multiplied by.
    digits: Number of decimals.
    higher_is_better: Whether it is a gain rather than a loss.
  """

  name: str
  label: str
  scale: float = 1.0
  digits: int = 3
  higher_is_better: bool = False


LOSS = Measure("loss", "loss")
ACCURACY = Measure("accuracy", "accuracy, %", 100.0, 2, True)
BITS = Measure("bits", "bits a symbol")
RETURN = Measure("return", "return", 1.0, 1, True)


class TableKind(NamedTuple):
  """How a suite's tables look.

  Attributes:
    title: The suite's name.
    measures: The columns.
    score: The measure by which methods are compared.
    curve: The measure whose course is drawn.
    curve_limit: The value beyond which a curve is cut off, in multiples of the loss of
      a guess; None: nowhere.
    table_options: Options that tell one table from another.
    size_options: Options that tell one size of experiment from another.
    size: What a size's title says of it, a format of its options.
    papers_key: Options that tell which of the papers' figures belong next to a run.
    not_real: What is said in bold of results that are not on the papers' data.
    note: What else a reader must know.
    train_curves: Whether training's curves are drawn too, and all rates told apart.
  """

  title: str
  measures: tuple[Measure, ...]
  score: Measure
  curve: Measure
  curve_limit: float | None
  table_options: tuple[str, ...]
  size_options: tuple[str, ...]
  size: str
  papers_key: tuple[str, ...]
  not_real: str
  note: str = ""
  train_curves: bool = False

  def table_title(self, config: Record) -> str:
    """Returns a table's title.

    Args:
      config: The options of one of its runs.
    """
    network, *rest = self.table_options
    words = [str(config[network])]
    for name in rest:
      value = config[name]
      if name == "norm":
        words += ["no normalisation"] if value == "none" else []
      else:
        words.append(f"{name} {value:g}" if isinstance(value, float) else f"{value}")
    return ", ".join(words)

  def papers(self, config: Record) -> Figures | None:
    """Returns the papers' figures for what a run trains, if they have any.

    Args:
      config: The run's options.
    """
    names = ("dataset", *self.papers_key, "optimizer")
    return PAPERS.get(tuple(config[name] for name in names))

  def score_of(self, run: Run) -> float:
    """Returns a run's test score; that of chance for a run with nothing to test.

    Args:
      run: The run.
    """
    found = run.summary[f"test_{self.score.name}"]
    return run.config["chance"] if found is None else found


@dataclasses.dataclass(frozen=True)
class Row:
  """The runs of one optimizer at one rate, all seeds.

  Attributes:
    kind: How its table looks.
    optimizer: Its name.
    rate: Its learning rate, if it takes one.
    num_heads: Number of Alrao's heads, if it has any.
    runs: The runs.
  """

  kind: TableKind
  optimizer: str
  rate: float | None
  num_heads: int | None
  runs: list[Run]

  @property
  def scores(self) -> list[float]:
    """Test score of each run."""
    return [self.kind.score_of(run) for run in self.runs]

  @property
  def mean_score(self) -> float:
    """Mean test score."""
    return float(np.mean(self.scores))  # `sum` differs between versions of Python

  @property
  def label(self) -> str:
    """Name for tables and pictures."""
    rate = "" if self.rate is None else f" {self.rate:g}"
    heads = "" if self.num_heads in (None, 10) else f", {self.num_heads} heads"
    return _label(self.optimizer) + rate + heads


@dataclasses.dataclass(frozen=True)
class Table:
  """All runs of one network at one size of experiment.

  Attributes:
    kind: How it looks.
    title: Which network.
    rows: By optimizer and rate.
  """

  kind: TableKind
  title: str
  rows: list[Row]

  @property
  def sgd(self) -> list[Row]:
    """The rows of SGD, by rate."""
    return [row for row in self.rows if row.optimizer == "sgd"]

  @property
  def best_sgd(self) -> Row | None:
    """SGD at the rate of least validation loss, over the seeds that all rates have."""
    seeds = [{run.config["seed"] for run in row.runs} for row in self.sgd]
    common = set.intersection(*seeds) if seeds else set()

    def loss(row: Row) -> float:
      runs = [run.summary for run in row.runs if run.config["seed"] in common]
      return mean_validation_loss(runs or [run.summary for run in row.runs])

    return min(self.sgd, key=loss, default=None)

  @property
  def alrao(self) -> Row | None:
    """Alrao's row."""
    return self.row("alrao")

  def row(self, optimizer: str) -> Row | None:
    """Returns the first row of an optimizer, if there is one.

    Args:
      optimizer: Its name.
    """
    return next((row for row in self.rows if row.optimizer == optimizer), None)

  def lead(self, one: float, other: float) -> float:
    """Returns by how much one score is better than another.

    Args:
      one: A score.
      other: Another.
    """
    return one - other if self.kind.score.higher_is_better else other - one

  def has_learned(self, score: float) -> bool:
    """Whether a score lies above chance by more than half of what best SGD's does.

    Args:
      score: The score, in a table with SGD.

    Raises:
      ValueError: There is no SGD to compare with.
    """
    best = self.best_sgd
    if best is None:
      raise ValueError(f"no run of SGD tells what learning means for {self.title}.")
    chance = best.runs[0].config["chance"]
    margin = max(0.0, self.lead(best.mean_score, chance))
    return self.lead(score, chance) > margin / 2


def mean_validation_loss(summaries: Sequence[Record]) -> float:
  """Returns what the best rate is chosen by: inf if any run has no finite loss.

  Args:
    summaries: Of runs of one rate.
  """
  losses = [summary["validation_loss"] for summary in summaries]
  return math.inf if None in losses else float(np.mean(losses))


def by_size(runs: Iterable[Run], kinds: Mapping[str, TableKind]) -> list[list[Table]]:
  """Returns tables, those of one size of experiment together, in order of the kinds.

  Args:
    runs: The runs.
    kinds: The suites' kinds of tables, by name of the suite.
  """
  order = list(kinds)
  sizes: dict[tuple, dict[tuple, dict[tuple, list[Run]]]] = {}
  for run in sorted(runs, key=lambda run: order.index(run.config["suite"])):
    kind = kinds[run.config["suite"]]
    size, table, row = (
      tuple(run.config[name] for name in names)
      for names in (kind.size_options, kind.table_options, ROW_OPTIONS)
    )
    size = (run.config["suite"], *size)
    sizes.setdefault(size, {}).setdefault(table, {}).setdefault(row, []).append(run)
  return [
    [_table(kinds[size[0]], rows) for _, rows in sorted(tables.items())]
    for size, tables in sizes.items()
  ]


def _table(kind: TableKind, runs: dict[tuple, list[Run]]) -> Table:
  """Rows in the order of `METHODS`, then of their rates."""
  order = list(METHODS)

  def place(row: Row) -> tuple:
    known = row.optimizer in order
    at = order.index(row.optimizer) if known else len(order)
    return (at, row.optimizer, row.rate or 0)

  rows = [
    Row(kind, optimizer, rate, num_heads, found)
    for (optimizer, rate, num_heads), found in runs.items()
  ]
  rows.sort(key=place)
  return Table(kind, kind.table_title(rows[0].runs[0].config), rows)


def _label(optimizer: str) -> str:
  # An optimizer that is gone has records all the same.
  return METHODS[optimizer].label if optimizer in METHODS else optimizer


# --- The suites' tables

HOW_TO_READ = """\
Each run is tested once, at its epoch of least validation loss; Alrao has the posterior
of that epoch. ± is the standard deviation over seeds. The validation loss chooses the
best SGD rate; the test part has no say in it.

A run has **learned** if its test score (for images, the accuracy) is better than chance
by more than half of what the best SGD rate's mean is better by. A run fails if a loss
is not finite. It is tested at its best epoch before that, if there is one. If there is
none, it counts as a score of chance and is left out of the means of other measures.
*Alrao ahead by* is Alrao's mean score minus the row's: it is negative where Alrao falls
behind. The papers' columns are for the papers' own network and training, whatever the
size of ours.
"""


def suite_tables(runs: Sequence[Run], kinds: Mapping[str, TableKind]) -> list[str]:
  """Returns the Markdown of all tables, with numbers of parameters and sources.

  Args:
    runs: The runs, of any of the suites.
    kinds: The suites' kinds of tables, by name of the suite.
  """
  lines: list[str] = []
  for number, tables in enumerate(by_size(runs, kinds), 1):
    found = [run for table in tables for row in table.rows for run in row.runs]
    kind, config = tables[0].kind, found[0].config
    lines += [f"## {number}. {kind.title}: {kind.size.format(**config)}", ""]
    lines += _conditions(kind, found)
    for table in tables:
      lines += [f"### {table.title}", "", *table_lines(table), ""]
      lines += [*_findings(table), ""]
  lines += ["## Parameters", "", *_parameters(runs, kinds), ""]
  return [*lines, "## Optimizers", "", *_sources(runs)]


def table_lines(table: Table) -> list[str]:
  """Returns one table's Markdown, with the papers' figures where they have any.

  Args:
    table: The table.
  """
  best, alrao, kind = table.best_sgd, table.alrao, table.kind
  with_papers = any(_papers(row, best) for row in table.rows)
  header = ["method", "runs", "learned"]
  header += [f"test {measure.label}" for measure in kind.measures]
  header += ["Alrao ahead by"]
  if with_papers:
    header += [f"papers' {measure.label}" for measure in kind.measures]
    header += ["papers' Alrao ahead by"]
  ours = [row for row in table.rows if row.optimizer != "sgd" or row is best]
  rest = [row for row in table.sgd if row is not best]
  rows = []
  for row in ours + rest:
    ahead = None
    if alrao is not None and row is not alrao:
      ahead = table.lead(alrao.mean_score, row.mean_score)
    cells = [
      f"**{row.label}, best rate**" if row is best else row.label,
      str(len(row.runs)),
      _num_learned(table, row),
      *(measured(row, measure) for measure in kind.measures),
      signed(ahead, kind),
    ]
    if with_papers:
      cells += _papers_cells(table, row)
    rows.append(cells)
  return markdown(header, rows)


def measured(row: Row, measure: Measure) -> str:
  """Returns a row's cell of a test measure: mean and standard deviation.

  Args:
    row: The row.
    measure: One of its kind's measures.
  """
  if measure == row.kind.score:
    return spread(row.scores, measure.digits, measure.scale)
  values = [run.summary[f"test_{measure.name}"] for run in row.runs]
  values = [value for value in values if value is not None]
  return spread(values, measure.digits, measure.scale) if values else "none"


def signed(lead: float | None, kind: TableKind, fewer_digits: int = 0) -> str:
  """Returns by how much Alrao is ahead, with its sign; empty for Alrao itself.

  Args:
    lead: What `Table.lead` returned.
    kind: The table's kind.
    fewer_digits: How many decimals to leave out.
  """
  if lead is None:
    return ""
  return f"{kind.score.scale * lead:+.{kind.score.digits - fewer_digits}f}"


def _conditions(kind: TableKind, runs: list[Run]) -> list[str]:
  config = runs[0].config
  seen = {
    name: sorted({str(run.summary["environment"].get(name))[:12] for run in runs})
    for name in ("device", "cores", "jax", "flax", "optax", "alrao_jax", "commit")
  }
  seen["date"] = sorted({run.summary["date"] for run in runs})
  options = ", ".join(f"{name} {config[name]}" for name in kind.size_options)
  versions = "; ".join(f"{name} {', '.join(values)}" for name, values in seen.items())
  hit = sum(run.summary["ending"] == "maximum" for run in runs)
  lines = [
    f"{len(runs)} runs, {hit} of which hit the maximum of epochs.",
    "",
    f"Options: {options}.",
  ]
  if kind.note:
    lines += ["", kind.note]
  damaged = {name for run in runs for name in run.summary.get("skipped", ())}
  if damaged:
    count = sum(bool(run.summary.get("skipped")) for run in runs)
    lines += ["", f"{count} runs left out damaged images, {len(damaged)} in all."]
  if not config["real_data"]:
    lines += [
      "",
      f"**{kind.not_real}**: this shows the pipeline, not the papers' result.",
    ]
  return [*lines, "", f"On: {versions}.", ""]


def _papers(row: Row, best: Row | None) -> Figures | None:
  if row.optimizer == "sgd" and row is not best:
    return None
  return row.kind.papers(row.runs[0].config)


def _papers_cells(table: Table, row: Row) -> list[str]:
  kind, found = table.kind, _papers(row, table.best_sgd)
  if found is None:
    return [""] * (len(kind.measures) + 1)
  cells = []
  for measure in kind.measures:
    mean, sd = found[measure.name]
    # As many digits as the papers have.
    text = f"{measure.scale * mean:.{measure.digits - 1}f}"
    cells.append(
      text if sd is None else f"{text} ± {measure.scale * sd:.{measure.digits - 1}f}"
    )
  alrao = None if table.alrao is None else _papers(table.alrao, None)
  if alrao is None or row.optimizer == "alrao":
    return [*cells, ""]
  score = kind.score.name
  return [*cells, signed(table.lead(alrao[score].mean, found[score].mean), kind, 1)]


def _findings(table: Table) -> list[str]:
  best, alrao = table.best_sgd, table.alrao
  lines = []
  if best is not None:
    learn = sum(table.has_learned(row.mean_score) for row in table.sgd)
    lines.append(f"- {learn} of {len(table.sgd)} SGD rates learn.")
  if alrao is not None and best is not None:
    beat = sum(table.lead(row.mean_score, alrao.mean_score) > 0 for row in table.sgd)
    lines[-1] += f" {beat} of {len(table.sgd)} beat Alrao."
    sweep = sum(row.runs[0].summary["epochs"] for row in table.sgd)
    one = float(np.median([run.summary["epochs"] for run in alrao.runs]))
    lines.append(
      f"- One run of Alrao took {one:g} epochs; one of each SGD rate, {sweep}."
    )
  if alrao is not None:
    ahead_of = [
      row.label
      for row in table.rows
      if row.optimizer not in ("alrao", "sgd") or row is best
      if table.lead(row.mean_score, alrao.mean_score) > 0
    ]
    ahead_of = "; ".join(ahead_of) or "none"
    lines.append(f"- Methods with a better mean score than Alrao's: {ahead_of}.")

  def counted(holds: Callable[[Run], bool]) -> str:
    counts = ((row, sum(map(holds, row.runs))) for row in table.rows)
    return "; ".join(
      f"{row.label} ({count} of {len(row.runs)})" for row, count in counts if count
    )

  def went_on(run: Run) -> bool:
    return any(e["nonfinite_steps"] for e in run.epochs) and not run.failed

  failed = counted(lambda run: run.failed) or "none"
  lines.append(f"- Failed with a loss that was not finite: {failed}.")
  if survivors := counted(went_on):
    lines.append(f"- Trained on after such losses: {survivors}.")
  return lines


def _parameters(runs: Sequence[Run], kinds: Mapping[str, TableKind]) -> list[str]:
  counts: dict[tuple, dict[int | None, int]] = {}  # by number of heads
  for run in runs:
    title = kinds[run.config["suite"]].table_title(run.config)
    known = PAPERS_PARAMETERS.get(title.removesuffix(", width 1"), (0, 0))
    ours = counts.setdefault((title, *known), {})
    ours[run.config["num_heads"]] = run.summary["num_parameters"]
  header = ["network", "ordinary", "with heads (how many)"]
  header += ["papers: ordinary", "papers: 10 heads"]
  rows = []
  for (title, *known), ours in sorted(counts.items(), key=lambda item: item[0]):
    ordinary = ours.pop(None, None)
    with_heads = ", ".join(f"{count:,} ({n})" for n, count in sorted(ours.items()))
    cells = [f"{count:,}" if count else "" for count in (ordinary, *known)]
    cells.insert(1, with_heads)
    rows.append([title, *cells])
  return markdown(header, rows)


def _sources(runs: Iterable[Run]) -> list[str]:
  used = {run.config["optimizer"] for run in runs}
  return [
    f"- **{method.label}**: {method.source}"
    for name, method in METHODS.items()
    if name in used
  ]


def _num_learned(table: Table, row: Row) -> str:
  if table.best_sgd is None:
    return ""
  return str(sum(table.has_learned(score) for score in row.scores))
