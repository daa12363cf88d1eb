"""Moved to `benchmarks.training`."""

from benchmarks.training import Plan as Plan
from benchmarks.training import Workload as Program  # noqa: F401
from benchmarks.training import best_epoch as best_epoch
from benchmarks.training import train as train
