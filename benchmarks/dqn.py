"""The papers' reinforcement learning: deep Q-learning on Pendulum and LunarLander.

    python -m benchmarks.dqn run --environment lunar_lander --optimizer adam
    python -m benchmarks.dqn sweep --preset rl_reduced
    python -m benchmarks.dqn report

Every command has `--help`. Killed, `run --resume` and `sweep` go on after the last
whole epoch. The environments are gymnasium's: `pip install "gymnasium[box2d]"`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks import commands
from benchmarks.rl.experiments import Experiment, Workshop
from benchmarks.sweeps import Preset

PresetName = Literal["rl_reduced", "rl_pendulum", "rl_lunar_lander"]

_Method = Literal["alrao", "alrao_guard", "adam", "sgd"]
_METHODS: tuple[_Method, ...] = ("alrao", "alrao_guard", "adam", "sgd")

PRESETS: dict[PresetName, Preset] = {
  # Minutes on two cores.
  "rl_reduced": Preset(
    bases=(Experiment(environment="pendulum", num_steps=16_000, max_epochs=8),),
    optimizers=_METHODS,
    num_seeds=1,
  ),
  # The papers' tables: ten runs of each method, SGD at its best rate of seven; and the
  # guard, which is this library's.
  "rl_pendulum": Preset(
    bases=(Experiment(environment="pendulum"),),
    optimizers=_METHODS,
    num_seeds=10,
    num_rate_seeds=3,
  ),
  "rl_lunar_lander": Preset(
    bases=(Experiment(environment="lunar_lander"),),
    optimizers=_METHODS,
    num_seeds=10,
    num_rate_seeds=3,
  ),
}


@dataclasses.dataclass(frozen=True)
class Run:
  """Train one Q-network once with one optimizer, and test it."""

  experiment: Annotated[Experiment, tyro.conf.arg(name="")] = Experiment()
  out: Path = Path("out/dqn")
  """Folder for the run's records and checkpoint."""
  resume: bool = False
  """Continue where a killed run left off; keep the results of one that has ended."""

  def __call__(self) -> None:
    """Trains, and prints the outcome."""
    commands.run(Workshop(), self.experiment, self.out, self.resume)


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Train a whole table, or what is missing of it."""

  preset: PresetName = "rl_reduced"
  """Which table; see PRESETS in benchmarks/dqn.py."""
  out: Path | None = None
  """Folder for records and checkpoints, by default out/ and the preset's name."""
  optimizers: tuple[_Method, ...] = _METHODS
  """Only these optimizers of the preset, to run it in pieces."""

  def __call__(self) -> None:
    """Trains what is missing."""
    preset = PRESETS[self.preset]._replace(optimizers=self.optimizers)
    commands.sweep(Workshop(), preset, self.out or Path("out", self.preset))


if __name__ == "__main__":
  commands.main(Run | Sweep | commands.Report, __doc__)
