"""Moved to `benchmarks.training` and `benchmarks.console`."""

from benchmarks.console import OptionError as OptionError
from benchmarks.console import refuse as refuse
from benchmarks.methods import METHODS
from benchmarks.training import make_plan as make_plan


def check_rate(optimizer: str, rate: float | None) -> None:
  """Checks that there is a rate for an optimizer that takes one, and else none."""
  takes_rate = METHODS[optimizer].takes_rate
  if takes_rate and (rate is None or not 0 < rate < float("inf")):
    refuse("rate", f"must be positive for --optimizer {optimizer}", rate)
  if not takes_rate and rate is not None:
    refuse("rate", f"must be left out for --optimizer {optimizer}", rate)
