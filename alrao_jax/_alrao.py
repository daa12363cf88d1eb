"""Alrao in one call: a base optimizer, unit rates and the heads' posterior, chained."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _checks, _units
from ._averaging import Averaging, switch
from ._guard import Guard, guard_units
from ._heads import track_heads
from ._transform import scale_by_unit_rates


def alrao(
  key: jax.Array,
  base: optax.GradientTransformation | None = None,
  min_learning_rate: float = 1e-5,
  max_learning_rate: float = 10.0,
  *,
  schedule: optax.ScalarOrSchedule | None = None,
  weight_decay: optax.ScalarOrSchedule | None = None,
  weight_decay_mask: Any = None,
  averaging: Averaging = switch(),
  names: tuple[str, ...] | None = None,
  distribution: Any = None,
  overrides: tuple = (),
  heads: str | None = _units.HEADS_REGEX,
  strict: bool = False,
  unit_axis: Literal["last", "first"] = "last",
  granularity: Literal["per_unit", "per_weight"] = "per_unit",
  redraw: bool = False,
  single_head_learning_rate: float | None = None,
  guard: Guard | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""All learning rates at once: an optimizer with no learning rate to choose.

  Every unit of the network trains with a rate of its own, drawn log-uniformly from a
  wide interval. The output layer stands in ``num_heads`` copies (a
  :class:`~alrao_jax.linen.MultiHead`), each with a fixed rate, whose predictions are
  averaged with the posterior :math:`a` that this optimizer keeps. A chain of public
  parts, to be rebuilt at will::

    optax.chain(
      alrao.drop_diverged(),
      base,                                            # optax.identity(): plain SGD
      optax.add_decayed_weights(weight_decay, weight_decay_mask),
      alrao.scale_by_unit_rates(key, min_learning_rate, max_learning_rate),
      optax.scale_by_schedule(schedule),
      alrao.guard_units(guard),
      alrao.track_heads(averaging))

  Which interval goes with which base: ``[1e-5, 10]`` (the default) for plain SGD, and
  ``[1e-6, 1]`` for ``optax.scale_by_adam()``, both the papers'. A base with momentum
  0.9 multiplies the size of steps by 10, as everywhere. The papers find Alrao less
  reliable on Adam than on SGD.

  Args:
    key: JAX random key, from which the rates are drawn. With
      :func:`optax.inject_hyperparams` name it a constant, or it becomes part of the
      state: ``optax.inject_hyperparams(alrao.alrao, static_args=("key",))(key)``.
    base: What to do with gradients before the rates: ``optax.trace(0.9)`` for
      momentum, ``optax.scale_by_adam()``, a chain, ...; plain SGD by default. A
      ``scale_by_*`` part, without a learning rate of its own. A part that mixes the
      entries of its tree (a global norm) belongs into :func:`per_head`.
    min_learning_rate: Positive; the lower bound of the interval.
    max_learning_rate: At least ``min_learning_rate``; the upper bound.
    schedule: A number, or a function of the step count, that multiplies all rates.
    weight_decay: Decoupled as in :func:`optax.adamw`: a unit's weights shrink by its
      own rate times ``weight_decay``. For the coupled kind put
      ``optax.add_decayed_weights`` first in ``base``. A number or a schedule.
    weight_decay_mask: The ``mask`` of :func:`optax.add_decayed_weights`.
    averaging: How the posterior learns: :func:`switch`, :func:`bayes` or
      :func:`fixed_share`.
    names: Names of the MultiHeads, where the model has several; see
      :func:`track_heads`.
    distribution: See :func:`scale_by_unit_rates`, as for all that follow.
    overrides: See :func:`scale_by_unit_rates`.
    heads: Regular expression for the paths of the heads' parameters. ``None``: the
      model has an ordinary output layer, whose units draw rates like all others, and
      ``update`` takes no ``head_log_likelihoods``.
    strict: See :func:`scale_by_unit_rates`.
    unit_axis: See :func:`scale_by_unit_rates`.
    granularity: See :func:`scale_by_unit_rates`.
    redraw: See :func:`scale_by_unit_rates`.
    single_head_learning_rate: See :func:`scale_by_unit_rates`.
    guard: ``alrao.guard()`` stops and slows units that are about to explode, in
      networks without normalisation and for wide intervals; see :func:`guard_units`.

  Returns:
    The optimizer; its updates descend. ``update(grads, opt_state, params,
    head_log_likelihoods=...)`` needs the log-likelihoods that the losses of this
    library return in their :class:`MixtureInfo`.

  Raises:
    TypeError: If ``key`` is no random key, ``base`` no gradient transformation, or
      ``guard`` no :class:`Guard`.
    ValueError: If not ``0 < min_learning_rate <= max_learning_rate < inf``; if
      ``base`` has a learning rate already; at ``init``, if the model has no MultiHead.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp, optax
    >>> params = {"hidden": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
    ...           "out": {"alrao_heads": {"kernel": jnp.ones((10, 3, 2))}}}
    >>> optimizer = alrao.alrao(jax.random.key(0))
    >>> updates, opt_state = optimizer.update(
    ...   params, optimizer.init(params), params, head_log_likelihoods=jnp.zeros(10))

  Reference:
    Blier, Wolinski, Ollivier, `Learning with Random Learning Rates
    <https://arxiv.org/abs/1810.01322>`_, Algorithm 1.
  """
  _checks.check_key("alrao()", key)
  _checks.check_interval("alrao()", min_learning_rate, max_learning_rate)
  if guard is not None and not isinstance(guard, Guard):
    raise TypeError(
      f"alrao(guard=...) must be what alrao_jax.guard(...) returns, got {guard!r}. "
      "Write alrao(..., guard=alrao_jax.guard())."
    )
  base = optax.identity() if base is None else base
  _check_base(base)
  parts = [drop_diverged(), base]
  if weight_decay is not None:
    if not callable(weight_decay):
      _checks.check_non_negative("alrao()", "weight_decay", weight_decay)
      if _checks.is_concrete(weight_decay):
        weight_decay = float(weight_decay)  # an array would promote the updates
    parts.append(optax.add_decayed_weights(weight_decay, weight_decay_mask))
  parts.append(
    scale_by_unit_rates(
      key,
      min_learning_rate,
      max_learning_rate,
      distribution=distribution,
      overrides=overrides,
      heads=heads,
      strict=strict,
      unit_axis=unit_axis,
      granularity=granularity,
      redraw=redraw,
      single_head_learning_rate=single_head_learning_rate,
    )
  )
  if schedule is not None:
    if callable(schedule):
      parts.append(optax.scale_by_schedule(schedule))
    else:
      _checks.check_non_negative("alrao()", "schedule", schedule)
      parts.append(optax.scale_by_schedule(lambda _: schedule))  # keeps the dtype
  if guard is not None:
    parts.append(
      guard_units(
        guard,
        overrides=overrides,
        heads=heads,
        strict=strict,
        unit_axis=unit_axis,
        granularity=granularity,
      )
    )
  if heads is not None:
    parts.append(track_heads(averaging, heads=heads, names=names))
  return optax.chain(*parts)


