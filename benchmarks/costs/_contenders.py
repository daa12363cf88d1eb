"""What takes steps: networks on a batch of noise, and what trains them.

`BareMLPWorkload` is the arithmetic of Alrao on one network, written down with nothing
around it: what the library's structure costs shows beside it.
"""

import gc
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

import alrao_jax
from benchmarks.data.dataset import Split, Splits
from benchmarks.data.text_files import Level, Text
from benchmarks.methods import METHODS, Method
from benchmarks.models import build_model
from benchmarks.models.language import OutputLayer, build_language_model
from benchmarks.models.layers import Classifier
from benchmarks.workloads.images import (
  ClassifierWorkload,
  ImageData,
  ImageWorkload,
  State,
)
from benchmarks.workloads.short import (
  CONTEXT,
  LENGTH,
  SHORT_TASKS,
  VOCABULARY,
  Examples,
  ShortData,
  ShortWorkload,
)
from benchmarks.workloads.text import TextWorkload

PyTree = Any

RATE = 1e-3  # SGD's; small, so that no network diverges on its one batch of noise


class Contender(NamedTuple):
  """One optimizer on one network.

  Attributes:
    label: Its name.
    optimizer: Name of its method, of `benchmarks.methods`.
    num_heads: Number of heads; None for an ordinary output layer.
    keep: Number of heads that are left when the time is taken; None for all.
    bare: Whether the library is left out, on the MLP; see `BareMLPWorkload`.
  """

  label: str
  optimizer: str
  num_heads: int | None = None
  keep: int | None = None
  bare: bool = False


SGD = Contender("SGD", "sgd")
AGAIN = Contender("SGD again", "sgd")  # how far two equal programs come out apart
PEERS = (
  Contender("Adam", "adam"),
  Contender("Prodigy", "prodigy"),
  Contender("schedule-free AdamW", "schedule_free_adamw"),
)


def alrao(*num_heads: int) -> tuple[Contender, ...]:
  """Returns Alrao with several numbers of heads.

  Args:
    *num_heads: The numbers.
  """
  return tuple(
    Contender(f"Alrao, {n} head{'s' * (n > 1)}", "alrao", n) for n in num_heads
  )


def collapsed(num_heads: int) -> Contender:
  """Returns Alrao after `alrao_jax.collapse` has left one head.

  Args:
    num_heads: How many there were.
  """
  return Contender(f"Alrao, 1 head left of {num_heads}", "alrao", num_heads, keep=1)


def bare(num_heads: int) -> Contender:
  """Returns the arithmetic of Alrao with none of the library around it.

  Args:
    num_heads: Number of heads.
  """
  return Contender(f"bare arithmetic, {num_heads} heads", "alrao", num_heads, bare=True)


def with_heads(num_heads: int) -> tuple[Contender, ...]:
  """Returns SGD and schedule-free AdamW on a network with heads and their losses.

  They are what Alrao's own parts are compared with: all else is the same. Only
  `ShortNetwork` knows them.

  Args:
    num_heads: Number of heads.
  """
  return (
    Contender(f"SGD, {num_heads} heads", "sgd", num_heads),
    Contender(
      f"schedule-free AdamW, {num_heads} heads", "schedule_free_adamw", num_heads
    ),
  )


class Network(Protocol):
  """A network at one size, and one batch for it."""

  @property
  def title(self) -> str:
    """What it is, for a table's heading."""
    ...

  def workload(
    self, contender: Contender
  ) -> "ImageWorkload | ShortWorkload | StreamedNoise | TextWorkload":
    """Returns the workload of its benchmark, on one batch of noise.

    Args:
      contender: What trains it.
    """
    ...

  def output_bytes(self, num_heads: int | None) -> int:
    """Returns the bytes of all outputs that a step holds at once.

    Args:
      num_heads: Number of heads; None for an ordinary output layer.
    """
    ...


