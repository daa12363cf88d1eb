"""Memory of a step with a large output layer, by number of chunks.

    python -m benchmarks cost memory
    python -m benchmarks cost memory --features 100 --num-classes 10000 --chunks 1 4 20

Ten heads' logits of 128 examples and 50,000 classes are 64 million numbers, and their
softmax and gradient as many again. `alrao_jax.chunked_mixture_loss` computes them chunk
by chunk, and again for the gradient. What XLA says of the compiled step is written
down, and the time that the step takes.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import alrao_jax
from benchmarks import records
from benchmarks.console import OptionError
from benchmarks.costs._cost import Cost, check_positive, render
from benchmarks.records import Record
from benchmarks.timing import in_turns


@dataclasses.dataclass(frozen=True)
class Layer:
  """An output layer and a batch for it."""

  features: int = 128
  """Features of an example."""
  num_classes: int = 50_000
  """Number of classes."""
  num_heads: int = 10
  """Number of heads."""
  batch_size: int = 128
  """Number of examples."""

  @property
  def name(self) -> str:
    """What tells it from others."""
    numbers = dataclasses.asdict(self).items()
    return "-".join(f"{name}_{number}" for name, number in numbers)

  def params(self, num_heads: int | None) -> dict[str, Any]:
    """Returns a body of one layer, and the output layer or its copies.

    Args:
      num_heads: Number of copies; None for an ordinary output layer.
    """
    keys = jax.random.split(jax.random.key(0))
    copies = () if num_heads is None else (num_heads,)
    body, output = (
      jax.random.normal(key, shape) / self.features**0.5
      for key, shape in zip(
        keys,
        [(self.features,) * 2, (*copies, self.features, self.num_classes)],
        strict=True,
      )
    )
    name = "output" if num_heads is None else "alrao_heads"
    return {"body": {"kernel": body}, name: {"kernel": output}}

  def batch(self) -> tuple[jax.Array, jax.Array]:
    """Returns inputs (batch_size, features) and labels (batch_size,)."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(self.batch_size, self.features))
    labels = generator.integers(0, self.num_classes, self.batch_size)
    return jnp.asarray(inputs, jnp.float32), jnp.asarray(labels, jnp.int32)


def plain_step(layer: Layer) -> tuple[Any, Any]:
  """Returns a step of SGD with an ordinary output layer, and its state.

  Args:
    layer: The output layer.
  """
  optimizer = optax.sgd(1e-3)
  params = layer.params(None)

  def step(state, inputs, labels):
    params, opt_state = state

    def loss_fn(params):
      features = jax.nn.relu(inputs @ params["body"]["kernel"])
      return -_log_prob(features @ params["output"]["kernel"], labels).mean()

    grads = jax.grad(loss_fn)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  return step, (params, optimizer.init(params))


def alrao_step(layer: Layer, chunks: int) -> tuple[Any, Any]:
  """Returns a step of Alrao, and its state.

  Args:
    layer: The output layer.
    chunks: Into how many parts the batch is divided; 1 for the whole at once.
  """
  # Small rates, so that no head diverges on its one batch of noise.
  optimizer = alrao_jax.alrao(jax.random.key(1), max_learning_rate=1e-2)
  params = layer.params(layer.num_heads)

  def step(state, inputs, labels):
    params, opt_state = state
    log_weights = alrao_jax.log_weights(opt_state)

    def loss_fn(params):
      kernels = params["alrao_heads"]["kernel"]
      features = jax.nn.relu(inputs @ params["body"]["kernel"])

      def evaluate(features):
        return alrao_jax.multi_head(lambda kernel, x: x @ kernel, kernels, features)

      if chunks == 1:
        return alrao_jax.mixture_loss(
          evaluate(features), lambda logits: _log_prob(logits, labels), log_weights
        )
      return alrao_jax.chunked_mixture_loss(
        evaluate,
        features,
        _log_prob,
        labels,
        log_weights,
        chunk_size=layer.batch_size // chunks,
      )

    grads, info = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(
      grads, opt_state, params, head_log_likelihoods=info.head_log_likelihoods
    )
    return optax.apply_updates(params, updates), opt_state

  return step, (params, optimizer.init(params))


