"""Times of several programs, measured in turns."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np


def in_turns(
  measures: Sequence[Callable[[], float]], rounds: int | Iterable[int]
) -> np.ndarray:
  """Measures all programs in each round, in an order drawn anew.

  A slow moment of the machine then meets all of them alike, and the ratio to one of
  them within a round is steadier than either time.

  Args:
    measures: Each measures one program.
    rounds: Their number, or something with an entry a round, such as a progress bar.

  Returns:
    The measurements, (rounds, programs).
  """
  generator = np.random.default_rng(0)
  measured = []
  for _ in range(rounds) if isinstance(rounds, int) else rounds:
    row = np.zeros(len(measures))
    for j in generator.permutation(len(measures)):
      row[j] = measures[j]()
    measured.append(row)
  return np.stack(measured)
