"""The papers' figures and control experiments, one command each.

    python -m benchmarks.studies interval

Each trains what its folder of records lacks, writes its picture beside them, and prints
its numbers, which also go into a Markdown file there.
"""

from benchmarks import commands
from benchmarks.studies.ablation import Ablation
from benchmarks.studies.adam import Adam
from benchmarks.studies.averaging import Averaging
from benchmarks.studies.bounds import Bounds
from benchmarks.studies.collapse import Collapse
from benchmarks.studies.fraction import Fraction
from benchmarks.studies.granularity import Granularity
from benchmarks.studies.guard import Guard
from benchmarks.studies.interval import Interval
from benchmarks.studies.posterior import Posterior
from benchmarks.studies.ranking import Ranking
from benchmarks.studies.seeds import Seeds
from benchmarks.studies.width import Width

if __name__ == "__main__":
  figures = Interval | Posterior | Adam | Granularity | Fraction | Width
  controls = Ablation | Averaging | Bounds | Collapse | Guard | Ranking | Seeds
  commands.main(figures | controls, __doc__)
