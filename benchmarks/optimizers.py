"""Moved to `benchmarks.methods`."""

from benchmarks.methods import *  # noqa: F403
from benchmarks.methods import IMAGE_METHODS as IMAGE_OPTIMIZERS  # noqa: F401
from benchmarks.methods import METHODS as OPTIMIZERS  # noqa: F401
from benchmarks.methods import Method as Optimizer  # noqa: F401
from benchmarks.methods import MethodName as OptimizerName  # noqa: F401
