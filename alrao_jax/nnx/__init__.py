"""Alrao for flax.nnx: MultiHead, prediction, collapse and export, and units."""

from ._collapse import collapse as collapse
from ._collapse import export as export
from ._multi_head import MultiHead as MultiHead
from ._predict import predict as predict
from ._units import unit_overrides as unit_overrides
