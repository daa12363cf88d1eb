"""Moved to `benchmarks.records`."""

from benchmarks.records import Run as RunRecords  # noqa: F401
