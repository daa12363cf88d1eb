"""Training that differs from that of `benchmarks.images` in what it keeps or tells."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import alrao_jax
from benchmarks.images import ImageProgram, Snapshot, State
from benchmarks.loops import Loop

PyTree = Any


class Collapsed(ImageProgram):
  """What follows a first epoch, with only the best heads kept.

  It starts from the state after that epoch, which it trains itself: the same, to the
  last bit, as an `ImageProgram` of the same seed has after its first epoch.
  """

  def __init__(self, *args: Any, keep: int, **options: Any):
    """Makes the program; nothing is compiled yet.

    Args:
      *args: As of `ImageProgram`.
      keep: How many heads to keep.
      **options: As of `ImageProgram`; `max_epochs` counts those that follow.
    """
    super().__init__(*args, **options)
    self._keep = keep

  def init(self, seed: int, rate: Any) -> State:
    """Returns the state after the first epoch, collapsed.

    Args:
      seed: As of `ImageProgram`.
      rate: Likewise.
    """
    state, _ = self.step(super().init(seed, rate), self.data, super().batches(seed, 1))
    optimizer = self.make_optimizer(jax.random.key(0), rate)
    params, opt_state = alrao_jax.collapse(
      optimizer, state.params, state.opt_state, self._keep
    )
    return state._replace(params=params, opt_state=opt_state)

  def batches(self, seed: int, epoch: int) -> dict[str, np.ndarray]:
    """Returns the batches of the epoch after `epoch`.

    Args:
      seed: Seed of the run.
      epoch: Number of the epoch, from 1 after the first one.
    """
    return super().batches(seed, epoch + 1)


class Draws(ImageProgram):
  """Trains networks side by side, each from a seed of its own.

  Each trains as it would alone, up to the order in which numbers are summed.
  """

  def __init__(self, *args: Any, **options: Any):
    """Makes the program; nothing is compiled yet.

    Args:
      *args: As of `ImageProgram`.
      **options: As of `ImageProgram`.
    """
    super().__init__(*args, **options)
    self._side_by_side = Loop(jax.vmap(self._train_step, in_axes=(0, None, 0)))

  def accuracies(
    self, seeds: Sequence[int], epochs: int, on_epoch: Callable[[int, float], None]
  ) -> list[float]:
    """Trains from all seeds; returns the last accuracies on the validation images.

    A run is at nan where `benchmarks.engine` ends it as failed.

    Args:
      seeds: The seeds.
      epochs: Number of epochs.
      on_epoch: Called after each epoch with its number and the mean train loss.
    """
    snapshots, failed = self.train(seeds, epochs, on_epoch)
    accuracies = []
    for snapshot, lost in zip(snapshots, failed, strict=True):
      found = self.evaluate(snapshot, "validation")
      if not self.survives_divergence:
        lost = lost or not math.isfinite(found["loss"])
      accuracies.append(math.nan if lost else found["accuracy"])
    return accuracies

  def train(
    self, seeds: Sequence[int], epochs: int, on_epoch: Callable[[int, float], None]
  ) -> tuple[list[Snapshot], list[bool]]:
    """Trains from all seeds.

    Args:
      seeds: The seeds.
      epochs: Number of epochs.
      on_epoch: As of `accuracies`.

    Returns:
      What predictions need, by seed; and whether a train loss was not finite, which
      `survives_divergence` excuses.
    """
    state = jax.device_put(_stack([self.init(seed, None) for seed in seeds], axis=0))
    finite = np.ones(len(seeds), bool)
    for epoch in range(1, epochs + 1):
      batches = _stack([self.batches(seed, epoch) for seed in seeds], axis=1)
      state, outputs = self._side_by_side(state, self.data, batches)
      losses = np.asarray(outputs["loss"])  # (steps, seeds)
      finite &= np.isfinite(losses).all(axis=0)
      on_epoch(epoch, float(losses.mean()))
    states, snapshots = jax.device_get(state), []
    for i, seed in enumerate(seeds):
      one = jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), states)
      snapshots.append(self.snapshot(one, seed, epochs))
    return snapshots, [not (ok or self.survives_divergence) for ok in finite.tolist()]


class WatchedSnapshot(NamedTuple):
  """What predictions need, and what the guard has done.

  Attributes:
    predictions: The former.
    units_guarded: Share of the units that it stopped at least once.
    guard_trips: How often it stopped any.
  """

  predictions: Snapshot
  units_guarded: Any
  guard_trips: Any


class Watched(ImageProgram):
  """Tells beside the loss whether parameters are finite, and what a guard does."""

  def snapshot(self, state: State, seed: int, epoch: int) -> WatchedSnapshot:
    """Returns what predictions need, and what the guard has done.

    Args:
      state: The state after `epoch`.
      seed: Seed of the run.
      epoch: Number of the epoch; 0 before training.
    """
    scalars = alrao_jax.scalars(state.opt_state)
    return WatchedSnapshot(
      super().snapshot(state, seed, epoch),
      scalars.get("alrao/units_guarded", np.zeros([], np.float32)),
      scalars.get("alrao/guard_trips", np.zeros([], np.int32)),
    )

  def evaluate(self, snapshot: WatchedSnapshot, part: str) -> dict[str, float]:
    """Returns ``loss``, ``accuracy``, ``parameters_finite`` (0 or 1) and the guard's.

    Args:
      snapshot: What `snapshot` returned.
      part: As of `ImageProgram`.
    """
    leaves = jax.device_get(jax.tree.leaves(snapshot.predictions.params))
    return {
      **super().evaluate(snapshot.predictions, part),
      "parameters_finite": float(all(np.isfinite(leaf).all() for leaf in leaves)),
      "units_guarded": float(snapshot.units_guarded),
      "guard_trips": float(snapshot.guard_trips),
    }


def _stack(trees: Sequence[PyTree], axis: int) -> PyTree:
  return jax.tree.map(lambda *leaves: np.stack(leaves, axis), *trees)
