"""Texts, as numbered characters or words: Penn Treebank, or any other."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.data.dataset import DataError, resolve_data_dir
from benchmarks.data.files import describe_missing, read_file, unzip

Level = Literal["characters", "words"]

PARTS = ("train", "validation", "test")
PTB_NAMES = ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt")
# What is read takes at most four times the memory of Penn Treebank's largest part, or,
# as a text of one's own, this much, which a billion characters fit in.
MAX_PTB_BYTES = 4 * 5_101_618
MAX_BYTES = 2**30
SEARCH_DEPTH = 3  # simple-examples/data, Mikolov's archive, and one more
END_OF_LINE = "<eos>"
UNKNOWN = "<unk>"


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
  """A text in numbers.

  Attributes:
    name: ``"ptb"``, or the name of the training text's file.
    level: What the symbols are.
    vocabulary: The symbols of the training text, the most frequent first.
    train: Its symbols, (n,), int32, indices of `vocabulary`.
    validation: Likewise.
    test: Likewise.
    source: Where the training text was found.
  """

  name: str
  level: Level
  vocabulary: tuple[str, ...]
  train: np.ndarray
  validation: np.ndarray
  test: np.ndarray
  source: str


def load_text(
  level: Level,
  data_dir: str | os.PathLike[str] | None = None,
  *,
  files: Sequence[Path] = (),
) -> Text:
  r"""Reads a text of three parts.

  Characters are taken as they are, ends of lines included. Words are what white space
  separates, with ``<eos>`` for the end of each line, which is Mikolov's convention. The
  vocabulary is that of the training text. A word that it lacks becomes ``<unk>`` if the
  training text has that; any other unknown symbol is an error.

  Args:
    level: ``"characters"`` or ``"words"``.
    data_dir: The folder below which Penn Treebank's ``ptb.train.txt``,
      ``ptb.valid.txt`` and ``ptb.test.txt`` lie, compressed (``.gz``) or not; by
      default ``ALRAO_DATA_DIR``, else ``shared/data`` beside the project's folder.
    files: UTF-8 texts to read instead, compressed or not: one, of which the last tenth
      tests and the tenth before validates; or training, validation and test text.

  Returns:
    The text.

  Raises:
    DataError: A file is missing, damaged, empty, too large or not UTF-8, or has a
      symbol that the training text lacks; the text names it.
  """
  paths = list(files) or _find_ptb(resolve_data_dir(data_dir))
  if len(paths) not in (1, 3):
    raise DataError(
      f"a text has one file, or three (training, validation, test), got {len(paths)}."
    )
  max_bytes = MAX_BYTES if files else MAX_PTB_BYTES
  symbols = [_symbols(level, path, max_bytes) for path in paths]
  if len(paths) == 1:
    paths = paths * 3
    tenth = len(symbols[0]) // 10
    first, second = len(symbols[0]) - 2 * tenth, len(symbols[0]) - tenth
    symbols = [symbols[0][:first], symbols[0][first:second], symbols[0][second:]]
  for path, part, name in zip(paths, symbols, PARTS, strict=True):
    if len(part) < 2:
      raise DataError(f"{path}: too short, {len(part)} {level} to {_USES[name]}.")
  counts = Counter(symbols[0])
  vocabulary = tuple(sorted(counts, key=lambda symbol: (-counts[symbol], symbol)))
  index = {symbol: number for number, symbol in enumerate(vocabulary)}
  parts = [_encode(level, *pair, index) for pair in zip(paths, symbols, strict=True)]
  return Text(
    "ptb" if not files else paths[0].name.split(".")[0],
    level,
    vocabulary,
    *parts,
    source=str(paths[0]),
  )


_USES = {
  "train": "train on",
  "validation": "validate with",
  "test": "test with",
}


def _symbols(level: Level, path: Path, max_bytes: int) -> str | list[str]:
  """A text's symbols, each a string."""
  text = _read(path, max_bytes)
  if level == "characters":
    return text
  return text.replace("\n", f" {END_OF_LINE} ").split()


def _read(path: Path, max_bytes: int) -> str:
  content = read_file(path, max_bytes, pipe=True)
  if content.startswith(b"\x1f\x8b"):
    content = unzip(path, content, max_bytes)
  try:
    text = content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise DataError(f"{path}: not UTF-8, at byte {error.start}.") from error
  if not text.strip():
    raise DataError(f"{path}: empty; a text must have something to learn.")
  return text


def _encode(
  level: Level, path: Path, symbols: Sequence[str], index: dict[str, int]
) -> np.ndarray:
  otherwise = index.get(UNKNOWN, -1) if level == "words" else -1
  numbers = np.fromiter(
    (index.get(symbol, otherwise) for symbol in symbols), np.int32, len(symbols)
  )
  if otherwise == -1 and numbers.min() < 0:
    where = int(numbers.argmin())
    remedy = (
      f"or write {UNKNOWN} for rare words in the training text"
      if level == "words"
      else "or remove it"
    )
    raise DataError(
      f"{path}: {symbols[where]!r}, number {where:,} of its {level}, is not in the "
      f"training text; add it there, {remedy}."
    )
  return numbers


def _find_ptb(data_dir: Path) -> list[Path]:
  """The first folder with all three files: any mixture of .txt and .txt.gz."""
  for folder in _folders(data_dir):
    found = [
      next(filter(os.path.isfile, (folder / name, folder / f"{name}.gz")), None)
      for name in PTB_NAMES
    ]
    paths = [path for path in found if path is not None]
    if len(paths) == len(PTB_NAMES):
      return paths
    if paths:
      missing = [n for n, path in zip(PTB_NAMES, found, strict=True) if path is None]
      raise DataError(
        f"{folder} has {paths[0].name}, but no {' and no '.join(missing)}."
      )
  raise DataError(
    f"no Penn Treebank below {data_dir}{describe_missing(data_dir)}. Put there "
    f"{', '.join(PTB_NAMES)} (Mikolov's, .gz or not), name another folder (--data-dir, "
    "ALRAO_DATA_DIR), or train on a text of your own (--train my.txt)."
  )


def _folders(data_dir: Path) -> Iterator[Path]:
  for name, subfolders, _ in os.walk(data_dir, followlinks=True):
    depth = len(Path(name).relative_to(data_dir).parts)
    subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
    if depth >= SEARCH_DEPTH:
      subfolders.clear()
    yield Path(name)
