"""The heads in an optimizer: their posterior, their own transformations, the best."""

import contextvars
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from . import _checks, _tree
from ._averaging import Averaging, switch
from ._multi_head import on_every_device
from ._tree import find_state, find_states, state_dtype


class TrackHeadsState(NamedTuple):
  """State of :func:`track_heads`.

  Attributes:
    log_weights: Shape ``(num_heads,)``, the log-posterior of the heads for the next
      step's loss. With several MultiHeads this and all other fields are dicts by their
      paths.
    averaging: State of the averaging, such as :class:`SwitchState`.
    diverged: Bool, shape ``(num_heads,)``: which heads had diverged in the last report.
    all_diverged_steps: int32 scalar, in how many reports all heads had diverged.
  """

  log_weights: Any
  averaging: Any
  diverged: Any
  all_diverged_steps: Any


# The averagings in an optimizer, which its init notes here for collapse().
_found: contextvars.ContextVar[list[Averaging] | None] = contextvars.ContextVar(
  "averagings", default=None
)


def averagings_of(optimizer: optax.GradientTransformation, params: Any) -> list[Any]:
  """The :class:`Averaging` of each :func:`track_heads` in an optimizer.

  Args:
    optimizer: An optimizer. Its ``init`` runs on shapes.
    params: Its parameters.
  """
  token = _found.set([])
  try:
    # A new function each time, since JAX caches the trace of a known one.
    jax.eval_shape(lambda params: optimizer.init(params), params)
    return _found.get() or []
  finally:
    _found.reset(token)


