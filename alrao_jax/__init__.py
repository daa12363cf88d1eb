"""Alrao: train networks with no learning rate to choose, on jax and optax."""

import importlib
from typing import Any

from ._alrao import DropDivergedState as DropDivergedState
from ._alrao import GatherUnitsState as GatherUnitsState
from ._alrao import ScheduleFreeAlraoState as ScheduleFreeAlraoState
from ._alrao import alrao as alrao
from ._alrao import drop_diverged as drop_diverged
from ._alrao import eval_params as eval_params
from ._alrao import in_float32 as in_float32
from ._alrao import schedule_free_alrao as schedule_free_alrao
from ._averaging import Averaging as Averaging
from ._averaging import BayesState as BayesState
from ._averaging import FixedShareState as FixedShareState
from ._averaging import SwitchState as SwitchState
from ._averaging import bayes as bayes
from ._averaging import fixed_share as fixed_share
from ._averaging import switch as switch
from ._convert import collapse as collapse
from ._convert import export as export
from ._convert import load_pretrained as load_pretrained
from ._convert import take_heads as take_heads
from ._guard import Guard as Guard
from ._guard import GuardUnitsState as GuardUnitsState
from ._guard import SkipBrokenBatchesState as SkipBrokenBatchesState
from ._guard import guard as guard
from ._guard import guard_units as guard_units
from ._guard import keep_finite as keep_finite
from ._guard import skip_broken_batches as skip_broken_batches
from ._heads import Hopeful as Hopeful
from ._heads import Leader as Leader
from ._heads import PerHeadState as PerHeadState
from ._heads import TrackHeadsState as TrackHeadsState
from ._heads import best_heads as best_heads
from ._heads import follow_leader as follow_leader
from ._heads import hopeful as hopeful
from ._heads import log_weights as log_weights
from ._heads import per_head as per_head
from ._heads import track_heads as track_heads
from ._judges import judges as judges
from ._losses import MixtureInfo as MixtureInfo
from ._losses import binary_loss as binary_loss
from ._losses import chunked_mixture_loss as chunked_mixture_loss
from ._losses import classification_loss as classification_loss
from ._losses import mixture_loss as mixture_loss
from ._losses import regression_loss as regression_loss
from ._multi_head import HeadOutputs as HeadOutputs
from ._multi_head import multi_head as multi_head
from ._predict import mixture_log_probs as mixture_log_probs
from ._predict import mixture_mean as mixture_mean
from ._rates import Bernoulli as Bernoulli
from ._rates import LogUniform as LogUniform
from ._rates import ScaleByUnitRatesState as ScaleByUnitRatesState
from ._rates import bernoulli as bernoulli
from ._rates import log_uniform as log_uniform
from ._rates import scale_by_unit_rates as scale_by_unit_rates
from ._rates import unit_rates as unit_rates
from ._rates import with_unit_rates as with_unit_rates
from ._report import DecadeReport as DecadeReport
from ._report import HeadReport as HeadReport
from ._report import Report as Report
from ._report import report as report
from ._report import scalars as scalars
from ._rules import Units as Units
from ._sharding import head_shardings as head_shardings
from ._sharding import tree_head_shardings as tree_head_shardings
from ._units import UnitOptions as UnitOptions
from ._units import UnitSpec as UnitSpec
from ._units import describe_units as describe_units
from ._units import unit_specs as unit_specs

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
  # Import a framework with the first use of its name, not with the core.
  if name in ("linen", "nnx", "equinox", "keras"):
    return importlib.import_module(f".{name}", __name__)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
