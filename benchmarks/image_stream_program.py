"""Moved to `benchmarks.workloads.image_stream`."""

from benchmarks.workloads.image_stream import *  # noqa: F403
from benchmarks.workloads.image_stream import StreamWorkload as ImageStreamProgram  # noqa: F401
