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
  posterior that :func:`log_weights` reads. A head reported as ``-inf`` or NaN gets no
  update, and an update that would make its parameter non-finite becomes zero.

  Args:
    averaging: How the posterior learns: :func:`switch`, :func:`bayes` or
      :func:`fixed_share`.
    heads: Regular expression for the paths of the heads' parameters, which have the
      heads on axis 0.
    names: Names of the model's :class:`~alrao_jax.linen.MultiHead` layers, where it
      has several. Each then has its own posterior, ``head_log_likelihoods`` is a
      mapping by name, and :func:`log_weights` takes the name.

  Returns:
    The transformation.

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
    <https://arxiv.org/abs/1810.01322>`_, section 2 and appendix A.
  """
  if not isinstance(averaging, Averaging):
    raise TypeError(
      "track_heads(averaging=...) must be an Averaging, such as "
      f"alrao_jax.switch(theta=0.999), got {averaging!r}."
    )
  names = None if names is None else tuple(names)

  def init_fn(params):
    layers = _layers(params, heads)
    if not jax.tree.leaves(params):  # optax.tree.map_params: only structure counts
      num_heads = 1
    else:
      _check_layers(layers, names, heads)
      num_heads = next(iter(layers.values()))
    start = averaging.init(num_heads, state_dtype(params))
    state = TrackHeadsState(averaging.log_weights(start), start)
    if names is None:
      return state
    return TrackHeadsState(*({name: field for name in names} for field in state))

  def update_fn(updates, state, params=None, *, head_log_likelihoods=None, **extra):
    del extra
    _check_log_likelihoods(head_log_likelihoods, state.log_weights)
    if names is None:
      new = averaging.update(state.averaging, head_log_likelihoods)
      new_state = TrackHeadsState(averaging.log_weights(new), new)
    else:
      new = {
        name: averaging.update(state.averaging[name], head_log_likelihoods[name])
        for name in names
      }
      weights = {name: averaging.log_weights(new[name]) for name in names}
      new_state = TrackHeadsState(weights, new)

    def guard(path, update, *param):
      path = _units.path_of(path)
      layer = _units.head_name(path, heads)
      if layer is not None:
        log_likelihoods = head_log_likelihoods
        if names is not None:
          log_likelihoods = head_log_likelihoods[_match(layer, names)]
        # Their gradient is zero, but momentum would coast.
        alive = jnp.isfinite(jnp.asarray(log_likelihoods))
        alive = alive.reshape(alive.shape + (1,) * (update.ndim - 1))
        update = jnp.where(alive, update, jnp.zeros_like(update))
      result = optax.apply_updates(param[0], update) if param else update
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


def _check_log_likelihoods(given, weights):
  call = "track_heads().update(head_log_likelihoods=...)"
  if given is None:
    raise TypeError(
      f"{call} is missing. Write optimizer.update(grads, opt_state, params, "
      "head_log_likelihoods=info.head_log_likelihoods), with the info that "
      "alrao_jax.classification_loss(...) and the other losses return; with linen's "
      "TrainState, use alrao_jax.linen.TrainState."
    )
  if isinstance(weights, Mapping) != isinstance(given, Mapping) or (
    isinstance(weights, Mapping) and set(given) != set(weights)
  ):
    expected = tuple(weights) if isinstance(weights, Mapping) else "one array"
    got = tuple(given) if isinstance(given, Mapping) else "one array"
    raise ValueError(
      f"{call} must be a mapping by the names= given: {expected}, got {got}."
    )
  pairs = [(given, weights)]
  if isinstance(weights, Mapping):
    pairs = [(given[name], weights[name]) for name in weights]
  for value, weight in pairs:
    if jnp.shape(value) != weight.shape:
      raise ValueError(
        f"{call} must have shape {weight.shape}, one mean log-likelihood a head, got "
        f"{jnp.shape(value)}."
      )
