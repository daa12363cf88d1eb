"""The studies' arms on text: what they train on."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from benchmarks.data.text import load_text
from benchmarks.models.language import build_language_model
from benchmarks.planning import OptionError, refuse
from benchmarks.progress import Display
from benchmarks.records import Record
from benchmarks.studies.runner import Arm, Runner
from benchmarks.text import TextProgram

NETWORKS = ("lstm", "decoder")


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


class TextTrainer(Runner):
  """Trains the arms of one study, language models, on text."""

  task = "text"

  def __init__(
    self,
    study: str,
    texts: Texts,
    out: Path,
    display: Display,
    used: list[Record] | None = None,
  ):
    """Loads the text.

    Args:
      study: Name of the study.
      texts: What to train on.
      out: Folder for its records and checkpoints.
      display: Where progress is shown.
      used: As in `Runner`.

    Raises:
      DataError: The text is missing or damaged.
      OptionError: Options out of range, or too little text for a step.
    """
    super().__init__(study, texts, out, display, used=used)
    texts.check()
    whole = load_text("characters", texts.data_dir, files=texts.files)
    train = whole.train[: round(texts.share * len(whole.train))]
    # Those that score are held out too.
    held_out = whole.validation[: texts.num_held_out]
    if len(held_out) < texts.num_held_out:
      rule = f"must be at most {len(held_out):,}, the text's validation characters"
      refuse("num_held_out", rule, texts.num_held_out)
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
    network: Any = arm.network
    if network not in NETWORKS:
      raise ValueError(
        f"Arm(network=...) must be one of {', '.join(NETWORKS)} for a TextTrainer, got "
        f"{network!r}."
      )
    for name in ("width", "norm", "body", "program"):
      value, only = getattr(arm, name), Arm._field_defaults[name]
      if value != only:
        raise ValueError(
          f"Arm({name}=...) must be left at {only!r} for a TextTrainer, whose networks "
          f"have no other, got {value!r}."
        )
    model = build_language_model(
      network,
      len(self._text.vocabulary),
      context=options.length,
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
