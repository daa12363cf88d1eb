"""Moved to `benchmarks.workloads.devices`."""

from benchmarks.workloads.devices import *  # noqa: F403
