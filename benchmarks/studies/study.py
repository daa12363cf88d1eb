"""What makes a dataclass of options a study: a command that writes what it finds."""

import datetime
from pathlib import Path

from benchmarks.planning import OptionError
from benchmarks.records import environment, write_text
from benchmarks.studies.arms import Images


class Study:
  """A study, whose options are the fields of its subclass.

  Attributes:
    images: What it trains on.
    seeds: Number of runs of each arm.
    out: Folder for records, numbers and picture.
  """

  images: Images
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
    name = type(self).__name__.lower()
    text = "\n".join([f"# {name}", "", *self.measure(), "", *self._conditions()]) + "\n"
    path = self.out / f"{name}.md"
    write_text(path, text)
    print(f"\n{text}\n{path}\n{path.with_suffix('.png')}")

  def _conditions(self) -> list[str]:
    """What the numbers were measured on, by the command that makes them."""
    images, found = self.images, environment()
    names = ("device", "cores", "jax", "flax", "optax", "alrao_jax", "commit")
    return [
      f"{images.dataset}, {images.num_train:,} training and {images.num_held_out:,} "
      f"held-out images, {images.epochs} epochs, batches of {images.batch_size}; "
      f"{self.seeds} seeds; ± is the standard deviation over them. Runs that failed "
      "count as at chance.",
      "",
      f"`python -m benchmarks.studies {type(self).__name__.lower()}`; "
      + ", ".join(f"{name} {str(found[name])[:12]}" for name in names)
      + f"; {datetime.date.today().isoformat()}.",
    ]