@_checks.refuses_removed
def track_heads(
  averaging: Averaging = switch(),
) -> optax.GradientTransformationExtraArgs:
  """Keeps the posterior over the heads, and makes the updates safe.

  This is the last transformation of a chain. Its ``update`` takes
  ``head_log_likelihoods``, which every loss of this library returns in its
  :class:`MixtureInfo`, and moves the posterior that :func:`log_weights` reads. An entry
  of this report means:

  - ``-inf`` (or ``+inf``): the head has diverged. It gets no update. If all heads have
    diverged, the posterior stays, and the body moves by its momentum alone.
  - NaN: the head was not observed, as in a batch without a weighted example or, where
    :func:`judges` tell, without a judge. It is updated as usual, and its weight stays.
    If no head was observed, the posterior stays.

  An update that would make its parameter non-finite becomes zero. Use
  :func:`keep_finite` for what you carry next to the parameters, such as the running
  averages of BatchNorm.

  Each call is one observation. If several batches make one observation, pass the mean
  of their reports, weighted by :attr:`MixtureInfo.num_examples`. Leave out batches that
  are skipped or observed nothing. Under :class:`optax.MultiSteps`, which averages the
  gradients but not the reports, sum over the micro-batches since the last update::

    counts = jnp.isfinite(info.head_log_likelihoods).any()
    n = jnp.where(counts, info.num_examples, 0.0)
    total += jnp.where(n > 0, n * info.head_log_likelihoods, 0.0)  # from 0 after each
    count += n                                                     # has_updated(...)
    report = total / count                       # NaN if nothing was seen of any batch

  Under ``jax.shard_map`` (``jax.pmap``) each device sees a part of the batch. Sum over
  the devices, as above over the micro-batches::

    report = jax.lax.psum(jnp.where(n > 0, n * info.head_log_likelihoods, 0.0), "data")
    report /= jax.lax.psum(n, "data")

  Args:
    averaging: How the posterior learns, an :class:`Averaging`.

  Returns:
    The transformation. Updates keep their sign. If the model has several
    :class:`~alrao_jax.linen.MultiHead` layers, each has its own posterior.
    ``head_log_likelihoods`` is then a mapping by their paths,
    ``{"actor": ..., "net/critic": ...}``, or by ends that no other path has, such as
    ``"critic"``.

  Raises:
    TypeError: At ``update``, without ``head_log_likelihoods``.
    ValueError: At ``init``, if the parameters hold no heads, or MultiHeads with
      different numbers of them; at ``update``, if ``head_log_likelihoods`` has another
      shape than ``(num_heads,)``, or does not name each MultiHead once.

  Example:
    >>> import alrao_jax as alrao, jax.numpy as jnp
    >>> params = {"out": {"alrao_heads": {"bias": jnp.zeros((2, 3))}}}
    >>> tracker = alrao.track_heads()
    >>> _, state = tracker.update(params, tracker.init(params), params,
    ...                           head_log_likelihoods=jnp.array([-0.5, -2.0]))
    >>> print(jnp.round(100 * jnp.exp(alrao.log_weights(state))))
    [66. 34.]

  Reference:
    Blier, Wolinski, Ollivier, `Learning with Random Learning Rates
    <https://arxiv.org/abs/1810.01322>`_, appendix A.
  """
  if not isinstance(averaging, Averaging):
    raise TypeError(
      "track_heads(averaging=...) must be an Averaging, such as "
      f"alrao_jax.switch(theta=0.999), got {averaging!r}."
    )

  def start(num_heads, dtype):
    state = averaging.init(num_heads, dtype)
    return TrackHeadsState(
      # A copy: a donated state must not hold one buffer twice.
      log_weights=jnp.copy(averaging.log_weights(state)),
      averaging=state,
      diverged=jnp.zeros([num_heads], bool),
      all_diverged_steps=jnp.zeros([], jnp.int32),
    )

  def init_fn(params):
    if (found := _found.get()) is not None:
      found.append(averaging)
    if not jax.tree.leaves(params):
      # optax.tree.map_params calls init with a leafless tree, to find the parameters in
      # the state. A single leaf takes the place of each field.
      return TrackHeadsState(*(jnp.zeros([]) for _ in TrackHeadsState._fields))
    num_heads = _tree.count_heads("track_heads()", params)
    if not num_heads:
      raise ValueError(
        "track_heads() found no heads: no parameter's path has the key 'alrao_heads'. "
        "Wrap the output layer in alrao_jax.linen.MultiHead or "
        "alrao_jax.nnx.MultiHead; for a model that is meant to have none, write "
        "alrao(..., heads=False)."
      )
    layers = _tree.layers_of("track_heads()", params)
    each = {layer: start(num_heads, state_dtype(params)) for layer in layers}
    return each.popitem()[1] if len(each) == 1 else by_name(each)

  def observe(state, log_likelihoods):
    log_likelihoods = on_every_device(log_likelihoods)
    new = averaging.update(state.averaging, log_likelihoods)
    weights = averaging.log_weights(new)
    # A user's own method may not know NaN and infinities.
    healthy, broken, not_all_diverged = jnp.stack(
      [jnp.isfinite(log_likelihoods), jnp.isnan(weights), ~jnp.isinf(log_likelihoods)]
    ).any(axis=1)
    learns = healthy & ~broken
    new, weights = jax.tree.map(
      functools.partial(jnp.where, learns),
      (new, weights),
      (state.averaging, state.log_weights),
    )
    steps = jnp.where(
      not_all_diverged,
      state.all_diverged_steps,
      optax.safe_increment(state.all_diverged_steps),
    )
    return TrackHeadsState(weights, new, jnp.isinf(log_likelihoods), steps)

  def update_fn(updates, state, params=None, *, head_log_likelihoods=None, **extra):
    del extra
    _tree.check_state("track_heads().update()", state, TrackHeadsState)
    observed = _checked_log_likelihoods(head_log_likelihoods, state.log_weights)
    several = isinstance(observed, dict)
    if several:
      each = {
        layer: observe(one, observed[layer]) for layer, one in by_layer(state).items()
      }
      new_state = by_name(each)
    else:
      new_state = observe(state, observed)

    def guard(path, update, *param):
      layer = _tree.head_name(_tree.path_of(path))
      if layer is not None:
        # The gradient of a diverged head is zero, but its momentum is not.
        diverged = new_state.diverged
        diverged = diverged[layer] if several else diverged
        diverged = diverged.reshape(diverged.shape + (1,) * (update.ndim - 1))
        update = jnp.where(diverged, jnp.zeros_like(update), update)
      result: Any = optax.apply_updates(param[0], update) if param else update
      return jnp.where(jnp.isfinite(result), update, jnp.zeros_like(update))

    trees = (updates,) if params is None else (updates, params)
    return jax.tree_util.tree_map_with_path(guard, *trees), new_state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def log_weights(opt_state: Any, name: str | None = None) -> jax.Array:
  """Returns the log-posterior of the heads, for the next loss and for predictions.

  Args:
    opt_state: State of an optimizer that holds one :func:`track_heads`, within any
      chain, mask, partition, ``MultiSteps``, ``inject_hyperparams``, or the
      ``opt_state`` of an ``nnx.Optimizer``.
    name: Which posterior, if the model has several MultiHeads: the path of one, such as
      ``"net/critic"``, or an end that no other path has, such as ``"critic"``. A
      MultiHead that is the whole model is named ``"alrao_heads"``.

  Returns:
    Shape ``(num_heads,)``; the exponentials sum to 1.

  Raises:
    ValueError: If ``opt_state`` holds no or several such states, or none of ``name``.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp
    >>> params = {"out": {"alrao_heads": {"bias": jnp.zeros((2, 3))}}}
    >>> opt_state = alrao.alrao(jax.random.key(0)).init(params)
    >>> jnp.exp(alrao.log_weights(opt_state)).tolist()
    [0.5, 0.5]
  """
  call = "log_weights()"
  found = find_state(opt_state, TrackHeadsState, "track_heads", call).log_weights
  if not isinstance(found, Mapping):
    if name is not None:
      raise ValueError(
        f"log_weights(name=...) chooses among several MultiHeads, got {name!r} for a "
        "state with one posterior: write log_weights(opt_state)."
      )
    return found
  return found[_tree.match_layer("log_weights(name=...)", name, found)]