class ImageNetwork(NamedTuple):
  """A network that classifies images.

  Attributes:
    network: Its name in `benchmarks.models`.
    width: Factor on its channels.
    batch_size: Number of images in a step.
    side: Side of the images.
    channels: Channels of the images.
    num_classes: Number of classes.
    norm: Its normalisation.
    dtype: Of its computation.
    augmented: Whether images are shifted, and mirrored if they have colours.
    streamed: Whether a batch holds its images, as those read from files do; otherwise
      all images are on the device.
  """

  network: str
  width: float = 1.0
  batch_size: int = 32
  side: int = 32
  channels: int = 3
  num_classes: int = 10
  norm: Any = "batch"
  dtype: DTypeLike = jnp.float32
  augmented: bool = False
  streamed: bool = False

  @property
  def title(self) -> str:
    """What it is, for a table's heading."""
    kind = "" if self.dtype == jnp.float32 else f", {np.dtype(self.dtype).name}"
    size = (
      "" if self.side <= 32 else f", {self.side} pixels, {self.num_classes:,} classes"
    )
    return f"{self.network}, width {self.width:g}, batch {self.batch_size}{size}{kind}"

  def output_bytes(self, num_heads: int | None) -> int:
    """Returns the bytes of all outputs that a step holds at once.

    Args:
      num_heads: Number of heads; None for an ordinary output layer.
    """
    # The output layer is float32 always.
    return 4 * (num_heads or 1) * self.batch_size * self.num_classes

  def workload(self, contender: Contender) -> "ImageWorkload | StreamedNoise":
    """Returns the workload of the image benchmarks, on one batch of noise.

    Args:
      contender: What trains it.

    Raises:
      ValueError: It is to be bare, on another network than `BareMLPWorkload` knows.
    """
    if contender.bare and (self.network, self.norm) != ("mlp", "none"):
      raise ValueError(
        "ImageNetwork.workload(bare=True) knows the mlp without normalisation, got "
        f"{self.network} with norm={self.norm!r}."
      )
    model = build_model(
      self.network,
      self.num_classes,
      contender.num_heads,
      self.width,
      self.dtype,
      self.norm,
    )
    method, image = METHODS[contender.optimizer], (self.side, self.side, self.channels)
    if self.streamed:
      return StreamedNoise(
        model, method, image, self.batch_size, self.num_classes, self.dtype
      )
    generator = np.random.default_rng(0)
    batch = Split(
      generator.integers(0, 256, (self.batch_size, *image), dtype=np.uint8),
      generator.integers(0, self.num_classes, self.batch_size).astype(np.int32),
    )
    kind = BareMLPWorkload if contender.bare else ImageWorkload
    return kind(
      model,
      method,
      ImageData(Splits(batch, batch, batch)),
      batch_size=self.batch_size,
      max_epochs=1000,
      flip=self.augmented and self.channels > 1,
      augmented=self.augmented,
      dtype=self.dtype,
    )


class TextNetwork(NamedTuple):
  """A network that predicts a text's next symbol.

  Attributes:
    network: ``"lstm"`` or ``"decoder"``.
    length: Symbols of each stream in a step.
    vocabulary_size: Number of symbols; Penn Treebank has 50 characters.
    level: What they are.
    output_layer: The output layer.
    chunks: Into how many parts the positions are divided for the heads' outputs.
    batch_size: Number of streams.
  """

  network: Literal["lstm", "decoder"]
  length: int
  vocabulary_size: int = 50
  level: Level = "characters"
  output_layer: OutputLayer = "softmax"
  chunks: int = 1
  batch_size: int = 20

  @property
  def title(self) -> str:
    """What it is, for a table's heading."""
    return (
      f"{self.network}, {self.vocabulary_size:,} {self.level}, {self.batch_size} "
      f"streams of {self.length}"
    )

  def output_bytes(self, num_heads: int | None) -> int:
    """Returns the bytes of all outputs that a step holds at once.

    Args:
      num_heads: Number of heads; None for an ordinary output layer.
    """
    whole = 4 * self.batch_size * self.length * self.vocabulary_size
    return whole if num_heads is None else num_heads * whole // self.chunks

  def workload(self, contender: Contender) -> TextWorkload:
    """Returns the workload of the text benchmarks, on one batch of noise.

    Args:
      contender: What trains it.

    Raises:
      ValueError: It is to be bare, which only the MLP can be.
    """
    if contender.bare:
      raise ValueError(f"TextNetwork.workload(bare=True) knows no {self.network}.")
    generator = np.random.default_rng(0)
    size = self.batch_size * self.length + 1
    symbols = generator.integers(0, self.vocabulary_size, size).astype(np.int32)
    vocabulary = tuple(str(i) for i in range(self.vocabulary_size))
    model = build_language_model(
      self.network,
      self.vocabulary_size,
      context=self.length,
      output_layer=self.output_layer,
      num_heads=contender.num_heads,
      dropout=0.2,
    )
    return TextWorkload(
      model,
      METHODS[contender.optimizer],
      Text("noise", self.level, vocabulary, symbols, symbols, symbols, "noise"),
      batch_size=self.batch_size,
      length=self.length,
      epoch_steps=1,
      max_epochs=1000,
      num_validation=size,
      num_test=size,
      chunks=self.chunks,
    )