def _log_prob(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return -optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


class LayerStep:
  """A compiled step and its state, with what XLA says of its memory.

  Attributes:
    row: Label, number of chunks, and bytes.
  """

  def __init__(self, layer: Layer, chunks: int | None):
    """Compiles the step and takes it once.

    Args:
      layer: The output layer.
      chunks: Number of chunks of Alrao's loss; None for plain SGD.
    """
    step, state = plain_step(layer) if chunks is None else alrao_step(layer, chunks)
    self._batch, self._state = jax.block_until_ready(layer.batch()), state
    lowered = jax.jit(step, donate_argnums=0).lower(state, *self._batch)
    self._step = lowered.compile()
    memory: Any = self._step.memory_analysis()
    self.row = {
      "label": "SGD" if chunks is None else f"Alrao, {layer.num_heads} heads",
      "chunks": chunks,
      "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
      "temporary_bytes": memory.temp_size_in_bytes,
    }
    self.run()

  def run(self) -> float:
    """Takes a step; returns the seconds it took."""
    start = time.perf_counter()
    self._state = jax.block_until_ready(self._step(self._state, *self._batch))
    return time.perf_counter() - start


def compare(layer: Layer, chunks: tuple[int, ...], rounds: int) -> list[Record]:
  """Returns memory and time of plain SGD and of Alrao by number of chunks.

  Args:
    layer: The output layer.
    chunks: Numbers of chunks.
    rounds: Number of steps that are timed, in turns.
  """
  steps = [LayerStep(layer, number) for number in (None, *chunks)]
  times = in_turns([step.run for step in steps], rounds)
  return [
    {
      **step.row,
      "milliseconds": 1e3 * float(np.median(times[:, j])),
      "ratio": float(np.median(times[:, j] / times[:, 0])),
    }
    for j, step in enumerate(steps)
  ]


@dataclasses.dataclass(frozen=True)
class Memory(Cost):
  """Measure memory and time of a step with a large output layer."""

  name = "memory"
  layer: Annotated[Layer, tyro.conf.arg(name="")] = Layer()
  chunks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
  """Numbers of chunks, each of which divides the number of examples."""
  rounds: int = 5
  """Number of turns of one step that each has."""

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: A number that is not positive, or does not divide the batch.
    """
    layer = self.layer
    check_positive(**dataclasses.asdict(layer), rounds=self.rounds, chunks=self.chunks)
    if any(layer.batch_size % number for number in self.chunks):
      raise OptionError(
        f"--chunks must divide --batch-size {layer.batch_size}, got {self.chunks}."
      )

  def measure(self) -> Iterator[tuple[str, Record]]:
    """Yields the layer's measurements."""
    found = {
      **dataclasses.asdict(self.layer),
      "rounds": self.rounds,
      "rows": compare(self.layer, self.chunks, self.rounds),
    }
    yield self.layer.name, found


def table(found: Record) -> str:
  """Returns the measurements as a Markdown table with its conditions.

  Args:
    found: The record.
  """
  header = [
    "",
    "chunks",
    "parameters and state, MB",
    "temporary, MB",
    "together",
    "ms a step",
    "/ SGD's",
  ]
  rows = []
  for row in found["rows"]:
    state, temporary = row["state_bytes"] / 1e6, row["temporary_bytes"] / 1e6
    rows.append(
      [
        row["label"],
        str(row["chunks"] or ""),
        f"{state:,.0f}",
        f"{temporary:,.0f}",
        f"{state + temporary:,.0f}",
        f"{row['milliseconds']:,.0f}",
        f"{row['ratio']:.2f}",
      ]
    )
  title = (
    f"Output layer of {found['num_classes']:,} classes on {found['features']} "
    f"features, batch {found['batch_size']}"
  )
  return render(title, header, rows, records.conditions(found))


COST = Memory
