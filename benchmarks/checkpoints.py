"""Moved to `benchmarks.training`."""

from benchmarks.training import Checkpoints as Checkpoints
from benchmarks.training import delete as delete
