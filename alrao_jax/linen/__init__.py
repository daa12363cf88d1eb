"""Alrao for flax.linen: the MultiHead layer, a train state, prediction and units."""

from ._multi_head import MultiHead as MultiHead
from ._training import TrainState as TrainState
from ._training import predict as predict
from ._units import unit_overrides as unit_overrides
