"""Search for a recipe on four small tasks; a killed search goes on where it was.

python -m benchmarks.recipe
"""

import dataclasses
from pathlib import Path

from benchmarks import commands, records
from benchmarks.progress import Display
from benchmarks.recipe.runs import Runs
from benchmarks.recipe.search import chosen, confirm, search
from benchmarks.recipe.table import table
from benchmarks.recipe.tasks import TASKS


@dataclasses.dataclass(frozen=True)
class Search:
  """Run what is missing of the search, and write its table."""

  out: Path = Path("benchmarks/recipe/results")
  """Folder for the records and the table."""
  data_dir: Path | None = None
  """Folder below which to look for data; by default ALRAO_DATA_DIR."""

  def __call__(self) -> None:
    """Searches, compares the winner on fresh seeds, and writes all of it."""
    display = Display()
    runs = Runs(TASKS, self.out, self.data_dir, display.say)
    trials = search(runs)
    confirm(runs, chosen(trials))
    text = table(runs, trials)
    records.write_text(self.out / "SEARCH.md", text)
    display.say(text)


if __name__ == "__main__":
  commands.main(Search, __doc__)