def by_layer(state: TrackHeadsState) -> dict[Any, TrackHeadsState]:
  """The state of each MultiHead by its path; a single MultiHead has the key None."""
  if not isinstance(state.log_weights, Mapping):
    return {None: state}
  return {
    layer: TrackHeadsState(*(field[layer] for field in state))
    for layer in state.log_weights
  }


def by_name(each: Mapping[str, TrackHeadsState]) -> TrackHeadsState:
  """The states of several MultiHeads as one, each field a dict by their paths."""
  return TrackHeadsState(
    *(
      {name: getattr(state, field) for name, state in each.items()}
      for field in TrackHeadsState._fields
    )
  )


def _checked_log_likelihoods(given: Any, weights: Any) -> Any:
  """The log-likelihoods as arrays, one or by name, of the shapes of ``weights``."""
  call = "track_heads().update(head_log_likelihoods=...)"
  if given is None:
    raise TypeError(
      f"{call} is missing. Write optimizer.update(grads, opt_state, params, "
      "head_log_likelihoods=info.head_log_likelihoods), with the info that "
      "alrao_jax.classification_loss(...) and the other losses return; with linen's "
      "TrainState, use alrao_jax.linen.TrainState."
    )
  several = isinstance(weights, Mapping)
  if several != isinstance(given, Mapping):
    expected = f"a mapping by the paths {tuple(weights)}" if several else "one array"
    got = "one array" if several else f"a mapping by {tuple(given)}"
    raise ValueError(f"{call} must be {expected}, got {got}.")
  if several:
    # Now a plain dict, whatever mapping it was.
    given = _tree.match_layers(call, given, weights)
  arrays = jax.tree.map(jnp.asarray, given)
  for value, weight in zip(
    jax.tree.leaves(arrays), jax.tree.leaves(weights), strict=True
  ):
    if value.shape != weight.shape:
      raise ValueError(
        f"{call} must have shape {weight.shape}, one mean log-likelihood a head, got "
        f"{value.shape}."
      )
  return arrays


class PerHeadState(NamedTuple):
  """State of :func:`per_head`.

  Attributes:
    body: State of the inner transformation for the body.
    heads: Its states for the heads, stacked on axis 0.
  """

  body: Any
  heads: Any


