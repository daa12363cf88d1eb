"""The optimizer's side of the heads: their posterior, and a guard for the diverged."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import _units
from ._averaging import Averaging, switch
from ._state import find_state, state_dtype


class TrackHeadsState(NamedTuple):
  """State of :func:`track_heads`.

  Attributes:
    log_weights: Shape ``(num_heads,)``, the log-posterior of the heads, to be used for
      the next step's loss; a dict of such arrays where ``names`` were given.
    averaging: State of the averaging, such as :class:`SwitchState`; a dict likewise.
  """

  log_weights: Any
  averaging: Any


def track_heads(
  averaging: Averaging = switch(),
  *,
  heads: str = _units.HEADS_REGEX,
  names: Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Keeps the posterior over the heads; passes the updates through, made safe.

  The last transformation of a chain. Its ``update`` takes ``head_log_likelihoods``,
  which every loss of this library returns in its :class:`MixtureInfo`, and moves the
  posterior that :func:`log_weights` reads. A head whose report is not finite gets no
  update, and an update that would make its parameter non-finite becomes zero. With all
  heads out the posterior stands still, and the body moves by its momentum alone.

  Each call is one observation. Under :class:`optax.MultiSteps`, which averages the
  gradients but not ``head_log_likelihoods``, pass their mean over the micro-batches so
  far; under ``jax.shard_map``, their ``jax.lax.pmean`` over the devices.

  Args:
    averaging: How the posterior learns: :func:`switch`, :func:`bayes` or
      :func:`fixed_share`.
    heads: Regular expression for the paths of the heads' parameters, which have the
      heads on axis 0.
    names: Names of the model's :class:`~alrao_jax.linen.MultiHead` layers, where it
      has several. Each then has its own posterior, ``head_log_likelihoods`` is a
      mapping by name, and :func:`log_weights` takes the name.

  Returns:
    The transformation. Updates keep their sign.

  Raises:
    TypeError: At ``update``, without ``head_log_likelihoods``.
    ValueError: At ``init``, if the parameters hold no heads, several layers of heads
      and no ``names``, or others than ``names``; at ``update``, if
      ``head_log_likelihoods`` has another shape than ``(num_heads,)``.

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
  if isinstance(names, str):
    raise TypeError(f"track_heads(names=...) must be a tuple, write ({names!r},).")
  names = None if names is None else tuple(names)

  def start(num_heads, dtype):
    state = averaging.init(num_heads, dtype)
    # A copy: a donated state must not hold one buffer twice.
    return TrackHeadsState(jnp.copy(averaging.log_weights(state)), state)

  def init_fn(params):
    layers = _layers(params, heads)
    if not jax.tree.leaves(params):  # optax.tree.map_params: only structure counts
      num_heads = 1
    else:
      _check_layers(layers, names, heads)
      num_heads = next(iter(layers.values()))
    if names is None:
      return start(num_heads, state_dtype(params))
    each = {name: start(num_heads, state_dtype(params)) for name in names}
    return _by_name(each)

  def observe(averaging_state, log_likelihoods):
    new = averaging.update(averaging_state, log_likelihoods)
    return TrackHeadsState(averaging.log_weights(new), new)

  def update_fn(updates, state, params=None, *, head_log_likelihoods=None, **extra):
    del extra
    observed = _checked_log_likelihoods(head_log_likelihoods, state.log_weights)
    alive = jax.tree.map(jnp.isfinite, observed)
    if names is None:
      new_state = observe(state.averaging, observed)
    else:
      each = {name: observe(state.averaging[name], observed[name]) for name in names}
      new_state = _by_name(each)

    def guard(path, update, *param):
      layer = _units.head_name(_units.path_of(path), heads)
      if layer is not None:
        # The gradient of a head that is out is zero, but momentum would coast.
        keep = alive if names is None else alive[_match(layer, names)]
        keep = keep.reshape(keep.shape + (1,) * (update.ndim - 1))
        update = jnp.where(keep, update, jnp.zeros_like(update))
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
    name: Which posterior, where the optimizer was given ``names``.

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
  found = find_state(opt_state, TrackHeadsState, "track_heads").log_weights
  if not isinstance(found, Mapping):
    if name is not None:
      raise ValueError(
        f"log_weights(name=...) needs an optimizer with named posteriors, got {name!r}."
        f" Give it names=({name!r}, ...), or leave name= out."
      )
    return found
  if name not in found:
    raise ValueError(
      f"log_weights(name=...) must be one of {tuple(found)}, got {name!r}."
    )
  return found[name]


def _by_name(each):
  return TrackHeadsState(
    {name: state.log_weights for name, state in each.items()},
    {name: state.averaging for name, state in each.items()},
  )


def _layers(params, heads):
  """The number of heads of each MultiHead, by its path."""
  layers = {}
  for path, leaf in _units.flatten_with_paths(params)[0]:
    layer = _units.head_name(path, heads)
    if layer is not None:
      if not leaf.shape:
        raise ValueError(f"Parameters of heads need the heads on axis 0, got {path!r}.")
      layers.setdefault(layer, leaf.shape[0])
  return layers


def _check_layers(layers, names, heads):
  call = "track_heads()"
  if not layers:
    raise ValueError(
      f"{call} found no heads: no parameter's path matches {heads!r}. Wrap the output "
      "layer in alrao_jax.linen.MultiHead or alrao_jax.nnx.MultiHead; for a model that "
      "is meant to have none, write alrao(..., heads=None)."
    )
  if len(set(layers.values())) > 1:
    raise ValueError(
      f"{call} needs the same num_heads in every MultiHead, got {layers}."
    )
  if names is None:
    if len(layers) > 1:
      raise ValueError(
        f"{call} keeps one posterior, got several MultiHeads: {sorted(layers)}. Write "
        f"names={tuple(sorted(layers))!r}, pass head_log_likelihoods as a mapping by "
        "name, and ask for log_weights(opt_state, name)."
      )
    return
  matched = [_match(layer, names) for layer in layers]
  if sorted(matched) != sorted(names):
    raise ValueError(
      f"{call[:-1]}names=...) must name each MultiHead once, got {names} for the "
      f"layers {sorted(layers)}."
    )


def _match(layer, names):
  fits = [name for name in names if layer == name or layer.endswith("/" + name)]
  if len(fits) != 1:
    raise ValueError(
      f"track_heads(names=...) must name each MultiHead once, got {names}, of which "
      f"{fits} name {layer!r}."
    )
  return fits[0]


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
  named = isinstance(weights, Mapping)
  if named != isinstance(given, Mapping) or (named and set(given) != set(weights)):
    expected = f"a mapping by names {tuple(weights)}" if named else "one array"
    got = f"a mapping by {tuple(given)}" if isinstance(given, Mapping) else "one array"
    raise ValueError(f"{call} must be {expected}, got {got}.")
  # A plain dict, whatever kind of mapping it was.
  given = {name: given[name] for name in weights} if named else given
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
