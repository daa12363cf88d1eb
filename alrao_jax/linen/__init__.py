"""Alrao for flax.linen: MultiHead, a train state, prediction, collapse and units."""

from ._collapse import collapse as collapse
from ._multi_head import MultiHead as MultiHead
from ._training import TrainState as TrainState
from ._training import predict as predict
from ._units import unit_overrides as unit_overrides
