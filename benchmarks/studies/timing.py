"""What a guard costs: steps of one network with several guards, timed in turns."""

from typing import NamedTuple

import numpy as np

import alrao_jax
from benchmarks.competitors import Competitor, in_turns
from benchmarks.data import Split, Splits
from benchmarks.images import ImageData, ImageProgram
from benchmarks.models import build_model
from benchmarks.overhead_cases import Contender
from benchmarks.studies import optimizers

# Bounds of the rates: a head that diverged would cost a step more.
CALM = (1e-5, 1e-3)
STEPS_A_TURN = 10


class _Network(NamedTuple):
  """The network whose steps are timed, for `benchmarks.competitors`.

  Attributes:
    guard: What guards it, if anything.
  """

  guard: alrao_jax.Guard | None

  def program(self, contender: Contender) -> ImageProgram:
    """Returns its program, on one batch of noise.

    Args:
      contender: Alrao, with a number of heads.
    """
    generator = np.random.default_rng(0)
    noise = Split(
      generator.integers(0, 256, (32, 32, 32, 3), dtype=np.uint8),
      generator.integers(0, 10, 32).astype(np.int32),
    )
    return ImageProgram(
      build_model("small_cnn", num_heads=contender.num_heads, norm="none"),
      optimizers.ALRAO._replace(
        make=lambda setting: alrao_jax.alrao(setting.key, None, *CALM, guard=self.guard)
      ),
      ImageData(Splits(noise, noise, noise)),
      batch_size=32,
      max_epochs=1,
      flip=False,
      augmented=False,
    )


def time_steps(guards: tuple[alrao_jax.Guard | None, ...], rounds: int) -> np.ndarray:
  """Times steps of the same network with several guards, in turns.

  Args:
    guards: The guards; None for none. Two equal ones tell what the machine adds.
    rounds: Number of turns that each has.

  Returns:
    Seconds a step, (rounds, number of guards).
  """
  contender = Contender("Alrao", "alrao", 10)
  competitors = [Competitor(_Network(guard), contender) for guard in guards]
  for competitor in competitors:
    competitor.compile()
    competitor.run(1)
  return in_turns(
    competitors,
    lambda competitor: competitor.run(STEPS_A_TURN) / STEPS_A_TURN,
    range(rounds),
    np.random.default_rng(0),
  )