@_checks.refuses_removed
def per_head(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Runs a transformation once on the body, and on each head as if it were alone.

  Use it for transformations that mix entries: clipping by the global norm, trust
  ratios, orthogonalised updates. Without it the heads' own gradients would enter the
  body's norm, and half of them come from heads that are too fast. Elementwise
  transformations such as :func:`optax.scale_by_adam` do not need it.

  Args:
    tx: The transformation. Each head has its own scalars (counters, norms). In a model
      without heads, everything is body.

  Returns:
    The transformation. Updates keep their sign.

  Raises:
    ValueError: At ``init``, if the heads disagree on their number.

  Example:
    >>> import alrao_jax as alrao, jax, optax
    >>> optimizer = optax.chain(
    ...   alrao.drop_diverged(),
    ...   alrao.per_head(optax.clip_by_global_norm(1.0)), optax.trace(0.9),
    ...   alrao.scale_by_unit_rates(jax.random.key(0)), alrao.track_heads())
  """
  tx = optax.with_extra_args_support(tx)

  def split(tree):
    def keep(wanted):
      def choose(path, leaf):
        is_head = _tree.head_name(_tree.path_of(path)) is not None
        return leaf if is_head == wanted else optax.MaskedNode()

      return jax.tree_util.tree_map_with_path(choose, tree)

    return keep(False), keep(True)

  def init_fn(params):
    body, stacked = split(params)
    num_heads = _tree.count_heads("per_head()", params)
    init = jax.vmap(tx.init) if num_heads else tx.init
    return PerHeadState(body=tx.init(body), heads=init(stacked))

  def update_fn(updates, state, params=None, **extra_args):
    _tree.check_state("per_head().update()", state, PerHeadState)
    body, stacked = split(updates)
    body_params, stacked_params = (None, None) if params is None else split(params)
    body, body_state = tx.update(body, state.body, body_params, **extra_args)

    def update_head(updates, state, params):
      return tx.update(updates, state, params, **extra_args)

    update = jax.vmap(update_head) if jax.tree.leaves(stacked) else update_head
    stacked, heads_state = update(stacked, state.heads, stacked_params)
    merged = jax.tree.map(
      lambda b, h: h if isinstance(b, optax.MaskedNode) else b,
      body,
      stacked,
      is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    return merged, PerHeadState(body=body_state, heads=heads_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@dataclasses.dataclass(frozen=True)
class Hopeful:
  """Which heads are worth keeping; see :func:`hopeful`.

  Attributes:
    risk: See :func:`hopeful`.
    sizes: See :func:`hopeful`.
  """

  risk: float
  sizes: tuple[int, ...]


def hopeful(risk: float = 0.05, *, sizes: Sequence[int] = (5, 2, 1)) -> Hopeful:
  r"""The heads that the posterior still gives hope; the others leave at a stated risk.

  Heads may be thrown away early, say the papers, and with a large output layer they are
  most of a step's cost. Give the rule to :func:`collapse` every so many steps, between
  two steps of the training loop. Most calls only look at the posterior, and return
  their arguments. Now and then one removes heads, and the training step compiles anew::

    for step, batch in enumerate(batches):
      params, opt_state, loss = train_step(params, opt_state, batch)
      if step % 50 == 49:
        opt_state, params = alrao.collapse(
            optimizer, opt_state, params, keep=alrao.hopeful())

  Each of the :math:`n` ``sizes`` has an equal share of the ``risk``. The best heads
  stay, of :math:`N`, in the smallest number :math:`k` of ``sizes`` for which the
  posterior weight of the others is at most the shares from there on,

  .. math::
    \sum_{j \text{ leaves}} a_j \le \frac{\text{risk}}{n}
      \left|\{s \in \text{sizes} : k \le s < N\}\right| .

  So every share is spent once: all removals together throw away at most the weight
  ``risk``. If the posterior is right, this bounds the probability that the right head
  is among those that leave, at the time they leave. And a removal changes the mixture's
  probability of any event at the next step by at most the weight thrown away.

  The risk does not count that a lost head might have become the right one later. The
  prior of :func:`switch` allows for that: after :math:`t` steps, each head has at least
  a weight of about :math:`1 / (N (t + 1))`, since the sequences that switch just now
  share equally. So nothing leaves before the posterior had time to learn: by default,
  ten heads stay for the first 17 steps or so. This time is inversely proportional to
  ``risk``.

  Args:
    risk: Greatest posterior weight, in ``(0, 1)``, that all removals together throw
      away.
    sizes: Numbers of heads to stop at, each at least 1, in any order. Few, since the
      training step compiles once for each that it stops at.

  Returns:
    The rule, for the argument ``keep`` of ``alrao_jax.collapse``,
    ``alrao_jax.linen.collapse`` and ``alrao_jax.nnx.collapse``. With several
    MultiHeads, which keep the same heads, their thrown weights add up.

  Raises:
    ValueError: If ``risk`` is out of its range, or a size below 1, or there is none.
    TypeError: If ``risk`` is no number, or a size no integer.

  Example:
    >>> import alrao_jax as alrao, jax.numpy as jnp
    >>> params = {"out": {"alrao_heads": {"bias": jnp.zeros((3, 2))}}}
    >>> optimizer = alrao.track_heads(alrao.bayes())
    >>> _, state = optimizer.update(params, optimizer.init(params), params,
    ...                             head_log_likelihoods=jnp.array([-9.0, -2.0, -1.0]))
    >>> _, fewer = alrao.collapse(optimizer, state, params, keep=alrao.hopeful())
    >>> fewer["out"]["alrao_heads"]["bias"].shape  # weights of 0.0002, 0.27 and 0.73
    (2, 2)

  Reference:
    Blier, Wolinski, Ollivier, `Learning with Random Learning Rates
    <https://arxiv.org/abs/1810.01322>`_, appendix A.
  """
  _checks.check_probability("hopeful()", "risk", risk, open=True)
  if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not sizes:
    raise ValueError(
      f"hopeful(sizes=...) must be numbers of heads, such as (5, 2, 1), got {sizes!r}."
    )
  for size in sizes:
    _checks.check_count("hopeful()", "sizes", size)
  return Hopeful(float(risk), tuple(dict.fromkeys(int(size) for size in sizes)))


def best_heads(opt_state: Any, keep: int | Hopeful = 1) -> tuple[int, ...]:
  """Returns the heads with the largest posterior weights.

  Args:
    opt_state: State of an optimizer that holds one :func:`track_heads`. Its values must
      be known, so call this outside of ``jax.jit``.
    keep: How many, 1 to ``num_heads``; or ``alrao.hopeful()``, those that the posterior
      gives hope, which may be all.

  Returns:
    Their indices, ascending. Among heads with equal weights, slower heads win.
    With several MultiHeads, the product of their posteriors decides for a number of
    heads; see :func:`hopeful` for the rule.

  Raises:
    ValueError: If ``keep`` is below 1 or above ``num_heads``; if ``opt_state`` holds
      no posterior, or one for each of several seeds.
    TypeError: If ``keep`` is no integer, or the posterior is traced.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp
    >>> params = {"out": {"alrao_heads": {"bias": jnp.ones((3, 2))}}}
    >>> tracker = alrao.track_heads()
    >>> _, state = tracker.update(params, tracker.init(params), params,
    ...                           head_log_likelihoods=jnp.array([-2.0, -1.0, -1.5]))
    >>> alrao.best_heads(state, keep=2)
    (1, 2)
  """
  if isinstance(keep, Hopeful):
    return _hopeful_heads(keep, _known_posteriors(opt_state))
  _checks.check_count("best_heads()", "keep", keep)
  joint = np.sum(_known_posteriors(opt_state), axis=0)
  if keep > joint.size:
    raise ValueError(
      f"best_heads(keep=...) must be at most num_heads = {joint.size}, got {keep}."
    )
  return tuple(sorted(np.argsort(-joint, stable=True)[:keep].tolist()))


def _hopeful_heads(rule: Hopeful, log_weights: np.ndarray) -> tuple[int, ...]:
  """The heads that a rule keeps, of log-weights (MultiHeads, heads)."""
  weights = np.exp(log_weights).sum(axis=0)
  order = np.argsort(-weights, stable=True)  # among equals, slower heads win
  for size in sorted(rule.sizes):
    shares = sum(size <= other < weights.size for other in rule.sizes)
    thrown = weights[order[size:]].sum()
    if shares and thrown <= rule.risk * shares / len(rule.sizes):
      return tuple(sorted(order[:size].tolist()))
  return tuple(range(weights.size))


def _known_posteriors(opt_state: Any) -> np.ndarray:
  """The log-weights of each MultiHead, in float64, (MultiHeads, heads)."""
  call = "best_heads()"
  find_state(opt_state, TrackHeadsState, "track_heads", call)  # an error without one
  each = list(posteriors(call, opt_state).values())
  if any(isinstance(weights, jax.core.Tracer) for weights in each):
    raise TypeError(
      "best_heads(opt_state) must know the posterior, got traced values: it fixes the "
      "shapes of what is kept. Call it, or collapse(...), between two steps, outside "
      "of jax.jit, and give the indices to what is compiled."
    )
  return np.stack([np.asarray(weights, np.float64) for weights in each])


class Leader(NamedTuple):
  """Who leads and for how long; see :func:`follow_leader`.

  Attributes:
    head: int32 scalar, the head with the largest weight.
    steps: int32 scalar, for how many calls in a row it has had a weight of at least
      the threshold.
  """

  head: jax.Array
  steps: jax.Array


def follow_leader(
  log_weights: ArrayLike, last: Leader | None = None, *, threshold: float = 0.95
) -> Leader:
  """Counts for how many steps in a row one head has had almost all the weight.

  It is for rules of your own about when to :func:`collapse` (:func:`hopeful` is one
  that needs no numbers): call it in the compiled training step, carry its result, and
  read it once in a while. The ``threshold`` and the 200 steps below are no
  recommendation: each task needs its own::

    leader = alrao.follow_leader(alrao.log_weights(opt_state))     # before training
    leader = alrao.follow_leader(alrao.log_weights(opt_state), leader)  # in each step
    if leader.steps >= 200:                                        # after an epoch
      opt_state, params = alrao.collapse(optimizer, opt_state, params, keep=1)

  Args:
    log_weights: Shape ``(num_heads,)``, from :func:`log_weights`.
    last: What the last call returned; None before the first step.
    threshold: Weight, in ``[0, 1]``, that counts as almost all.

  Returns:
    The new :class:`Leader`.

  Raises:
    ValueError: If ``threshold`` is outside ``[0, 1]``; if ``log_weights`` does not
      have one axis.

  Example:
    >>> import alrao_jax as alrao, jax.numpy as jnp
    >>> leader = None
    >>> for weight in (0.5, 0.97, 0.99):
    ...   log_weights = jnp.log(jnp.array([1 - weight, weight]))
    ...   leader = alrao.follow_leader(log_weights, leader)
    >>> int(leader.head), int(leader.steps)
    (1, 2)
  """
  call = "follow_leader()"
  _checks.check_probability(call, "threshold", threshold)
  if isinstance(log_weights, Mapping):
    raise ValueError(
      f"{call[:-1]}log_weights=...) must be those of one MultiHead, got a mapping by "
      f"{tuple(log_weights)}. Of several MultiHeads, follow each by itself."
    )
  if not hasattr(log_weights, "shape") and not _checks.is_concrete(log_weights):
    raise TypeError(
      f"{call[:-1]}log_weights=...) must be an array, got a "
      f"{type(log_weights).__name__}. Write "
      "follow_leader(alrao_jax.log_weights(opt_state), last)."
    )
  if last is not None and not isinstance(last, Leader):
    raise TypeError(
      f"{call[:-1]}last=...) must be a Leader, got a value of type "
      f"{type(last).__name__}. Write alrao_jax.Leader(head, steps) for one that was "
      "restored without its type, None before the first step."
    )
  weights = jnp.asarray(log_weights)
  if weights.ndim != 1:
    raise ValueError(
      "follow_leader(log_weights=...) must have shape (num_heads,), got "
      f"{weights.shape}. Of several MultiHeads, follow each by itself."
    )
  head = jnp.argmax(weights).astype(jnp.int32)
  steps = jnp.zeros([], jnp.int32)
  if last is not None:
    steps = jnp.where(head == last.head, last.steps, steps)
  leads = jnp.exp(weights[head]) >= threshold
  return Leader(head, jnp.where(leads, optax.safe_increment(steps), 0))


def posteriors(call: str, opt_state: Any) -> dict[str | None, jax.Array]:
  """The log-weights by the paths of the MultiHeads; a single one has the key None.

  Raises:
    ValueError: If there are several posteriors, or one for each of several seeds.
  """
  if not find_states(opt_state, TrackHeadsState):
    return {}
  found = find_state(opt_state, TrackHeadsState, "track_heads", call).log_weights
  layers: dict[str | None, jax.Array] = (
    dict(found) if isinstance(found, Mapping) else {None: found}
  )
  for log_weights in layers.values():
    check_one_seed(call, log_weights, "num_heads")
  return layers


def tracked_heads(opt_state: Any) -> dict[str | None, TrackHeadsState]:
  """The states of the MultiHeads by path; a single one has the key None."""
  states = find_states(opt_state, TrackHeadsState)
  return by_layer(states[0]) if states else {}


def check_one_seed(call, vector, length):
  """Refuses a vector from a state that was made under ``jax.vmap``."""
  if vector.ndim != 1:
    raise ValueError(
      f"{call} needs the state of one seed, with a vector of shape ({length},), got "
      f"shape {vector.shape}. Index one seed: jax.tree.map(lambda x: x[i], opt_state)."
    )