class StreamedNoise(ClassifierWorkload):
  """The step of the benchmarks whose images are read from files, on noise."""

  def __init__(
    self,
    model: Classifier,
    method: Method,
    image_shape: tuple[int, int, int],
    batch_size: int,
    num_classes: int = 2,
    dtype: DTypeLike = jnp.float32,
  ):
    """Makes the workload; nothing is compiled yet.

    Args:
      model: The network, with heads if the optimizer needs them.
      method: The optimizer.
      image_shape: Height, width and channels.
      batch_size: Number of images in a step.
      num_classes: Number of classes.
      dtype: Of the normalised images.
    """
    channels = image_shape[-1]
    super().__init__(
      model,
      method,
      num_train=batch_size,
      image_shape=image_shape,
      mean=np.zeros(channels),
      std=np.ones(channels),
      batch_size=batch_size,
      max_epochs=100,
      dtype=dtype,
      scan=False,  # as where they are read one by one
    )
    self.data = ()
    self._shape, self._num_classes = (batch_size, *image_shape), num_classes

  def batches(self, seed: int, epoch: int) -> dict[str, np.ndarray]:
    """Returns the only batch of an epoch: bytes, labels and a key.

    Args:
      seed: Seed of the run.
      epoch: Number of the epoch.
    """
    generator = np.random.default_rng([seed, epoch])
    labels = generator.integers(0, self._num_classes, self._shape[0])
    return {
      "images": generator.integers(0, 256, (1, *self._shape), dtype=np.uint8),
      "labels": labels.astype(np.int32)[None],
      "key": self._keys(seed, epoch),
    }

  def evaluate(self, snapshot: Any, part: str) -> dict[str, float]:
    """There is nothing to evaluate on."""
    raise NotImplementedError

  def _read(self, data, batch, *, train):
    del data, train
    return self._normalize(batch["images"]), batch["labels"]


class ShortNetwork(NamedTuple):
  """A network of the arena.

  Attributes:
    task: Its name in `benchmarks.workloads.short`.
  """

  task: str

  @property
  def title(self) -> str:
    """What it is, for a table's heading."""
    task = SHORT_TASKS[self.task]
    return f"{task.label} (noise in its place), batch {task.batch_size}"

  def output_bytes(self, num_heads: int | None) -> int:
    """Returns the bytes of all outputs that a step holds at once.

    Args:
      num_heads: Number of heads; None for an ordinary output layer.
    """
    batch_size, data = SHORT_TASKS[self.task].batch_size, self._noise()
    positions = data.train.targets[0].size if self.task == "gru" else 1
    return 4 * (num_heads or 1) * batch_size * positions * data.num_outputs

  def workload(self, contender: Contender) -> ShortWorkload:
    """Returns the workload of the arena, on noise of the shape of its data.

    Args:
      contender: What trains it. A method without heads gets some, if it has a number of
        them: with equal weights, which stay.

    Raises:
      ValueError: It is to be bare, which only the MLP can be.
    """
    if contender.bare:
      raise ValueError(f"ShortNetwork.workload(bare=True) knows no {self.task}.")
    method = METHODS[contender.optimizer]
    if contender.num_heads is not None:
      if not method.has_heads:
        method = method._replace(make=_with_posterior(method.make), has_heads=True)
      method = method._replace(num_heads=contender.num_heads)
    return ShortWorkload(SHORT_TASKS[self.task], self._noise(), method)

  def _noise(self) -> ShortData:
    generator, size = np.random.default_rng(0), 512
    floats = lambda *shape: generator.random((size, *shape), np.float32)  # noqa: E731
    symbols = lambda n, *shape: generator.integers(  # noqa: E731
      n, size=(size, *shape), dtype=np.int32
    )
    num_outputs = {"diabetes": 1, "gru": 50, "words": VOCABULARY}.get(self.task, 10)
    if self.task == "diabetes":
      examples = Examples(floats(10), floats(1))
    elif self.task == "digits":
      examples = Examples(floats(64), symbols(num_outputs))
    elif self.task == "gru":
      examples = Examples(*(symbols(num_outputs, LENGTH) for _ in range(2)))
    elif self.task == "words":
      examples = Examples(symbols(num_outputs, CONTEXT), symbols(num_outputs))
    else:
      images = symbols(256, 32, 32, 3).astype(np.uint8)
      examples = Examples(images, symbols(num_outputs))
    return ShortData(examples, examples, examples, num_outputs)


