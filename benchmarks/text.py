"""Moved to `benchmarks.workloads.text`."""

from benchmarks.workloads.text import *  # noqa: F403
from benchmarks.workloads.text import TextWorkload as TextProgram  # noqa: F401
