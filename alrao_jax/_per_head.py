"""Runs a transformation that mixes entries on the body and on each head by itself."""

from typing import Any, NamedTuple

import jax
import optax

from . import _units


class PerHeadState(NamedTuple):
  """State of :func:`per_head`.

  Attributes:
    body: State of the inner transformation for all that is no head.
    heads: Its states for the heads, stacked on axis 0.
  """

  body: Any
  heads: Any


def per_head(
  tx: optax.GradientTransformation, *, heads: str = _units.HEADS_REGEX
) -> optax.GradientTransformationExtraArgs:
  """Runs a transformation once on the body, and on each head as if it were alone.

  For transformations that mix entries: clipping by the global norm, trust ratios,
  orthogonalised updates. Without it the heads' own gradients, half of them from
  heads that are too fast, would enter the body's norm. Elementwise transformations
  such as :func:`optax.scale_by_adam` do not need it.

  Args:
    tx: The transformation. Its scalars (counters, norms) become one for each head.
    heads: Regular expression for the paths of the heads' parameters, which have the
      heads on axis 0; the same as that of the optimizer around it. Where it matches
      nothing, all is body.

  Returns:
    The transformation. Updates keep their sign.

  Raises:
    ValueError: At ``init``, if the heads disagree on their number.

  Example:
    >>> import alrao_jax as alrao, jax, optax
    >>> optimizer = optax.chain(
    ...   alrao.per_head(optax.clip_by_global_norm(1.0)), optax.trace(0.9),
    ...   alrao.scale_by_unit_rates(jax.random.key(0)), alrao.track_heads())
  """
  tx = optax.with_extra_args_support(tx)

  def split(tree):
    def keep(wanted):
      def choose(path, leaf):
        is_head = _units.head_name(_units.path_of(path), heads) is not None
        return leaf if is_head == wanted else optax.MaskedNode()

      return jax.tree_util.tree_map_with_path(choose, tree)

    return keep(False), keep(True)

  def init_fn(params):
    body, stacked = split(params)
    num_heads = {leaf.shape[0] for leaf in jax.tree.leaves(stacked)}
    if len(num_heads) > 1:
      raise ValueError(
        "per_head() needs all heads of a model to agree on num_heads, got "
        f"{sorted(num_heads)}. Write the same num_heads= in every MultiHead."
      )
    init = jax.vmap(tx.init) if jax.tree.leaves(stacked) else tx.init
    return PerHeadState(body=tx.init(body), heads=init(stacked))

  def update_fn(updates, state, params=None, **extra_args):
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
