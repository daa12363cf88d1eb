"""Long texts, cut into pieces that are read side by side."""

from typing import NamedTuple

import numpy as np


class Streams(NamedTuple):
  """A text cut into pieces of equal length, which are read side by side.

  Attributes:
    symbols: (batch, segments * length + 1), int32: each symbol's target is the next.
    valid: (batch, segments * length), bool: the targets that count.
  """

  symbols: np.ndarray
  valid: np.ndarray


def cut(symbols: np.ndarray, batch_size: int, length: int, *, pad: bool) -> Streams:
  """Cuts a text into streams of whole segments.

  Args:
    symbols: (n,), int32.
    batch_size: Number of streams.
    length: Symbols of a segment.
    pad: Whether to pad the last segments, so that every symbol but the first is a valid
      target once; otherwise what does not fill a segment is left out.

  Example:
    >>> import numpy as np
    >>> cut(np.arange(8), 2, 3, pad=False).symbols.tolist()
    [[0, 1, 2, 3], [3, 4, 5, 6]]
    >>> cut(np.arange(6), 2, 2, pad=True).valid.astype(int).tolist()
    [[1, 1, 1, 0], [1, 1, 0, 0]]
  """
  targets = len(symbols) - 1
  size = -(-targets // batch_size) if pad else targets // batch_size
  segments = -(-size // length) if pad else size // length
  time = np.arange(segments * length + 1)
  index = np.arange(batch_size)[:, None] * size + time[None]
  valid = (time[None, :-1] < size) & (index[:, :-1] < targets)
  return Streams(symbols[np.minimum(index, targets)].astype(np.int32), valid)