def drop_diverged() -> optax.GradientTransformation:
  """Zeroes gradient entries that a base's state would keep for good.

  NaN and infinities of a diverged unit, and entries beyond 1e18, whose squares
  overflow float32: Adam would sum them and never move that weight again. The first
  part of :func:`alrao`; the first of a chain of one's own, too.

  Returns:
    The transformation. Updates keep their sign.

  Example:
    >>> import alrao_jax as alrao, jax.numpy as jnp
    >>> print(alrao.drop_diverged().update(jnp.array([1.0, jnp.nan, 1e20]), ())[0])
    [1. 0. 0.]
  """

  def drop(g):
    largest = min(1e18, float(jnp.finfo(g.dtype).max))
    return jnp.where(jnp.abs(g) <= largest, g, jnp.zeros_like(g))

  return optax.stateless(lambda updates, _: jax.tree.map(drop, updates))


def _check_base(base):
  if not isinstance(base, optax.GradientTransformation):
    raise TypeError(
      "alrao(base=...) must be an optax gradient transformation, such as "
      f"optax.trace(0.9) or optax.scale_by_adam(), got {base!r}."
    )

  # A learning rate turns the gradient's sign: a step from each side of zero tells, and
  # a base that adds noise can't turn both.
  def turns(gradient: float) -> bool:
    tree = {"probe": jnp.full([], gradient)}
    updates: Any = base.update(tree, base.init(tree), tree)[0]
    # The sign bit: a warm-up's first learning rate is 0, and its update -0.
    return bool(np.signbit(updates["probe"]) != (gradient < 0))

  try:
    # Adam's own arithmetic needs implicit promotion, which users may have forbidden.
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
      turned = turns(1.0) and turns(-1.0)
  except Exception:  # noqa: BLE001 (a base may need other trees or further arguments)
    return
  if turned:
    raise ValueError(
      "alrao(base=...) must not have a learning rate of its own: its updates already "
      "descend. Write the part without it, such as optax.scale_by_adam() for "
      "optax.adam(1e-3), or optax.trace(0.9) for optax.sgd(1e-1, momentum=0.9)."
    )
