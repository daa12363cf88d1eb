"""Moved to `benchmarks.console`."""

from benchmarks.console import Display as Display
from benchmarks.console import sparkline as sparkline
