"""Text: Alrao next to what users would pick, on Penn Treebank or a text of one's own.

python -m benchmarks run ptb --level characters --optimizer alrao
python -m benchmarks run ptb --train my.txt --network decoder
python -m benchmarks sweep ptb --preset ptb_reduced
"""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any, Literal

from benchmarks.console import OptionError, refuse
from benchmarks.data.text_files import Level, Text, load_text
from benchmarks.methods import METHODS, MethodName
from benchmarks.models.language import OutputLayer, build_language_model
from benchmarks.suites._suite import ACCURACY, BITS, Preset, Suite, check_options
from benchmarks.tables import TableKind
from benchmarks.training import Plan, make_plan
from benchmarks.workloads.text import TextWorkload

LENGTHS = {"lstm": 70, "decoder": 128}


@dataclasses.dataclass(frozen=True)
class TextOptions:
  """All that determines a result. The defaults are the papers' protocol."""

  level: Level = "characters"
  """What is predicted."""
  network: Literal["lstm", "decoder"] = "lstm"
  """The papers' LSTM, or a small pre-norm transformer."""
  output_layer: OutputLayer = "softmax"
  """A softmax over all symbols, or first over classes of them and then in the class."""
  optimizer: MethodName = "alrao"
  """Optimizer; benchmarks/methods.py says where its settings come from."""
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
    check_options(self, ("batch_size", "max_epochs", "patience", *optional))
    for name in ("num_validation", "num_test"):
      value = getattr(self, name)
      if value is not None and value < 2:
        refuse(name, "must be at least 2", value)
    if not 0 <= self.dropout < 1:
      refuse("dropout", "must be in [0, 1)", self.dropout)
    if self.clip is not None and not 0 < self.clip < float("inf"):
      refuse("clip", "must be positive", self.clip)
    method = METHODS[self.optimizer]
    if not method.has_heads and self.num_heads is not None:
      name = self.optimizer
      refuse("num_heads", f"must be left out for --optimizer {name}", self.num_heads)


@dataclasses.dataclass(frozen=True)
class TextPlace:
  """Where the text is."""

  data_dir: Path | None = None
  """Folder below which ptb.{train,valid,test}.txt lie, compressed (.gz) or not."""
  train: Path | None = None
  """Another text to train on; alone, its last fifth validates and tests."""
  valid: Path | None = None
  """Text to validate with, beside --train."""
  test: Path | None = None
  """Text to test with, beside --train."""

  @property
  def files(self) -> tuple[Path, ...]:
    """The texts to read in place of Penn Treebank, if any.

    Raises:
      OptionError: Some of the texts are given, but not those that are needed.
    """
    files = (self.train, self.valid, self.test)
    given = tuple(path for path in files if path is not None)
    if given and len(given) < len(files) and given != (self.train,):
      raise OptionError("--train stands alone, or with both --valid and --test.")
    return given


PRESETS: dict[str, Preset] = {
  # Minutes on two cores.
  "ptb_reduced": Preset(
    bases=(
      TextOptions(
        epoch_steps=100, max_epochs=3, num_validation=50_000, num_test=50_000
      ),
    ),
    optimizers=("alrao", "alrao_fast", "sgd", "adam"),
    num_seeds=1,
  ),
  # A CPU, the papers' network, 3 passes through the text.
  "ptb_chars": Preset(
    bases=(TextOptions(max_epochs=3),),
    optimizers=("alrao", "alrao_fast", "sgd", "adam"),
  ),
  # A CPU, a tenth of a pass.
  "ptb_words": Preset(
    bases=tuple(
      TextOptions(
        level="words",
        output_layer=output_layer,
        epoch_steps=66,
        max_epochs=1,
        num_validation=20_000,
        num_test=20_000,
      )
      for output_layer in ("softmax", "class_factored")
    ),
    optimizers=("alrao", "alrao_fast", "sgd"),
    num_seeds=1,
  ),
  # A CPU, 1,000 steps of a transformer.
  "ptb_transformer": Preset(
    bases=(
      TextOptions(
        network="decoder",
        dropout=0.0,
        epoch_steps=250,
        max_epochs=4,
        num_validation=100_000,
      ),
    ),
    optimizers=("alrao", "alrao_adam", "sgd", "sgd_momentum", "adamw_rates"),
    num_seeds=1,
  ),
  # The papers' row.
  "paper": Preset(
    bases=(TextOptions(),),
    optimizers=("alrao", "alrao_fast", "sgd", "adam"),
  ),
}