def _with_posterior(make: Any) -> Any:
  """Adds a posterior that never moves to a method's optimizer."""
  tracking = alrao_jax.track_heads()
  still = optax.GradientTransformation(
    tracking.init, lambda updates, state, params=None: (updates, state)
  )
  return lambda setting: optax.chain(make(setting), still)


class BareMLPWorkload(ImageWorkload):
  """Trains `benchmarks.models.mlp`, without normalisation, by Alrao on SGD.

  Here are no units to find (the rates are computed once, not from their quantiles at
  every step), no layer to wrap, no check that anything is finite, no chain of
  transformations. The product of the heads is in the order that the library takes on a
  CPU.
  """

  def init(self, seed: int, rate: Any) -> State:
    """Returns the state that training starts from, the library's.

    In place of the optimizer's state: a rate for each unit, of shapes that broadcast
    with the parameters', and the averaging's state.

    Args:
      seed: As in `ImageWorkload`.
      rate: None.
    """
    state = super().init(seed, rate)
    rates: Any = alrao_jax.unit_rates(state.opt_state, state.params)
    body = jax.tree.map(lambda x: x[:1] if x.ndim == 2 else x, rates["body"])
    heads = jax.tree.map(lambda x: x[:, :1], rates["output"])
    heads = jax.tree.map(lambda x: x[..., :1], heads)
    (num_heads,) = alrao_jax.log_weights(state.opt_state).shape
    switch = alrao_jax.switch().init(num_heads, jnp.float32)
    rates = {"body": body, "output": heads}
    return state._replace(opt_state=jax.tree.map(jnp.array, (rates, switch)))

  def _train_step(self, state: State, data: PyTree, batch: PyTree):
    inputs, targets = self._read(data, batch, train=True)
    opt_state: Any = state.opt_state
    rates, switch = opt_state
    averaging = alrao_jax.switch()
    log_weights = averaging.log_weights(switch)

    def loss_fn(params):
      x = inputs.reshape(len(inputs), -1)
      for layer in ("Dense_0", "Dense_1"):
        dense = params["body"][layer]
        x = jax.nn.relu(x @ dense["kernel"] + dense["bias"][None])
      heads = params["output"]["alrao_heads"]

      def log_probs(features, heads):
        logits = jnp.tensordot(heads["kernel"], features, axes=(1, 1))
        logits = logits.swapaxes(1, 2) + heads["bias"][:, None]
        return -jax.vmap(
          optax.softmax_cross_entropy_with_integer_labels, in_axes=(0, None)
        )(logits, targets)

      # The body descends the mixture's loss, each head its own.
      shared = log_probs(x, jax.lax.stop_gradient(heads))
      own = log_probs(jax.lax.stop_gradient(x), heads).mean(axis=1)
      mixture = jax.nn.logsumexp(shared + log_weights[:, None], axis=0).mean()
      return -mixture - own.sum(), (-mixture, own)

    grads, (loss, own) = jax.grad(loss_fn, has_aux=True)(state.params)
    params = jax.tree.map(lambda p, g, r: p - r * g, state.params, grads, rates)
    opt_state = (rates, averaging.update(switch, own))
    outputs = {"loss": loss, "head_weights": jnp.exp(log_weights)}
    return State(params, state.batch_stats, opt_state), outputs

  def _log_weights(self, state: State) -> jax.Array:
    opt_state: Any = state.opt_state
    return alrao_jax.switch().log_weights(opt_state[1])


