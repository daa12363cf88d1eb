"""What the studies compare: arms, each an optimizer on a network, and running them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn

from benchmarks import engine
from benchmarks.images import ImageProgram
from benchmarks.optimizers import Optimizer
from benchmarks.progress import Display
from benchmarks.records import Record, read, read_summary
from benchmarks.results import RunRecords


class Arm(NamedTuple):
  """One curve of a study.

  Attributes:
    name: Its name, unique within the study.
    optimizer: Its optimizer; one compilation for arms with the same `compiled`.
    rate: What `optimizer` takes as its rate: a number, or several.
    network: Network of `benchmarks.models`.
    width: Factor on its channels.
    norm: Its normalisation.
    num_heads: Number of heads, where `optimizer` needs them.
    compiled: Name of the program; arms that differ only in rate share it.
    body: The network without its output layer, where `network`, then just its name, is
      not one of `benchmarks.models`.
    program: What makes the program, called like `ImageProgram`.
  """

  name: str
  optimizer: Optimizer
  compiled: str
  rate: Any = None
  network: str = "small_cnn"
  width: float = 1.0
  norm: Any = "batch"
  num_heads: int = 10
  body: nn.Module | None = None
  program: Callable[..., ImageProgram] = ImageProgram


class Runner:
  """Trains the arms of one study, on what a subclass says."""

  task: str

  def __init__(
    self,
    study: str,
    options: Any,
    out: Path,
    display: Display,
    posteriors_per_epoch: int = 10,
    used: list[Record] | None = None,
  ):
    """Keeps its arguments.

    Args:
      study: Name of the study.
      options: A dataclass that says what to train on, with `epochs` and `data_dir`.
      out: Folder for its records and checkpoints.
      display: Where progress is shown.
      posteriors_per_epoch: As in the engine's `Plan`.
      used: The summaries of the runs that `run` returns are added to it.
    """
    self._study, self._options, self._out = study, options, out
    self._posteriors, self._display = posteriors_per_epoch, display
    self._used = [] if used is None else used
    self._program: tuple[Any, engine.Program] | None = None

  def run(self, arms: Iterable[Arm], seeds: Sequence[int]) -> list[RunRecords]:
    """Trains what is missing.

    Args:
      arms: The arms; put those that share a program side by side.
      seeds: Seeds of each.

    Returns:
      The records of all runs, by arm and seed; ``config["arm"]`` names the arm.
    """
    runs = []
    for arm in arms:
      for seed in seeds:
        plan = self.plan(arm, seed)
        if read_summary(plan.path) is None:
          engine.train(self.program(arm), plan, self._display)
        *epochs, summary = read(plan.path)
        runs.append(RunRecords(summary, epochs))
        self._used.append(summary)
    return runs

  def plan(self, arm: Arm, seed: int) -> engine.Plan:
    """Returns the plan of one run.

    Args:
      arm: The arm.
      seed: The seed.
    """
    config, chance = self._describe(arm)
    config = {
      "study": self._study,
      "task": self.task,
      "arm": arm.name,
      "rate": arm.rate,
      "num_heads": arm.num_heads if arm.optimizer.has_heads else None,
      "seed": seed,
      **config,
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    epochs = self._options.epochs
    return engine.Plan(
      name=f"{arm.name}-s{seed}-{digest[:8]}",
      config={**config, "chance": chance},
      out=self._out,
      seed=seed,
      rate=arm.rate,
      max_epochs=epochs,
      patience=epochs + 1,
      posteriors_per_epoch=self._posteriors,
    )

  def program(self, arm: Arm) -> Any:
    """Returns an arm's program, the one before where it is shared.

    Args:
      arm: The arm.
    """
    names = ("compiled", "network", "width", "norm", "num_heads", "body", "program")
    wanted = tuple(getattr(arm, name) for name in names)
    if self._program is None or self._program[0] != wanted:
      self._program = (wanted, self._make_program(arm))
    return self._program[1]

  def _describe(self, arm: Arm) -> tuple[Record, float]:
    """What determines a run beside optimizer and seed; and its score by chance."""
    raise NotImplementedError

  def _make_program(self, arm: Arm) -> engine.Program:
    raise NotImplementedError
