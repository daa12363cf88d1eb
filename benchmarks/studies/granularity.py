"""Figure 6 of the papers: rates by unit against rates by weight, on an LSTM.

Reference: Blier, Wolinski, Ollivier, arXiv 1810.01322, appendix E.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from benchmarks import pictures
from benchmarks.console import OptionError, refuse
from benchmarks.data.text_files import Text, load_text
from benchmarks.methods import upper
from benchmarks.models.language import build_language_model
from benchmarks.records import Record
from benchmarks.studies._study import LOSSES, Arm, Runner, Source, Study
from benchmarks.tables import markdown, spread
from benchmarks.workloads.text import TextWorkload

NETWORKS = ("lstm", "decoder")
GRANULARITIES: dict[Literal["per_unit", "per_weight"], str] = {
  "per_unit": "a rate for each unit",
  "per_weight": "a rate for each weight",
}
Bits = dict[tuple[str, float, str], np.ndarray]  # by granularity, bound and loss


@dataclasses.dataclass(frozen=True)
class Texts:
  """On which text a study trains, by characters, and for how long."""

  share: float = 0.1
  """Share of the training text, from its start."""
  num_held_out: int = 50_000
  """Number of characters of the validation text on which every epoch is measured. The
  test text has no part in a study."""
  epochs: int = 1
  """Number of epochs."""
  batch_size: int = 20
  """Number of streams that a text is read as."""
  length: int = 70
  """Characters of each stream in a step."""
  data_dir: Path | None = None
  """Folder below which Penn Treebank lies."""
  files: tuple[Path, ...] = ()
  """Another text: one file, the last fifth of which is not trained on, or three:
  training, validation and test text."""

  def check(self) -> None:
    """Checks what can be without the data.

    Raises:
      OptionError: Options out of range.
    """
    for name in ("epochs", "batch_size", "length"):
      if getattr(self, name) < 1:
        refuse(name, "must be at least 1", getattr(self, name))
    if self.num_held_out < 2:
      refuse("num_held_out", "must be at least 2", self.num_held_out)
    if not 0 < self.share <= 1:
      refuse("share", "must be in (0, 1]", self.share)

  def describe(self) -> str:
    """Returns what it is, for the page of numbers."""
    name = self.files[0].name if self.files else "Penn Treebank"
    return (
      f"{name} by characters, {100 * self.share:g} % of the training text and "
      f"{self.num_held_out:,} held-out characters, {self.epochs} epoch"
      f"{'s' * (self.epochs > 1)}, {self.batch_size} streams of {self.length} a step"
    )


class TextRunner(Runner):
  """Arms of a study, language models, on text."""

  suite = "ptb"
  from_data = ("chance", "text", "num_train", "vocabulary_size")

  def __init__(self, source: Source, texts: Texts):
    """Keeps its arguments; no text is loaded yet.

    Args:
      source: Where the runs come from.
      texts: What to train on.

    Raises:
      OptionError: Options out of range.
    """
    super().__init__(source, texts)
    self._loaded: Text | None = None

  def load(self) -> Text:
    """Returns the text, loaded once, of which what scores is held out too.

    Raises:
      DataError: The text is missing or damaged.
      OptionError: It is too short.
    """
    if self._loaded is None:
      texts: Texts = self._options
      whole = load_text("characters", texts.data_dir, files=texts.files)
      train = whole.train[: round(texts.share * len(whole.train))]
      held_out = whole.validation[: texts.num_held_out]
      if len(held_out) < texts.num_held_out:
        rule = f"must be at most {len(held_out):,}, the text's validation characters"
        refuse("num_held_out", rule, texts.num_held_out)
      if not self._steps(len(train)):
        raise OptionError(
          "--batch-size times --length must be less than the "
          f"{len(train):,} characters of training text, got {texts.batch_size} * "
          f"{texts.length}."
        )
      self._loaded = dataclasses.replace(
        whole, train=train, validation=held_out, test=held_out
      )
    return self._loaded

  def _steps(self, num_train: int) -> int:
    """Steps of an epoch."""
    return (num_train - 1) // self._options.batch_size // self._options.length

  def _describe(self, arm: Arm) -> Record:
    config = {**dataclasses.asdict(self._options), "network": arm.network}
    del config["data_dir"], config["files"]
    return config

  def _find_in_data(self) -> tuple[Record, float]:
    text = self.load()
    found = {
      "text": text.name,
      "num_train": len(text.train),
      "vocabulary_size": len(text.vocabulary),
    }
    return found, math.log2(len(text.vocabulary))

  def _make_workload(self, arm: Arm) -> TextWorkload:
    options, text = self._options, self.load()
    network: Any = arm.network
    if network not in NETWORKS:
      raise ValueError(
        f"Arm(network=...) must be one of {', '.join(NETWORKS)} for a TextRunner, got "
        f"{network!r}."
      )
    for name in ("width", "norm", "body", "workload"):
      value, only = getattr(arm, name), Arm._field_defaults[name]
      if value != only:
        raise ValueError(
          f"Arm({name}=...) must be left at {only!r} for a TextRunner, whose networks "
          f"have no other, got {value!r}."
        )
    model = build_language_model(
      network,
      len(text.vocabulary),
      context=options.length,
      num_heads=arm.num_heads if arm.method.has_heads else None,
      dropout=0.2,  # the papers'
    )
    return TextWorkload(
      model,
      arm.method,
      text,
      batch_size=options.batch_size,
      length=options.length,
      epoch_steps=self._steps(len(text.train)),
      max_epochs=options.epochs,
      num_validation=options.num_held_out,
      num_test=options.num_held_out,
    )


@dataclasses.dataclass(frozen=True)
class GranularityStudy(Study[Bits]):
  """Loss against the upper bound of the interval, with rates by unit and by weight."""

  name = "granularity"
  texts: Annotated[Texts, tyro.conf.arg(name="")] = Texts()
  seeds: int = 3
  """Number of runs of each."""
  min_learning_rate: float = 1e-3
  """Lower bound of all intervals; the papers' for this text."""
  max_learning_rates: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1000.0)
  """Upper bounds."""
  num_heads: int = 6
  """Number of heads; the papers' for this text."""
  out: Path = Path("out/studies/granularity")
  """Folder for records, numbers and picture."""

  @property
  def trained_on(self) -> str:
    """What the runs train on."""
    return self.texts.describe()

  @property
  def spread(self) -> str:
    """How many runs there are, and how they are summed up."""
    return f"{self.seeds} seeds; ± is the standard deviation over them."

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: Bounds that make no interval, or no heads.
    """
    super().check()
    low = self.min_learning_rate
    if not all(0 < low <= high < np.inf for high in self.max_learning_rates):
      raise OptionError(
        "--max-learning-rates must be at least --min-learning-rate, a positive number, "
        f"got {self.max_learning_rates} and {low:g}."
      )
    if self.num_heads < 1:
      raise OptionError(f"--num-heads must be at least 1, got {self.num_heads}.")

  def find(self, source: Source) -> Bits:
    """Returns bits a character after the last epoch.

    Args:
      source: Where all runs come from.
    """
    runner, low = TextRunner(source, self.texts), self.min_learning_rate
    found: Bits = {}
    for granularity in GRANULARITIES:
      for high in self.max_learning_rates:
        arm = Arm(
          f"{granularity}-{low:g}-{high:g}",
          upper(low, granularity),
          granularity,
          high,
          network="lstm",
          num_heads=self.num_heads,
        )
        runs = runner.run([arm], range(self.seeds))
        for name in LOSSES:
          losses = np.array([run.curve(name)[-1] for run in runs])
          found[granularity, high, name] = losses / np.log(2)
    return found

  def table(self, found: Bits) -> list[str]:
    """Returns bits a character by upper bound.

    Args:
      found: The bits.
    """
    rows = []
    for high in self.max_learning_rates:
      cells = []
      for granularity in GRANULARITIES:
        for name in LOSSES:
          bits = found[granularity, high, name]
          finite = np.isfinite(bits).all()
          cells.append(spread(bits.tolist(), 3) if finite else "not finite")
      rows.append([f"{high:g}", *cells])
    header = [
      f"{g}, {part}" for g in GRANULARITIES.values() for part in LOSSES.values()
    ]
    return [
      "Bits a character after the last epoch, interval "
      f"[{self.min_learning_rate:g}, η max] (a run whose loss is not finite leaves no "
      "mean; train: mean over the epoch, with dropout):",
      "",
      *markdown(["η max", *header], rows),
    ]

  def draw(self, found: Bits, path: Path) -> None:
    """Draws bits a character by upper bound.

    Args:
      found: The bits.
      path: The PNG file.
    """
    figure, axes = pictures.subplots(len(LOSSES))
    for axis, (name, title) in zip(axes, LOSSES.items(), strict=True):
      for granularity, label in GRANULARITIES.items():
        bits = np.array(
          [found[granularity, high, name] for high in self.max_learning_rates]
        )
        axis.errorbar(
          self.max_learning_rates,
          bits.mean(axis=1),
          bits.std(axis=1, ddof=1),
          marker="o",
          capsize=3,
          label=label,
        )
      axis.set(
        xscale="log",
        xlabel=r"$\eta_{\max}$",
        ylabel="bits a character",
        title=f"{title}, $\\eta_{{\\min}}$ = {self.min_learning_rate:g}",
      )
      axis.legend(fontsize=8)
    pictures.save(figure, path)


STUDY = GranularityStudy
