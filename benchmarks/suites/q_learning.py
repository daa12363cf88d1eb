"""The papers' reinforcement learning: deep Q-learning on Pendulum and LunarLander.

    python -m benchmarks run q_learning --environment lunar_lander --optimizer adam
    python -m benchmarks sweep q_learning --preset rl_reduced

The environments are gymnasium's: `pip install "gymnasium[box2d]"`.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from benchmarks.console import refuse
from benchmarks.methods import METHODS, MethodName
from benchmarks.suites._suite import RETURN, Preset, Suite, check_options
from benchmarks.tables import TableKind
from benchmarks.training import Plan, make_plan
from benchmarks.workloads.deep_q_learning import QWorkload
from benchmarks.workloads.environments import PROTOCOLS, Protocol, make


@dataclasses.dataclass(frozen=True)
class QOptions:
  """All that determines a result, with the constants of its environment's protocol."""

  environment: Literal["pendulum", "lunar_lander"] = "pendulum"
  """Gymnasium's Pendulum-v1 with 11 torques, or LunarLander-v3."""
  optimizer: MethodName = "alrao"
  """Optimizer; benchmarks/methods.py says where its settings come from."""
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
    check_options(self, ("num_heads", "max_epochs", "num_validation", "num_test"))
    if METHODS[self.optimizer].keep is not None:
      rule = "must keep its heads, since the target network has them too"
      refuse("optimizer", rule, self.optimizer)
    if not 0 < self.noise_scale < float("inf"):
      refuse("noise_scale", "must be positive", self.noise_scale)
    num_steps, unit = self.protocol.num_steps, self.max_epochs * self.protocol.num_envs
    if num_steps < 1 or num_steps % unit:
      rule = f"must be a multiple of {unit} (--max-epochs times environments)"
      refuse("num_steps", rule, num_steps)
    if METHODS[self.optimizer].averaged_params is not None:
      rule = "must not be one that is evaluated at averaged weights"
      refuse("optimizer", rule, self.optimizer)


@dataclasses.dataclass(frozen=True)
class QPlace:
  """Nothing to say: environments are where gymnasium is."""


_METHODS = ("alrao", "alrao_guard", "adam", "sgd")

PRESETS: dict[str, Preset] = {
  # Minutes on two cores.
  "rl_reduced": Preset(
    bases=(QOptions(environment="pendulum", num_steps=16_000, max_epochs=8),),
    optimizers=_METHODS,
    num_seeds=1,
  ),
  # The papers' tables: ten runs of each method, SGD at its best rate of seven; and the
  # guard, which is this library's.
  "rl_pendulum": Preset(
    bases=(QOptions(environment="pendulum"),),
    optimizers=_METHODS,
    num_seeds=10,
    num_rate_seeds=3,
  ),
  "rl_lunar_lander": Preset(
    bases=(QOptions(environment="lunar_lander"),),
    optimizers=_METHODS,
    num_seeds=10,
    num_rate_seeds=3,
  ),
}

KIND = TableKind(
  title="Reinforcement learning",
  measures=(RETURN,),
  score=RETURN,
  curve=RETURN,
  curve_limit=None,
  table_options=("environment",),
  size_options=(
    "num_steps",
    "max_epochs",
    "noise_scale",
    "num_validation",
    "num_test",
    "num_envs",
    "batch_size",
    "steps_per_update",
    "width",
    "warm_up",
    "discount",
    "exploration_fraction",
    "final_exploration",
    "capacity",
    "target_period",
    "reward_scale",
  ),
  size="{num_steps:,} steps in {environment}",
  papers_key=("environment",),
  not_real="",
  note="The validation loss, which chooses epoch and rate, is minus the mean return "
  "of the validation episodes. Alrao acts on the mean of those heads that hold at "
  "least half an even share. Random actions return -1,222 in Pendulum and -181 in "
  "LunarLander: that is chance. A table counts once SGD or Adam comes within 20 % of "
  "the papers' return.",
)


class QLearning(Suite[QOptions, QPlace]):
  """Deep Q-learning."""

  name = "q_learning"
  options = QOptions
  place = QPlace
  presets = PRESETS
  kind = KIND

  def find_data(self, options: QOptions) -> None:
    """Makes sure of a run's environment.

    Args:
      options: Of a run.

    Raises:
      MissingEnvironmentError: It is not installed.
    """
    make(options.protocol.env_id).close()

  def plan(self, options: QOptions, out: Path) -> Plan:
    """Returns how a run is trained.

    Args:
      options: Of a run.
      out: Folder of the results.

    Raises:
      OptionError: The options make no run.
      MissingEnvironmentError: Its environment is not installed.
    """
    options.check()
    self.find_data(options)
    config = {
      **dataclasses.asdict(options),
      **options.protocol._asdict(),
      "num_heads": (
        options.num_heads if METHODS[options.optimizer].has_heads else None
      ),
    }
    return make_plan(
      [options.environment],
      config,
      {"suite": self.name, "dataset": "gymnasium", "real_data": True},
      out,
      patience=options.max_epochs,  # returns go up and down: no early stopping
    )

  def _make_workload(self, options: QOptions) -> QWorkload:
    return QWorkload(
      options.protocol,
      METHODS[options.optimizer],
      num_heads=options.num_heads,
      noise_scale=options.noise_scale,
      max_epochs=options.max_epochs,
      num_validation=options.num_validation,
      num_test=options.num_test,
    )


SUITE = QLearning
