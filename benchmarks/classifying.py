"""Moved to `benchmarks.workloads.images`."""

from benchmarks.workloads.images import *  # noqa: F403
from benchmarks.workloads.images import ClassifierWorkload as ClassifierProgram  # noqa: F401
