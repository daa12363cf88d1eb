"""Who meets in the arena: the recipe, Alrao, their peers, and tuned optimizers."""

from typing import Any, NamedTuple

from benchmarks.optimizers import OPTIMIZERS, PEERS, Optimizer
from benchmarks.studies.optimizers import ADAM

SGD_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
ADAM_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


class Method(NamedTuple):
  """An optimizer, and the rates that it tries: (None,) if it takes none."""

  optimizer: Optimizer
  rates: tuple[Any, ...] = (None,)

  @property
  def is_tuned(self) -> bool:
    """Whether the best of several rates counts."""
    return len(self.rates) > 1


METHODS = {
  **{name: Method(OPTIMIZERS[name]) for name in ("schedule_free_alrao", "alrao")},
  **{name: Method(OPTIMIZERS[name]) for name in PEERS},
  "sgd": Method(
    OPTIMIZERS["sgd"]._replace(
      label="SGD, best of 7 rates", source="No momentum; rates in half decades."
    ),
    SGD_RATES,
  ),
  "adam": Method(
    ADAM._replace(
      label="Adam, best of 7 rates", source="Adam's betas; rates in half decades."
    ),
    ADAM_RATES,
  ),
}
