"""Moved to `benchmarks.workloads.image_stream`."""

from benchmarks.workloads.image_stream import LocalStatistics as LocalStatistics
from benchmarks.workloads.image_stream import (
  use_local_statistics as use_local_statistics,
)
