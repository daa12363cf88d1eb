"""Fewer heads in a flax.linen train state."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from .. import _collapse
from .._heads import TrackHeadsState
from .._paths import HEADS_REGEX
from .._readings import find_states


def collapse(
  state: train_state.TrainState,
  keep: int | Sequence[int] = 1,
  *,
  heads: str = HEADS_REGEX,
) -> Any:
  """Keeps the best heads of a train state.

  What ``alrao_jax.collapse`` does, for every field of the state: ``params``,
  ``opt_state``, and what a subclass adds, such as ``batch_stats`` or averaged
  parameters. The model stays as it is, and so does the training step, which compiles
  once more.

  Args:
    state: The train state, of Flax or of this library.
    keep: How many heads, the best by the posterior; or their indices.
    heads: Regular expression for the paths of the heads' parameters.

  Returns:
    The new state, of the same class.

  Raises:
    ValueError: As ``alrao_jax.collapse``; another field holds a second optimizer's
      state, whose optimizer is not known here.
    TypeError: As ``alrao_jax.collapse``.

  Example:
    >>> import jax, jax.numpy as jnp, flax.linen as nn, alrao_jax as alrao
    >>> import alrao_jax.linen
    >>> model = alrao.linen.MultiHead(nn.Dense(3), num_heads=10)
    >>> state = alrao.linen.TrainState.create(
    ...     apply_fn=model.apply, tx=alrao.alrao(jax.random.key(1)),
    ...     params=model.init(jax.random.key(0), jnp.ones((5, 4)))["params"])
    >>> state = alrao.linen.collapse(state, keep=2)
    >>> state.apply_fn({"params": state.params}, jnp.ones((5, 4))).num_heads
    2
  """
  others = [
    field.name
    for field in dataclasses.fields(state)
    if field.metadata.get("pytree_node", True) and field.name != "opt_state"
  ]
  for name in others:
    if find_states(getattr(state, name), TrackHeadsState):
      raise ValueError(
        "linen.collapse(state) must hold the state of one track_heads, in opt_state, "
        f"got another one in {name!r}. Collapse each optimizer's state by "
        "alrao_jax.collapse(optimizer, params, opt_state, keep), and state.replace(...)"
        " the fields."
      )
  params: Any = state.params
  # Flax gives the optimizer a part, where fp8 statistics are beside it.
  trained = params["params"] if OVERWRITE_WITH_GRADIENT in params else params
  kept = _collapse.kept_heads(keep, trained, state.opt_state, heads)
  _, opt_state = _collapse.collapse(
    state.tx, trained, state.opt_state, kept, heads=heads
  )
  sliced = {
    name: _collapse.take_heads(getattr(state, name), kept, heads=heads)
    for name in others
  }
  return state.replace(**sliced, opt_state=opt_state)
