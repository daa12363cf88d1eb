"""Trains a short task with one optimizer: compiled once, for many seeds and rates."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import alrao_jax
from benchmarks.arena.problem import Data, Part, Task
from benchmarks.loops import Loop
from benchmarks.optimizers import Optimizer, Setting
from benchmarks.records import Record

PyTree = Any

NUM_POINTS = 8  # of a run's curve
EVALUATION_BATCH = 100  # in 500 the transformer takes twice as long on a CPU
STATISTICS_BATCH = 500
# All batch normalisation of `benchmarks.models` keeps .9 of its averages at a step, so
# that from zero one batch leaves a tenth of its own statistics.
STATISTICS_SHARE = 0.1
MIN_HEAD_WEIGHT = 0.05  # of a head that counts in a mean, which one far off would ruin


class State(NamedTuple):
  """All that training changes."""

  params: PyTree
  batch_stats: PyTree
  opt_state: optax.OptState


class Snapshot(NamedTuple):
  """All that predictions need; `log_weights` is empty without heads."""

  params: PyTree
  batch_stats: PyTree
  log_weights: jax.Array


class Start(NamedTuple):
  """What tells the runs of one program apart.

  Attributes:
    seed: Of initial weights, Alrao's rates, and the order of examples.
    rate: Learning rate, where the optimizer takes one.
  """

  seed: int
  rate: Any = None


class Program:
  """A task and an optimizer.

  Runs whose network has no convolution may be trained side by side, by `jax.vmap`.

  Attributes:
    side_by_side: Whether they are.
  """

  def __init__(
    self,
    task: Task,
    data: Data,
    optimizer: Optimizer,
    *,
    any_rate: Any = 1.0,
    side_by_side: bool = True,
  ):
    """Makes the program; nothing is compiled yet.

    Args:
      task: The task.
      data: Its data.
      optimizer: The optimizer.
      any_rate: A rate that `optimizer` could be given.
      side_by_side: Whether to train several runs at once, if the network allows it.
        Another number of runs is then another compilation.
    """
    self._task, self._optimizer = task, optimizer
    num_heads = optimizer.num_heads if optimizer.has_heads else None
    self._model = task.model(data.num_outputs, num_heads)
    self._train_size = len(data.train.targets)
    self._parts: dict[str, Any] = {
      name: jax.device_put(getattr(data, name))
      for name in ("train", "validation", "test")
    }
    self._regression = np.issubdtype(data.train.targets.dtype, np.floating)
    # The variance of standardised numbers, or equal probabilities.
    self._chance = 1.0 if self._regression else math.log(data.num_outputs)
    example = _floats(self._parts["train"].inputs[:1])
    self._init_network = jax.jit(
      lambda key: self._model.init(key, example, train=False)
    )
    shapes = jax.eval_shape(self._init_network, jax.random.key(0))
    self._has_batch_norm = "batch_stats" in shapes
    # Updates read key and rate from their state, so any will do here.
    self._update = optax.with_extra_args_support(
      self._make_optimizer(jax.random.key(0), any_rate)
    ).update
    self.side_by_side = side_by_side and not task.has_convolutions
    # Within a scan, a CPU is slow at convolutions only.
    scan = None if task.has_convolutions else True
    self._steps = Loop(self._each(self._train_step, (0, None, 0)), scan=scan)
    self._snapshot = jax.jit(self._each(self._make_snapshot, (0, None)))
    self._sums = jax.jit(self._each(self._evaluate_batch, (0, None, None, None)))

  def run(
    self, starts: Sequence[Start], parts: Sequence[str] = ("validation", "test")
  ) -> list[Record]:
    """Trains.

    Args:
      starts: The runs.
      parts: The parts of the data on which the curve is measured.

    Returns:
      A record for each run: ``steps`` of the curve, ``<part>_loss`` and ``train_loss``
      at these, ``chance`` (the loss of knowing nothing), ``head_weights`` at the end,
      and ``seconds`` (a run's share of all that the program took). Losses that are not
      finite are None.
    """
    if self.side_by_side:
      return self._train(list(starts), parts)
    return [record for start in starts for record in self._train([start], parts)]

  def time_steps(self, start: Start, num_steps: int) -> Callable[[], float]:
    """Returns a function that trains on, and returns the seconds that it took.

    Args:
      start: The run.
      num_steps: Number of steps in a call.
    """
    data = (self._parts["train"],)
    states, batches = self._begin([start])
    batches = jax.tree.map(lambda x: x[:num_steps], batches)

    def measure() -> float:
      nonlocal states
      begun = time.perf_counter()
      states, _ = self._steps(states, *data, batches)
      jax.block_until_ready(states)
      return time.perf_counter() - begun

    measure()  # compiles
    return measure

  def _train(self, starts: list[Start], parts: Sequence[str]) -> list[Record]:
    begun = time.perf_counter()
    states, batches = self._begin(starts)
    stops = np.linspace(0, self._task.num_steps, NUM_POINTS + 1).astype(int)
    curves: dict[str, list] = {f"{part}_loss": [] for part in ("train", *parts)}
    snapshots: Any = None
    for first, last in zip(stops[:-1], stops[1:], strict=True):
      piece = jax.tree.map(lambda x, a=first, b=last: x[a:b], batches)
      states, losses = self._steps(states, self._parts["train"], piece)
      curves["train_loss"].append(losses.reshape(last - first, -1).mean(axis=0))
      snapshots = self._snapshot(states, self._parts["train"].inputs)
      for part in parts:
        curves[f"{part}_loss"].append(self._evaluate(snapshots, part))
    seconds = (time.perf_counter() - begun) / len(starts)
    weights = np.exp(snapshots.log_weights).reshape(len(starts), -1)
    return [
      {
        "seed": start.seed,
        "rate": start.rate,
        "steps": stops[1:].tolist(),
        **{name: _numbers(np.stack(curve)[:, i]) for name, curve in curves.items()},
        "chance": self._chance,
        "head_weights": _numbers(weights[i]),
        "seconds": round(seconds, 2),
      }
      for i, start in enumerate(starts)
    ]

  def _begin(self, starts: list[Start]) -> tuple[State, np.ndarray]:
    """The first states, and the indices of all batches."""
    states, orders = [], []
    for start in starts:
      init_key, rates_key = jax.random.split(jax.random.key(start.seed))
      variables = self._init_network(init_key)
      params = variables["params"]
      opt_state = self._make_optimizer(rates_key, start.rate).init(params)
      states.append(State(params, variables.get("batch_stats", {}), opt_state))
      generator = np.random.default_rng(start.seed)
      count = self._task.num_steps * self._task.batch_size
      epochs = -(-count // self._train_size)
      order = [generator.permutation(self._train_size) for _ in range(epochs)]
      shape = (self._task.num_steps, self._task.batch_size)
      orders.append(np.concatenate(order)[:count].astype(np.int32).reshape(shape))
    if not self.side_by_side:
      (state,), (order,) = states, orders
    else:
      state = jax.tree.map(lambda *leaves: np.stack(leaves), *states)
      order = np.stack(orders, axis=1)
    # Some optimizers keep the first parameters, yet a buffer can be donated only once.
    return jax.device_put(jax.tree.map(np.array, state)), order

  def _each(self, function: Callable, axes: tuple) -> Callable:
    return jax.vmap(function, in_axes=axes) if self.side_by_side else function

  def _train_step(self, state: State, train: Part, indices: jax.Array):
    inputs = _floats(train.inputs[indices])
    targets = train.targets[indices]
    log_weights = self._log_weights(state)

    def loss_fn(params):
      outputs, batch_stats = self._apply(params, state.batch_stats, inputs, train=True)
      if self._optimizer.has_heads:
        loss_of = (
          alrao_jax.regression_loss
          if self._regression
          else alrao_jax.classification_loss
        )
        loss, info = loss_of(outputs, targets, log_weights)
        extra = {"head_log_likelihoods": info.head_log_likelihoods}
        return loss, (extra, batch_stats)
      if self._regression:  # the same Gaussian, but for a constant
        loss = 0.5 * jnp.square(outputs - targets).sum(axis=-1).mean()
      else:
        loss = optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()
      return loss, ({}, batch_stats)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (extra, batch_stats)), grads = grad_fn(state.params)
    updates, opt_state = self._update(grads, state.opt_state, state.params, **extra)
    params = optax.apply_updates(state.params, updates)
    return State(params, batch_stats, opt_state), loss

  def _make_snapshot(self, state: State, inputs: jax.Array) -> Snapshot:
    """Where weights are averaged, with the statistics of a large batch for them."""
    params, batch_stats = state.params, state.batch_stats
    if self._optimizer.averaged_params is not None:
      params = self._optimizer.averaged_params(state.opt_state, params)
      if self._has_batch_norm:
        zeros = jax.tree.map(jnp.zeros_like, batch_stats)
        batch = _floats(inputs[:STATISTICS_BATCH])
        _, share = self._apply(params, zeros, batch, train=True)
        batch_stats = jax.tree.map(lambda x: x / STATISTICS_SHARE, share)
    return Snapshot(params, batch_stats, self._log_weights(state))

  def _evaluate(self, snapshots: Snapshot, part: str) -> np.ndarray:
    """The mean loss of each run, (runs,)."""
    inputs, targets = self._parts[part]
    total, size = 0.0, len(targets)
    for start in range(0, size, EVALUATION_BATCH):
      # Batches of one shape; what the last one repeats does not count.
      indices = np.arange(start, start + EVALUATION_BATCH)
      valid = indices < size
      batch = Part(inputs[indices % size], targets[indices % size])
      total = total + np.asarray(self._sums(snapshots, *batch, valid), np.float64)
    return np.reshape(total / size, -1)

  def _evaluate_batch(self, snapshot: Snapshot, inputs, targets, valid) -> jax.Array:
    outputs: Any = self._apply(
      snapshot.params, snapshot.batch_stats, _floats(inputs), train=False
    )[0]
    if self._regression:
      if self._optimizer.has_heads:
        outputs = alrao_jax.mixture_mean(
          outputs, snapshot.log_weights, min_weight=MIN_HEAD_WEIGHT
        )
      losses = jnp.square(outputs - targets)
    else:
      if self._optimizer.has_heads:
        log_probs = alrao_jax.mixture_log_probs(outputs, snapshot.log_weights)
      else:
        log_probs = jax.nn.log_softmax(outputs)
      losses = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    # An example of text has several targets: their mean counts.
    losses = losses.reshape(len(valid), -1).mean(axis=-1)
    return jnp.where(valid, losses, 0.0).sum()

  def _apply(self, params, batch_stats, inputs, *, train: bool):
    outputs, updated = self._model.apply(
      {"params": params, "batch_stats": batch_stats},
      inputs,
      train=train,
      mutable=["batch_stats"],
    )
    return outputs, updated.get("batch_stats", {})

  def _log_weights(self, state: State) -> jax.Array:
    if self._optimizer.has_heads:
      return alrao_jax.log_weights(state.opt_state)
    return jnp.zeros(0)

  def _make_optimizer(self, key: jax.Array, rate: Any):
    setting = Setting(key, rate, self._task.num_steps, self._has_batch_norm)
    return self._optimizer.make(setting)


def _floats(inputs: jax.Array) -> jax.Array:
  """Images, which are bytes, as numbers around 0; all else as it is."""
  if inputs.dtype == jnp.uint8:
    return (inputs.astype(jnp.float32) / 255 - 0.5) / 0.25
  return inputs


def _numbers(values: np.ndarray) -> list[float | None]:
  return [float(x) if np.isfinite(x) else None for x in values]