KIND = TableKind(
  title="Text",
  measures=(BITS, ACCURACY),
  score=BITS,
  curve=BITS,
  curve_limit=1.13,
  table_options=("network", "level", "output_layer"),
  size_options=(
    "dataset",
    "level",
    "num_train",
    "num_validation",
    "num_test",
    "max_epochs",
    "epoch_steps",
    "patience",
    "batch_size",
    "length",
    "dropout",
    "clip",
  ),
  size="{dataset}, {level}, at most {max_epochs} epochs of {epoch_steps} steps",
  papers_key=("level", "network"),
  not_real="Not Penn Treebank",
  note="Chance is a uniform prediction, a low bar: to know no more of Penn Treebank "
  "than how often each symbol occurs in its training text takes 4.32 bits a "
  "character, and 9.29 a word of the test text's first 20,000.",
)


class PennTreebank(Suite[TextOptions, TextPlace]):
  """Networks that predict the next symbol of a text."""

  name = "ptb"
  options = TextOptions
  place = TextPlace
  presets = PRESETS
  kind = KIND

  def __init__(self, place: TextPlace | None = None):
    """Prepares; nothing is loaded yet.

    Args:
      place: Where the text is.

    Raises:
      OptionError: Some of the texts are given, but not those that are needed.
    """
    super().__init__(place)
    self._files = self._place.files
    self._texts: dict[Level, Text] = {}

  def find_data(self, options: TextOptions) -> None:
    """Loads the text of a run.

    Args:
      options: Of a run.

    Raises:
      DataError: The text is missing or damaged.
    """
    self._text(options)

  def plan(self, options: TextOptions, out: Path) -> Plan:
    """Returns how a run is trained.

    Args:
      options: Of a run.
      out: Folder of the results.

    Raises:
      OptionError: The options make no run.
      DataError: The text is missing or damaged.
    """
    options.check()  # before there need be any data
    text, whole = self._text(options), self._completed(options)
    config = {
      **dataclasses.asdict(whole),
      "dataset": text.name,
      "num_train": len(text.train),
      "vocabulary_size": len(text.vocabulary),
      "fingerprint": _fingerprint(text),
    }
    return make_plan(
      [text.name, options.level, options.network],
      config,
      {
        "suite": self.name,
        "real_data": text.name == "ptb",
        "chance": math.log2(len(text.vocabulary)),  # bits of a uniform prediction
      },
      out,
      patience=options.patience,
    )

  def _make_workload(self, options: TextOptions) -> TextWorkload:
    text, whole = self._text(options), self._completed(options)
    model = build_language_model(
      whole.network,
      len(text.vocabulary),
      context=whole.length or LENGTHS[whole.network],
      output_layer=whole.output_layer,
      num_heads=whole.num_heads,
      dropout=whole.dropout,
    )
    names = (
      "batch_size",
      "length",
      "epoch_steps",
      "max_epochs",
      "num_validation",
      "num_test",
      "chunks",
      "clip",
    )
    sizes: Any = {name: getattr(whole, name) for name in names}
    return TextWorkload(model, METHODS[whole.optimizer], text, **sizes)

  def _text(self, options: TextOptions) -> Text:
    level: Level = options.level
    if level not in self._texts:
      self._texts[level] = load_text(level, self._place.data_dir, files=self._files)
    return self._texts[level]

  def _completed(self, options: TextOptions) -> TextOptions:
    """The options with numbers in place of None, where None means a default."""
    options.check()
    text, method = self._text(options), METHODS[options.optimizer]
    batch_size = options.batch_size
    length = options.length or LENGTHS[options.network]
    segments = (len(text.train) - 1) // batch_size // length
    if not segments:
      raise OptionError(
        f"--batch-size times --length must be less than the {len(text.train):,} "
        f"{text.level} of {text.source}, got {batch_size} * {length}."
      )
    chunks = options.chunks or (batch_size if text.level == "words" else 1)
    if batch_size * length % chunks:
      rule = f"must divide the {batch_size} * {length} positions of a step"
      refuse("chunks", rule, chunks)
    sizes = {}
    for name, part in (("num_validation", text.validation), ("num_test", text.test)):
      sizes[name] = getattr(options, name) or len(part)
      if sizes[name] > len(part):
        refuse(name, f"must be at most {len(part):,}", sizes[name])
    num_heads = options.num_heads or method.num_heads
    return dataclasses.replace(
      options,
      length=length,
      chunks=chunks,
      epoch_steps=options.epoch_steps or segments,
      num_heads=num_heads if method.has_heads else None,
      **sizes,
    )


def _fingerprint(text: Text) -> str:
  """Tells one text from another of the same name."""
  digest = hashlib.sha256("\n".join(text.vocabulary).encode())
  for part in (text.train, text.validation, text.test):
    digest.update(part.tobytes())
  return digest.hexdigest()[:16]


SUITE = PennTreebank
