"""One experiment of Q-learning: its options, its name, and its program."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from benchmarks.engine import Plan
from benchmarks.optimizers import OPTIMIZERS, OptimizerName
from benchmarks.planning import check_rate, check_seed, make_plan, refuse
from benchmarks.rl.environments import PROTOCOLS, Protocol, make
from benchmarks.rl.program import DQNProgram


@dataclasses.dataclass(frozen=True)
class Experiment:
  """All that determines a result, with the constants of its environment's protocol."""

  environment: Literal["pendulum", "lunar_lander"] = "pendulum"
  """Gymnasium's Pendulum-v1 with 11 torques, or LunarLander-v3."""
  optimizer: OptimizerName = "alrao"
  """Optimizer; benchmarks/optimizers.py says where its settings come from."""
  rate: float | None = None
  """Learning rate, for sgd."""
  num_heads: int = 10
  """Number of Alrao's heads."""
  seed: int = 0
  """Determines initial weights, episodes, random actions and Alrao's rates."""
  num_steps: int | None = None
  """Steps of the environment, all copies together; by default its protocol's."""
  max_epochs: int = 20
  """Number of parts of a run; each begins new episodes and ends with validation."""
  noise_scale: float = 1.0
  """Standard deviation of each head's Gaussian, in the unit of scaled rewards."""
  num_validation: int = 20
  """Number of episodes that choose the best epoch."""
  num_test: int = 100
  """Number of episodes that test it."""

  @property
  def protocol(self) -> Protocol:
    """How the environment is treated, in as many steps as the options say."""
    protocol = PROTOCOLS[self.environment]
    if self.num_steps is None:
      return protocol
    return protocol._replace(num_steps=self.num_steps)

  def check(self) -> None:
    """Checks what can be without the environment.

    Raises:
      OptionError: Options out of range, or that do not go together.
    """
    for name in ("num_heads", "max_epochs", "num_validation", "num_test"):
      if getattr(self, name) < 1:
        refuse(name, "must be at least 1", getattr(self, name))
    check_seed(self.seed)
    if not 0 < self.noise_scale < float("inf"):
      refuse("noise_scale", "must be positive", self.noise_scale)
    num_steps, unit = self.protocol.num_steps, self.max_epochs * self.protocol.num_envs
    if num_steps < 1 or num_steps % unit:
      rule = f"must be a multiple of {unit} (--max-epochs times environments)"
      refuse("num_steps", rule, num_steps)
    if OPTIMIZERS[self.optimizer].averaged_params is not None:
      rule = "must not be one that is evaluated at averaged weights"
      refuse("optimizer", rule, self.optimizer)
    check_rate(self.optimizer, self.rate)


class Workshop:
  """Prepares experiments; compiled programs are shared where they can be."""

  def __init__(self):
    """Makes the workshop; nothing is made yet."""
    self._program: tuple[Any, DQNProgram] | None = None

  def find_data(self, experiment: Experiment) -> None:
    """Makes sure of an experiment's environment.

    Args:
      experiment: The experiment.

    Raises:
      MissingEnvironmentError: It is not installed.
    """
    make(experiment.protocol.env_id).close()

  def plan(self, experiment: Experiment, out: Path) -> Plan:
    """Returns how the engine shall run an experiment.

    Args:
      experiment: The experiment.
      out: Folder of the results.

    Raises:
      OptionError: The options make no experiment.
      MissingEnvironmentError: Its environment is not installed.
    """
    experiment.check()
    self.find_data(experiment)
    config = {
      **dataclasses.asdict(experiment),
      **experiment.protocol._asdict(),
      "num_heads": (
        experiment.num_heads if OPTIMIZERS[experiment.optimizer].has_heads else None
      ),
    }
    return make_plan(
      [experiment.environment],
      config,
      {"task": "rl", "dataset": "gymnasium", "real_data": True},
      out,
      patience=experiment.max_epochs,  # returns go up and down: no early stopping
    )

  def program(self, experiment: Experiment) -> DQNProgram:
    """Returns the program, the one before if only seed and rate differ.

    Args:
      experiment: One that `plan` has accepted.
    """
    wanted = dataclasses.replace(experiment, seed=0, rate=None)
    if self._program is None or self._program[0] != wanted:
      program = DQNProgram(
        experiment.protocol,
        OPTIMIZERS[experiment.optimizer],
        num_heads=experiment.num_heads,
        noise_scale=experiment.noise_scale,
        max_epochs=experiment.max_epochs,
        num_validation=experiment.num_validation,
        num_test=experiment.num_test,
      )
      self._program = (wanted, program)
    return self._program[1]
