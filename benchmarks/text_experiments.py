"""One experiment on text: its options, its name, and the program that runs it."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.data.text import Level, Text, load_text
from benchmarks.engine import Plan
from benchmarks.models.language import OutputLayer, build_language_model
from benchmarks.optimizers import OPTIMIZERS, OptimizerName
from benchmarks.planning import OptionError, check_rate, check_seed, make_plan, refuse
from benchmarks.text import TextProgram

LENGTHS = {"lstm": 70, "decoder": 128}


@dataclasses.dataclass(frozen=True)
class Experiment:
  """All that determines a result. The defaults are the papers' protocol."""

  level: Level = "characters"
  """What is predicted."""
  network: Literal["lstm", "decoder"] = "lstm"
  """The papers' LSTM, or a small pre-norm transformer."""
  output_layer: OutputLayer = "softmax"
  """A softmax over all symbols, or first over classes of them and then in the class."""
  optimizer: OptimizerName = "alrao"
  """Optimizer; benchmarks/optimizers.py says where its settings come from."""
  rate: float | None = None
  """Learning rate, for those that take one."""
  num_heads: int | None = None
  """Number of Alrao's heads, by default 10 (alrao_fast: 6)."""
  clip: float | None = None
  """Greatest norm of the body's gradient, and of each head's; by default any."""
  dropout: float = 0.2
  """Share of the features dropped before the output layer."""
  seed: int = 0
  """Determines initial weights, dropout and Alrao's rates."""
  batch_size: int = 20
  """Number of streams that a text is read as, validation and test text too."""
  length: int | None = None
  """Symbols of each stream in a step, by default 70 (decoder: 128)."""
  chunks: int | None = None
  """Parts into which the positions of a step are divided for the heads' outputs, by
  default 1 (words: the number of streams)."""
  epoch_steps: int | None = None
  """Steps between validations, by default one pass through the training text. A shorter
  epoch begins where the one before ended."""
  max_epochs: int = 200
  """Maximum number of epochs; a run says if it hit it."""
  patience: int = 20
  """Epochs without a better validation loss after which a run stops."""
  num_validation: int | None = None
  """Number of validation symbols, by default all."""
  num_test: int | None = None
  """Number of test symbols, by default all."""

  def check(self) -> None:
    """Checks what can be without the data.

    Raises:
      OptionError: Options out of range, or that do not go together.
    """
    optional = ("num_heads", "length", "chunks", "epoch_steps")
    for name in ("batch_size", "max_epochs", "patience", *optional):
      value = getattr(self, name)
      if value is not None and value < 1:
        refuse(name, "must be at least 1", value)
    for name in ("num_validation", "num_test"):
      value = getattr(self, name)
      if value is not None and value < 2:
        refuse(name, "must be at least 2", value)
    check_seed(self.seed)
    if not 0 <= self.dropout < 1:
      refuse("dropout", "must be in [0, 1)", self.dropout)
    if self.clip is not None and not 0 < self.clip < float("inf"):
      refuse("clip", "must be positive", self.clip)
    optimizer = OPTIMIZERS[self.optimizer]
    check_rate(self.optimizer, self.rate)
    if not optimizer.has_heads and self.num_heads is not None:
      name = self.optimizer
      refuse("num_heads", f"must be left out for --optimizer {name}", self.num_heads)


class Workshop:
  """Prepares experiments; text and compiled programs are shared where they can be."""

  def __init__(self, data_dir: Path | None = None, files: Sequence[Path] = ()):
    """Makes the workshop; nothing is loaded yet.

    Args:
      data_dir: Folder below which Penn Treebank is looked for.
      files: Text to read instead, as `load_text` says.
    """
    self._data_dir, self._files = data_dir, tuple(files)
    self._texts: dict[Level, Text] = {}
    self._program: tuple[Any, TextProgram] | None = None

  def find_data(self, experiment: Experiment) -> None:
    """Loads the text of an experiment.

    Args:
      experiment: The experiment.

    Raises:
      DataError: The text is missing or damaged.
    """
    self._text(experiment)

  def plan(self, experiment: Experiment, out: Path) -> Plan:
    """Returns how the engine shall run an experiment.

    Args:
      experiment: The experiment.
      out: Folder of the results.

    Raises:
      OptionError: The options make no experiment.
      DataError: The text is missing or damaged.
    """
    experiment.check()  # before there need be any data
    text, whole = self._text(experiment), self._completed(experiment)
    config = {
      **dataclasses.asdict(whole),
      "dataset": text.name,
      "num_train": len(text.train),
      "vocabulary_size": len(text.vocabulary),
      "fingerprint": _fingerprint(text),
    }
    return make_plan(
      [text.name, experiment.level, experiment.network],
      config,
      {
        "task": "text",
        "real_data": text.name == "ptb",
        "chance": math.log2(len(text.vocabulary)),  # bits of a uniform prediction
      },
      out,
      patience=experiment.patience,
    )

  def program(self, experiment: Experiment) -> TextProgram:
    """Returns the program, the one before if only seed and rate differ.

    Args:
      experiment: One that `plan` has accepted.
    """
    wanted = dataclasses.replace(experiment, seed=0, rate=None)
    if self._program is None or self._program[0] != wanted:
      text, whole = self._text(experiment), self._completed(experiment)
      options = {
        name: getattr(whole, name)
        for name in (
          "batch_size",
          "length",
          "epoch_steps",
          "max_epochs",
          "num_validation",
          "num_test",
          "chunks",
          "clip",
        )
      }
      model = build_language_model(
        whole.network,
        len(text.vocabulary),
        context=options["length"],
        output_layer=whole.output_layer,
        num_heads=whole.num_heads,
        dropout=whole.dropout,
      )
      program = TextProgram(model, OPTIMIZERS[whole.optimizer], text, **options)
      self._program = (wanted, program)
    return self._program[1]

  def _text(self, experiment: Experiment) -> Text:
    level: Level = experiment.level
    if level not in self._texts:
      self._texts[level] = load_text(level, self._data_dir, files=self._files)
    return self._texts[level]

  def _completed(self, experiment: Experiment) -> Experiment:
    """The experiment with numbers in place of None, where None means a default."""
    experiment.check()
    text, optimizer = self._text(experiment), OPTIMIZERS[experiment.optimizer]
    batch_size = experiment.batch_size
    length = experiment.length or LENGTHS[experiment.network]
    segments = (len(text.train) - 1) // batch_size // length
    if not segments:
      raise OptionError(
        f"--batch-size times --length must be less than the {len(text.train):,} "
        f"{text.level} of {text.source}, got {batch_size} * {length}."
      )
    chunks = experiment.chunks or (batch_size if text.level == "words" else 1)
    if batch_size * length % chunks:
      rule = f"must divide the {batch_size} * {length} positions of a step"
      refuse("chunks", rule, chunks)
    sizes = {}
    for name, part in (("num_validation", text.validation), ("num_test", text.test)):
      sizes[name] = getattr(experiment, name) or len(part)
      if sizes[name] > len(part):
        refuse(name, f"must be at most {len(part):,}", sizes[name])
    num_heads = experiment.num_heads or optimizer.num_heads
    return dataclasses.replace(
      experiment,
      length=length,
      chunks=chunks,
      epoch_steps=experiment.epoch_steps or segments,
      num_heads=num_heads if optimizer.has_heads else None,
      **sizes,
    )


def _fingerprint(text: Text) -> str:
  """Tells one text from another of the same name."""
  digest = hashlib.sha256("\n".join(text.vocabulary).encode())
  for part in (text.train, text.validation, text.test):
    digest.update(part.tobytes())
  return digest.hexdigest()[:16]
