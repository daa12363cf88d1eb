"""Moved to `benchmarks.training`."""

from benchmarks.training import REFRESH_SECONDS as REFRESH_SECONDS
from benchmarks.training import Loop as Loop
