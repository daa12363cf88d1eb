"""Training networks to predict a text's next symbol."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import alrao_jax
from alrao_jax import chunked_mixture_loss
from benchmarks.data.streams import cut
from benchmarks.data.text_files import Text
from benchmarks.methods import Heads, Method, Setting
from benchmarks.models.language import LanguageModel
from benchmarks.training import Loop, Workload, num_entries

PyTree = Any


class TextState(NamedTuple):
  """All that training changes.

  Attributes:
    params: Parameters of the network.
    carry: What the symbols read so far have left in the network, for each stream.
    opt_state: State of the optimizer; with Alrao, rates and posterior too.
  """

  params: PyTree
  carry: PyTree
  opt_state: optax.OptState


class TextSnapshot(NamedTuple):
  """All that predictions need.

  Attributes:
    params: Parameters, averaged where the optimizer says so.
    log_weights: Alrao's posterior that belongs to them, (num_heads,), else (0,).
  """

  params: PyTree
  log_weights: jax.Array


class TextWorkload(Workload):
  """Trains one network with one method.

  The training text is read as streams, side by side, segment by segment, and gradients
  end at a segment's start (truncated backpropagation). A recurrent network's carry goes
  on from segment to segment and starts at zero with each pass through the text. A
  network without carry reads the segments in random order. An epoch, which ends with
  validation, may be shorter than a pass; the next goes on from there.

  Validation and test text are read as as many streams, with carry over all of each.
  """

  def __init__(
    self,
    model: LanguageModel,
    method: Method,
    text: Text,
    *,
    batch_size: int,
    length: int,
    epoch_steps: int,
    max_epochs: int,
    num_validation: int,
    num_test: int,
    chunks: int = 1,
    clip: float | None = None,
  ):
    """Makes the workload; nothing is compiled yet.

    Args:
      model: The network, with heads if the optimizer needs them.
      method: The optimizer.
      text: What to train, validate and test on.
      batch_size: Number of streams.
      length: Symbols of each stream in a step.
      epoch_steps: Steps of an epoch.
      max_epochs: Maximum number of epochs, over which schedules run.
      num_validation: How many of the validation symbols to use, from the start.
      num_test: How many of the test symbols.
      chunks: Into how many parts, one after the other, a step's positions are divided
        for the heads' outputs; divides ``batch_size * length``.
      clip: Greatest norm of the gradient of the body, and of each head; None: any.
    """
    train = cut(text.train, batch_size, length, pad=False).symbols
    self.examples = text.level
    self.steps_per_epoch = epoch_steps
    self.examples_per_epoch = epoch_steps * batch_size * length
    self.survives_divergence = method.has_heads
    self.data = jax.device_put(train)
    self._parts = {
      "validation": cut(text.validation[:num_validation], batch_size, length, pad=True),
      "test": cut(text.test[:num_test], batch_size, length, pad=True),
    }
    self._model, self._method = model, method
    self._batch_size, self._length, self._chunks = batch_size, length, chunks
    self._num_segments = train.shape[1] // length
    self._num_steps, self._clip = max_epochs * epoch_steps, clip
    self._carry = functools.partial(model.body.initial_carry, batch_size)
    self._symbols = jnp.zeros((batch_size, length), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), self._symbols, self._carry())
    self.num_parameters = num_entries(shapes["params"])
    # Updates read key and rate from their state, so any will do here.
    optimizer = self.make_optimizer(jax.random.key(0), 1.0)
    self._update = optax.with_extra_args_support(optimizer).update
    self.heads: Heads = Heads(method, optimizer, shapes["params"])
    self.step = Loop(self._train_step, heads=self.heads)
    self._evaluate = Loop(self._evaluate_step)

  def init(self, seed: int, rate: float | None) -> TextState:
    """Returns the state that training starts from.

    Args:
      seed: Determines weights and Alrao's rates. Networks that differ only in their
        heads get the same body.
      rate: Learning rate, where the optimizer takes one.
    """
    init_key, rates_key, _ = _keys(seed)
    params = jax.jit(self._model.init)(init_key, self._symbols, self._carry())["params"]
    opt_state = self.make_optimizer(rates_key, rate).init(params)
    state = TextState(params, self._carry(), opt_state)
    # Some optimizers keep the first parameters, yet a buffer can be donated only once.
    return jax.device_put(jax.tree.map(np.array, state))

  def batches(self, seed: int, epoch: int) -> dict[str, np.ndarray]:
    """Returns an epoch's batches: indices of segments, and a key for dropout.

    Args:
      seed: Seed of the run.
      epoch: Number of the epoch.
    """
    steps = np.arange(self.steps_per_epoch) + (epoch - 1) * self.steps_per_epoch
    passes, segments = np.divmod(steps, self._num_segments)
    if not jax.tree.leaves(self._carry()):
      for number in np.unique(passes):
        order = np.random.default_rng([seed, number]).permutation(self._num_segments)
        segments[passes == number] = order[segments[passes == number]]
    _, _, batches_key = _keys(seed)
    keys = jax.random.split(
      jax.random.fold_in(batches_key, epoch), self.steps_per_epoch
    )
    return {
      "segment": segments.astype(np.int32),
      "key": np.asarray(jax.random.key_data(keys)),
    }

  def snapshot(self, state: TextState, seed: int, epoch: int) -> TextSnapshot:
    """Returns what predictions need.

    Args:
      state: The state after `epoch`.
      seed: Seed of the run.
      epoch: Number of the epoch; 0 before training.
    """
    del seed
    params, average = state.params, self._method.averaged_params
    if average is not None and epoch > 0:
      opt_state: Any = state.opt_state  # of a chain that ends with the optimizer
      params = average(opt_state[-1], params)
    return TextSnapshot(params, self._log_weights(state))

  def evaluate(self, snapshot: TextSnapshot, part: str) -> dict[str, float]:
    """Returns mean ``loss`` in nats, ``bits`` (the same in bits) and ``accuracy``.

    Args:
      snapshot: What predictions need.
      part: ``"validation"`` or ``"test"``.
    """
    streams = self._parts[part]
    segments = np.arange(streams.valid.shape[1] // self._length, dtype=np.int32)
    data = jax.device_put((snapshot, streams))
    _, sums = self._evaluate(self._carry(), data, {"segment": segments})
    count = int(streams.valid.sum())
    loss = float(sums["loss"].sum(dtype=np.float64)) / count
    accuracy = float(sums["correct"].sum()) / count
    return {"loss": loss, "bits": loss / math.log(2), "accuracy": accuracy}

  def _train_step(self, state: TextState, data, batch):
    inputs, targets = self._read(data, batch)
    is_first = batch["segment"] == 0
    # What is not finite in a carry would stay so until the pass ends.
    carry = jax.tree.map(
      lambda x: jnp.where(is_first | ~jnp.isfinite(x), 0, x), state.carry
    )
    log_weights = self._log_weights(state)

    rngs = {"dropout": jax.random.wrap_key_data(batch["key"])}

    def loss_fn(params):
      features, next_carry = self._features(params, inputs, carry, rngs)
      examples = (features.reshape(-1, features.shape[-1]), targets.reshape(-1))
      loss, extra = self._loss(params, examples, log_weights)
      return loss, (extra, next_carry)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (extra, carry)), grads = grad_fn(state.params)
    updates, opt_state = self._update(grads, state.opt_state, state.params, **extra)
    params = optax.apply_updates(state.params, updates)
    outputs = {"loss": loss, "head_weights": self.heads.weights(state.opt_state)}
    return TextState(params, carry, opt_state), outputs

  def _features(self, params, symbols, carry, rngs=None) -> Any:
    """The body's features and next carry; with dropout's random key, of training."""
    options = {"train": rngs is not None, "rngs": rngs, "method": "features"}
    return self._model.apply({"params": params}, symbols, carry, **options)

  def _loss(self, params, examples, log_weights):
    """Mean loss a symbol, and what else the optimizer takes."""
    is_softmax = self._model.output_layer == "softmax"

    def predict(examples) -> Any:
      args = examples[:1] if is_softmax else examples
      return self._model.apply({"params": params}, *args, method="predict")

    def log_prob(outputs, targets):
      return _log_softmax_at(outputs, targets) if is_softmax else outputs

    targets = examples[1]
    if not self._method.has_heads:
      return -log_prob(predict(examples), targets).mean(), {}
    if self._chunks > 1:
      size = len(targets) // self._chunks
      loss, info = chunked_mixture_loss(
        predict, examples, log_prob, targets, log_weights, chunk_size=size
      )
    else:
      loss, info = alrao_jax.mixture_loss(
        predict(examples), lambda outputs: log_prob(outputs, targets), log_weights
      )
    return loss, {"head_log_likelihoods": info.head_log_likelihoods}

  def _evaluate_step(self, carry, data, batch):
    snapshot, streams = data
    inputs, targets = self._read(streams.symbols, batch)
    start = batch["segment"] * self._length
    valid = jax.lax.dynamic_slice_in_dim(streams.valid, start, self._length, axis=1)
    features, carry = self._features(snapshot.params, inputs, carry)

    def score(examples):
      features, targets, valid = examples
      variables = {"params": snapshot.params}
      outputs: Any = self._model.apply(variables, features, method="predict")
      if self._method.has_heads:
        log_probs = alrao_jax.mixture_log_probs(outputs, snapshot.log_weights)
      else:
        log_probs = jax.nn.log_softmax(outputs)
      losses = -jnp.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0]
      correct = log_probs.argmax(axis=-1) == targets
      return {
        "loss": jnp.where(valid, losses, 0.0).sum(),
        "correct": jnp.sum(valid & correct),
      }

    chunked = jax.tree.map(
      lambda x: x.reshape(self._chunks, -1, *x.shape[2:]), (features, targets, valid)
    )
    sums = jax.lax.map(score, chunked)
    return carry, jax.tree.map(lambda x: x.sum(axis=0), sums)

  def _read(self, symbols, batch):
    """A segment's symbols (batch, length), and those that follow each."""
    start = batch["segment"] * self._length
    window = jax.lax.dynamic_slice_in_dim(symbols, start, self._length + 1, axis=1)
    return window[:, :-1], window[:, 1:]

  def make_optimizer(
    self, key: jax.Array, rate: float | None
  ) -> optax.GradientTransformation:
    """Returns the optimizer.

    Args:
      key: Where Alrao's rates are drawn from.
      rate: Learning rate, for optimizers that take one.
    """
    optimizer = self._method.make(Setting(key, rate, self._num_steps, False))
    before = []
    if self._clip is not None:
      if self._method.has_heads:
        before.append(alrao_jax.drop_diverged())  # or one entry would clip all to NaN
      before.append(alrao_jax.per_head(optax.clip_by_global_norm(self._clip)))
    return optax.chain(*before, optimizer)

  def _log_weights(self, state: TextState) -> jax.Array:
    return self._method.log_weights(state.opt_state)


def _log_softmax_at(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """The log-probabilities (n,) of the targets, of logits (n, vocabulary_size)."""
  # A masked sum fuses with the softmax, where a gather's gradient is a scatter.
  is_target = jnp.arange(logits.shape[-1])[None] == targets[:, None]
  chosen = jnp.where(is_target, logits, 0.0).sum(axis=-1)
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def _keys(seed: int) -> jax.Array:
  """Keys for the initial weights, Alrao's rates, and dropout."""
  return jax.random.split(jax.random.key(seed), 3)