class Competitor:
  """A contender's step, its state, and what XLA says of its cost.

  Attributes:
    trace_seconds: How long Python took to trace the step, at each compilation.
  """

  def __init__(self, network: Network, contender: Contender):
    """Makes the state; nothing is compiled yet.

    Args:
      network: The network.
      contender: The optimizer.
    """
    workload = network.workload(contender)
    state = workload.init(0, RATE if contender.optimizer == "sgd" else None)
    if contender.keep is not None:
      opt_state, params = alrao_jax.collapse(
        workload.make_optimizer(jax.random.key(0), None),
        state.opt_state,
        state.params,
        contender.keep,
      )
      state = state._replace(params=params, opt_state=opt_state)
    batch = jax.tree.map(lambda leaf: leaf[0], workload.batches(0, 1))
    # Not the loop's own step, which counts its traces.
    self._step: Callable[..., Any] = workload.step.step
    self._compiled: Any = None
    self.trace_seconds: list[float] = []
    self._has_heads = contender.num_heads is not None
    self._state, self._rest = state, (workload.data, batch)

  def compile(self) -> float:
    """Traces and compiles the step; returns the seconds it took.

    As for the first time in the process, where JAX's persistent cache is off: all its
    other caches are emptied. Compiled steps stay usable.
    """
    self._compiled = None
    jax.clear_caches()
    gc.collect()
    start = time.perf_counter()
    step = jax.jit(self._step, donate_argnums=0)
    traced = step.trace(self._state, *self._rest)
    self.trace_seconds.append(time.perf_counter() - start)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    self._compiled = compiled
    return seconds

  def costs(self) -> dict[str, float]:
    """Returns bytes and operations of the step, once compiled.

    Where there are heads, this compiles a second program.
    """
    return {
      "parameter_bytes": _bytes(self._state.params),
      "rates_bytes": _rates_bytes(self._state.opt_state),
      **_memory(self._compiled),
      # Without heads there is nothing to leave out: no second compilation.
      **_counts(
        _compile_usual(self._step, self._state, *self._rest)
        if self._has_heads
        else self._compiled
      ),
    }

  def run(self, steps: int) -> float:
    """Trains with the compiled step; returns the seconds it took.

    Args:
      steps: Number of steps.
    """
    start = time.perf_counter()
    for _ in range(steps):
      self._state, _ = self._compiled(self._state, *self._rest)
    jax.block_until_ready(self._state)
    return time.perf_counter() - start

  def timer(self, steps: int) -> Callable[[], float]:
    """Returns a function that trains for a turn, and returns the seconds a step took.

    Args:
      steps: Number of steps in a turn.
    """
    return lambda: self.run(steps) / steps


def _compile_usual(step: Any, *args: Any) -> Any:
  """A step in which no head diverges, for its operations and bytes.

  XLA counts both branches of a condition. The rule that MultiHead's gradient follows
  has one that runs only where a head is no longer finite; it is left out here.
  """
  with mock.patch.object(jax.lax, "cond", lambda _, usual, other, *args: usual(*args)):
    # Another function, or JAX would find the program it traced before.
    usual = jax.jit(lambda *args: step(*args), donate_argnums=0)
    return usual.lower(*args).compile()


def _counts(compiled: Any) -> dict[str, float]:
  found = compiled.cost_analysis()
  return {"flops": float(found["flops"]), "bytes": float(found["bytes accessed"])}


def _memory(compiled: Any) -> dict[str, float]:
  memory = compiled.memory_analysis()
  kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return {
    "peak_bytes": float(kept - memory.alias_size_in_bytes + memory.temp_size_in_bytes),
  }


def _bytes(tree: PyTree) -> float:
  return float(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))


def _rates_bytes(opt_state: Any) -> float:
  """Bytes of Alrao's rates, 0 without."""
  leaves = jax.tree.leaves(opt_state, is_leaf=_has_rates)
  rates = [leaf for leaf in leaves if _has_rates(leaf)]
  return float(sum(each.ladder.nbytes + each.quantiles.nbytes for each in rates))


def _has_rates(node: Any) -> bool:
  return isinstance(node, alrao_jax.ScaleByUnitRatesState)
