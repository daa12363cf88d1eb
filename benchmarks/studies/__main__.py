"""The papers' figures and control experiments, one command each.

    python -m benchmarks.studies interval

Each trains what its folder of records lacks, writes its picture beside them, and prints
its numbers, which also go into a Markdown file there.
"""

from benchmarks import commands
from benchmarks.studies.adam import Adam
from benchmarks.studies.averaging import Averaging
from benchmarks.studies.fraction import Fraction
from benchmarks.studies.interval import Interval
from benchmarks.studies.posterior import Posterior
from benchmarks.studies.width import Width

if __name__ == "__main__":
  studies = Interval | Posterior | Adam | Fraction | Width | Averaging
  commands.main(studies, __doc__)
