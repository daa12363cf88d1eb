"""The studies' arms on text: what they train on."""

import dataclasses
import math
from pathlib import Path

from benchmarks.data.text import load_text
from benchmarks.models.language import build_language_model
from benchmarks.planning import OptionError
from benchmarks.progress import Display
from benchmarks.records import Record
from benchmarks.studies.runner import Arm, Runner
from benchmarks.text import TextProgram


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
        rule = f"--{name.replace('_', '-')} must be at least 1"
        raise OptionError(f"{rule}, got {getattr(self, name)}.")
    if self.num_held_out < 2:
      raise OptionError(f"--num-held-out must be at least 2, got {self.num_held_out}.")
    if not 0 < self.share <= 1:
      raise OptionError(f"--share must be in (0, 1], got {self.share}.")

  def describe(self) -> str:
    """Returns what it is, for the page of numbers."""
    name = self.files[0].name if self.files else "Penn Treebank"
    return (
      f"{name} by characters, {100 * self.share:g} % of the training text and "
      f"{self.num_held_out:,} held-out characters, {self.epochs} epoch"
      f"{'s' * (self.epochs > 1)}, {self.batch_size} streams of {self.length} a step"
    )


class TextTrainer(Runner):
  """Trains the arms of one study, the papers' LSTM on text."""

  task = "text"

  def __init__(self, study: str, texts: Texts, out: Path, display: Display):
    """Loads the text.

    Args:
      study: Name of the study.
      texts: What to train on.
      out: Folder for its records and checkpoints.
      display: Where progress is shown.

    Raises:
      DataError: The text is missing or damaged.
      OptionError: Options out of range, or too little text for a step.
    """
    super().__init__(study, texts, out, display)
    texts.check()
    whole = load_text("characters", texts.data_dir, files=texts.files)
    train = whole.train[: round(texts.share * len(whole.train))]
    # Those that score are held out too.
    held_out = whole.validation[: texts.num_held_out]
    if len(held_out) < texts.num_held_out:
      raise OptionError(f"--num-held-out must be at most {len(held_out):,}.")
    self._text = dataclasses.replace(
      whole, train=train, validation=held_out, test=held_out
    )
    self._steps = (len(train) - 1) // texts.batch_size // texts.length
    if not self._steps:
      raise OptionError(
        f"--batch-size times --length must be less than the {len(train):,} characters "
        f"of training text, got {texts.batch_size} * {texts.length}."
      )

  def _describe(self, arm: Arm) -> tuple[Record, float]:
    config = {
      **dataclasses.asdict(self._options),
      "network": arm.network,
      "text": self._text.name,
      "num_train": len(self._text.train),
      "vocabulary_size": len(self._text.vocabulary),
    }
    del config["data_dir"], config["files"]
    return config, math.log2(len(self._text.vocabulary))

  def _make_program(self, arm: Arm) -> TextProgram:
    options = self._options
    model = build_language_model(
      "lstm",
      len(self._text.vocabulary),
      num_heads=arm.num_heads if arm.optimizer.has_heads else None,
      dropout=0.2,  # the papers'
    )
    return TextProgram(
      model,
      arm.optimizer,
      self._text,
      batch_size=options.batch_size,
      length=options.length,
      epoch_steps=self._steps,
      max_epochs=options.epochs,
      num_validation=options.num_held_out,
      num_test=options.num_held_out,
    )
