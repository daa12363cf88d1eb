"""What makes a dataclass of options a study: a command that writes what it finds."""

from pathlib import Path

from benchmarks.experiments import OptionError
from benchmarks.records import write_text


class Study:
  """A study, whose options are the fields of its subclass.

  Attributes:
    seeds: Number of runs of each arm.
    out: Folder for records, numbers and picture.
  """

  seeds: int
  out: Path

  def measure(self) -> list[str]:
    """Trains what is missing; writes the picture; returns its numbers, as Markdown."""
    raise NotImplementedError

  def __call__(self) -> None:
    """Measures; writes and prints the numbers.

    Raises:
      OptionError: Too few seeds.
    """
    if self.seeds < 2:
      raise OptionError(f"--seeds must be at least 2, for a spread, got {self.seeds}.")
    text = "\n".join(self.measure()) + "\n"
    path = self.out / f"{type(self).__name__.lower()}.md"
    write_text(path, text)
    print(f"\n{text}\n{path}\n{path.with_suffix('.png')}")
