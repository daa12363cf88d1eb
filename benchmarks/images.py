"""Moved to `benchmarks.workloads.images`."""

from benchmarks.workloads.images import *  # noqa: F403
from benchmarks.workloads.images import ImageWorkload as ImageProgram  # noqa: F401
