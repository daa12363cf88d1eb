"""What makes a dataclass of options a study: a command that writes what it finds."""

import functools
from pathlib import Path

from benchmarks.planning import check_seeds
from benchmarks.records import Record, conditions_of_all, write_text
from benchmarks.studies.arms import Images


class Study:
  """A study, whose options are the fields of its subclass.

  Attributes:
    images: What it trains on; a study without them overrides `trained_on`.
    seeds: Number of runs of each arm.
    out: Folder for records, numbers and picture.
  """

  images: Images
  seeds: int
  out: Path

  def measure(self) -> list[str]:
    """Trains what is missing; writes the picture; returns its numbers, as Markdown."""
    raise NotImplementedError

  @functools.cached_property
  def used(self) -> list[Record]:
    """The records that the numbers come from, with ``environment`` and ``date``."""
    return []

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

  def __call__(self) -> None:
    """Measures; writes and prints the numbers.

    Raises:
      OptionError: Too few seeds.
    """
    check_seeds(self.seeds, at_least=2)  # for a spread
    self.used.clear()
    name = type(self).__name__.lower()
    text = "\n".join([f"# {name}", "", *self.measure(), "", *self._conditions()]) + "\n"
    path = self.out / f"{name}.md"
    write_text(path, text)
    print(f"\n{text}\n{path}\n{path.with_suffix('.png')}")

  def _conditions(self) -> list[str]:
    """What the numbers were measured on, and the command that makes them."""
    return [
      f"{self.trained_on}; {self.spread}",
      "",
      f"`python -m benchmarks.studies {type(self).__name__.lower()}`; "
      + conditions_of_all(self.used),
    ]
