"""What tests of the benchmarks share: a workload without a network, and a run."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks.console import Display
from benchmarks.training import Loop, Plan, Workload


def quiet() -> Display:
  return Display(Console(quiet=True))


def make_plan(out: Path, **changes: Any) -> Plan:
  options: dict[str, Any] = {
    "name": "run",
    "config": {"seed": 0},
    "out": out,
    "seed": 0,
    "rate": None,
    "max_epochs": 10,
    "patience": 3,
  }
  return Plan(**{**options, **changes})


class ScriptedWorkload(Workload):
  """Counts its steps, and has the validation losses that a test wants.

  The state is the number of steps done, so a snapshot tells of which epoch it is; the
  two heads' weights after `n` steps are 1 / (n + 1) and the rest.
  """

  def __init__(
    self, validation_losses, *, survives_divergence=False, train_losses=None
  ):
    self.steps_per_epoch, self.examples_per_epoch = 4, 32
    self.examples = "examples"
    self.survives_divergence = survives_divergence
    self.num_parameters = 1
    self.data = ()
    self.epochs_trained: list[int] = []
    self.tested: list[Any] = []
    self._validation_losses = validation_losses
    self._train_losses = train_losses or {}
    self.step = Loop(self._step)

  @staticmethod
  def _step(carry, data, batch):
    del data
    weight = 1 / (carry + 1)
    weights = jnp.stack([weight, 1 - weight])
    return carry + 1, {"loss": batch, "head_weights": weights}

  def init(self, seed, rate):
    del seed, rate
    return jnp.zeros([], jnp.float32)

  def batches(self, seed, epoch):
    del seed
    self.epochs_trained.append(epoch)
    return np.full(4, self._train_losses.get(epoch, 1.0), np.float32)

  def snapshot(self, state, seed, epoch):
    del seed, epoch
    return {"steps": state, "posterior": 1 / (state + 1)}

  def evaluate(self, snapshot, part):
    epoch = int(snapshot["steps"]) // self.steps_per_epoch
    if part == "test":
      self.tested.append(jax.tree.map(float, snapshot))
    return {"loss": self._validation_losses[epoch - 1], "accuracy": epoch / 10}


def without_times(records: list[dict]) -> list[dict]:
  """Records, less what differs between two equal runs."""
  times = ("seconds", "examples_per_second", "peak_memory")
  return [{k: v for k, v in record.items() if k not in times} for record in records]


def main() -> None:
  """Trains a tiny network on digits: OUT RESULT KILL_AT_STEP (0: never).

  Writes the last snapshot, the best one, and the records, to RESULT.
  """
  import os
  import signal

  from benchmarks import training
  from benchmarks.records import read
  from benchmarks.suites.cifar10 import Cifar10, ImageOptions

  out, result, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
  training.REFRESH_SECONDS = 0.0
  suite = Cifar10()
  options = ImageOptions(
    dataset="digits",
    network="small_cnn",
    width=1 / 4,
    optimizer="alrao_momentum",
    num_train=192,
    num_validation=64,
    num_test=64,
    max_epochs=4,
  )
  workload, plan = suite.workload(options), suite.plan(options, out)
  seen: list[Any] = []
  evaluate, display = workload.evaluate, quiet()

  def remember(snapshot, part):
    seen.append(jax.tree.map(np.array, snapshot))
    return evaluate(snapshot, part)

  def kill(done, **_):
    if kill_at and done >= kill_at:
      os.kill(os.getpid(), signal.SIGKILL)

  workload.evaluate = remember
  display.update = kill
  training.train(workload, plan, display)
  last, best = (jax.tree.leaves(snapshot) for snapshot in seen[-2:])
  records = json.dumps(without_times(read(plan.path)))
  arrays = {f"leaf{i}": leaf for i, leaf in enumerate(last + best)}
  np.savez(result, records=records, epochs=len(seen) - 1, **arrays)


if __name__ == "__main__":
  main()
