"""Evaluates heads once, and sends two gradients back.

The internal layers descend the mixture's loss, and each head descends its own. This is
the second half of the paper's Algorithm 1 (arXiv 1810.01322), in one backward pass.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

PyTree = Any

# jax.extend.core.Jaxpr, but that module takes a tenth of the time to import jax.
Jaxpr = Any

_in_chunks = contextvars.ContextVar("in chunks", default=False)


@contextlib.contextmanager
def in_chunks() -> Iterator[None]:
  """Says to :func:`multi_head` that a loop adds up the heads' gradients."""
  token = _in_chunks.set(True)
  try:
    yield
  finally:
    _in_chunks.reset(token)


class Converted(NamedTuple):
  """A function without closed-over arrays.

  Attributes:
    fn: The function; ``fn(closed_over, *args)`` equals the given function of ``args``.
    closed_over: The arrays, or nothing if all are constants.
    jaxpr: The function's program.
    outputs: Shapes of what it returns.
  """

  fn: Callable[..., PyTree]
  closed_over: list[jax.Array]
  jaxpr: Jaxpr
  outputs: PyTree


def closure_convert(fn: Callable[..., PyTree], *args: PyTree) -> Converted:
  """Turns the arrays that a function closes over into its first argument.

  Unlike :func:`jax.closure_convert`, it has no cache that keeps all those arrays in
  memory.

  Args:
    fn: A pure function.
    *args: Arguments of the types that it will be called with.

  Returns:
    The converted function, and what is known of it.
  """
  closed_jaxpr, outputs = jax.make_jaxpr(fn, return_shape=True)(*args)
  if not any(isinstance(x, jax.core.Tracer) for x in closed_jaxpr.consts):
    # A new trace lets fn take arguments that vary over other axes of a jax.shard_map.
    return Converted(lambda _, *args: fn(*args), [], closed_jaxpr.jaxpr, outputs)
  treedef = jax.tree.structure(outputs)

  def converted(closed_over, *args):
    leaves = jax.tree.leaves(args)
    flat = jax.core.eval_jaxpr(closed_jaxpr.jaxpr, closed_over, *leaves)
    return jax.tree.unflatten(treedef, flat)

  return Converted(converted, closed_jaxpr.consts, closed_jaxpr.jaxpr, outputs)


def on_every_device(x: jax.Array) -> jax.Array:
  """Keeps a few numbers a head whole on each device of a mesh.

  Otherwise XLA divides the arithmetic of such small arrays as it divides the heads, and
  each sum or maximum over the heads is a message between all devices. In a step on 2x2
  devices, 14 of 26 messages were of this kind.

  Args:
    x: An array. Only one that is traced on a mesh with axes of type Auto is changed.
  """
  if not isinstance(x, jax.core.Tracer):
    return x
  mesh = jax.typeof(x).sharding.mesh
  if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def are_better_apart(
  num_heads: int, stacked_params: PyTree, features: PyTree, heads: Converted
) -> bool:
  """Whether heads are large, and can be computed separately.

  With one product for all heads, XLA transposes their kernels and their outputs. With
  one product for each, there are as many gradients of the features to add up. Dense
  heads with 64 to 2,048 features, 1 to 1,400 examples and 2 to 50,000 outputs were
  timed on a CPU. Separate heads took 0.2 to 1.2 of the time of joint heads if this
  function is true, and 0.9 to 50 times their time if it is false.

  For TPUs, the programs were compiled both ways for a v5e, and XLA's own estimates
  compared, for heads with 100 to 2,048 features, 70 or 128 examples and 10 to 10,000
  outputs. There joint heads need no transposed copy of a kernel, and their update is
  computed along with the gradient: separate heads take 1.1 to 1.6 of the cycles. In the
  loop of :func:`chunked_mixture_loss`, which adds
  up gradients, it is the other way round: 0.96 of the cycles and 0.43 of the traffic
  with the main memory, for the LSTM with 10,000 words. GPUs were not measured.

  Args:
    num_heads: Number of heads.
    stacked_params: Their parameters.
    features: What each receives.
    heads: All heads as a function of parameters and features, which returns outputs and
      other new values.

  Returns:
    True for heads that have more than twice as many numbers in parameters and outputs
    as the features have, hold no convolution, and close over constants alone. If JAX's
    default backend is a TPU, only within :func:`chunked_mixture_loss`.
  """
  trees = (stacked_params, heads.outputs[0], features)
  sizes = [[math.prod(jnp.shape(x)) for x in jax.tree.leaves(tree)] for tree in trees]
  if not all(isinstance(size, int) for tree in sizes for size in tree):
    return False  # symbolic dimensions of jax.export
  num_params, num_outputs, num_features = map(sum, sizes)
  large = num_params + num_outputs > 2 * num_heads * num_features
  suits = jax.default_backend() != "tpu" or _in_chunks.get()
  return suits and large and not heads.closed_over and not _convolves(heads.jaxpr)


def _primitives(jaxpr: Jaxpr) -> Iterator[str]:
  """The names of all primitives in a program, those of inner programs too."""
  for eqn in jaxpr.eqns:
    yield eqn.primitive.name
    for value in eqn.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from _primitives(inner)


def _convolves(jaxpr: Jaxpr) -> bool:
  """Whether there is a convolution, which heads apart would make a slow grouped one."""
  return "conv_general_dilated" in _primitives(jaxpr)


_AFFINE = frozenset(
  "add broadcast_in_dim convert_element_type copy dot_general jit neg reshape squeeze "
  "sub transpose".split()
)


def _is_one_layer(jaxpr: Jaxpr) -> bool:
  """Whether it is one product of parameters and features, plus parameters.

  The derivative by the features is then the transposed product, which needs neither
  features nor outputs.
  """
  names = list(_primitives(jaxpr))
  return names.count("dot_general") == 1 and _AFFINE.issuperset(names)


def head_product(
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: Any,
  precision: Any = None,
  preferred_element_type: Any = None,
  *,
  out_sharding: Any = None,
) -> jax.Array:
  """Multiplies features by the kernel of a dense layer under :func:`jax.vmap`.

  On a CPU, XLA transposes the kernels of all heads for ``features @ kernel``, and a
  second time, in another order, for the gradient of the features. With the kernels as
  the left operand one transposition serves both, and the outputs are transposed back.
  This function takes that order if a head has more features than the batch has examples
  (or positions of sequences), so that its kernel is larger than its outputs, and more
  features than outputs, since it was slower otherwise. (:func:`multi_head` computes
  large heads separately, and then neither order transposes a kernel.) In all other
  cases, and if JAX's default backend is no CPU (not measured), this is
  :func:`jax.lax.dot_general`. A :func:`jax.vmap` around the model hides its axis from
  this count.

  Args:
    lhs: Features, of shape ``(..., features)``.
    rhs: Kernel of one head, of shape ``(features, outputs)``.
    dimension_numbers: As for :func:`jax.lax.dot_general`, like all further arguments.
    precision: If it differs between the operands, the usual order is kept.
    preferred_element_type: Dtype of the result.
    out_sharding: If given, the usual order is kept.

  Returns:
    The product, of shape ``(..., outputs)``.
  """
  dense = (((lhs.ndim - 1,), (0,)), ((), ()))
  sizes = (*lhs.shape, *rhs.shape)
  if (
    jax.default_backend() == "cpu"
    and rhs.ndim == 2
    and dimension_numbers == dense
    and out_sharding is None
    and (precision is None or isinstance(precision, (str, lax.Precision)))
    and all(isinstance(size, int) for size in sizes)  # jax.export knows others
    and lhs.shape[-1] > max(math.prod(lhs.shape[:-1]), rhs.shape[-1])
  ):
    swapped = (((0,), (lhs.ndim - 1,)), ((), ()))
    outputs = lax.dot_general(rhs, lhs, swapped, precision, preferred_element_type)
    return jnp.moveaxis(outputs, 0, -1)
  return lax.dot_general(
    lhs,
    rhs,
    dimension_numbers,
    precision,
    preferred_element_type,
    out_sharding=out_sharding,
  )


_UNSET = object()


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("shared", "own", "axis"),
  meta_fields=(),
)
@dataclass(frozen=True, eq=False, repr=False)
class HeadOutputs:
  """The outputs of all heads, twice: equal values, two gradients.

  It is a pytree but on purpose no array, since ``softmax(heads)`` would mean nothing.
  ``heads.map(lambda x: x[..., :5])`` changes both halves. Put trained values (a learned
  temperature) into the ``log_prob`` of :func:`mixture_loss`; in ``map`` they would
  receive the gradients of all heads' own losses.

  The heads are on axis 0. A model of single examples under :func:`jax.vmap` returns
  them with the examples on axis 0: write ``jax.vmap(model, out_axes=1)``. The third
  leaf is an empty array that moves along with the heads; by it the losses and
  predictions recognise and refuse moved heads.

  Attributes:
    shared: What the mixture is computed from, a pytree of arrays with leading axis
      ``num_heads``. Its cotangent goes to the features, not to the heads' parameters.
    own: The same values, for each head's own loss. Its cotangent goes to the heads'
      parameters, not to the features.
    axis: An empty array of shape ``(0,)`` that marks the axis of the heads; leave it
      out. In a tree of axes or shardings it is the axis or sharding of the first leaf.

  Example:
    >>> import jax.numpy as jnp
    >>> from alrao_jax import HeadOutputs
    >>> logits = jnp.zeros((10, 8, 4))  # 10 heads, 8 examples, 4 classes
    >>> HeadOutputs(shared=logits, own=logits).map(lambda x: x[..., :3])
    HeadOutputs(float32[10,8,3])
  """

  shared: PyTree
  own: PyTree
  axis: Any = _UNSET

  def __post_init__(self):
    if self.axis is _UNSET:
      leaves = jax.tree.leaves((self.shared, self.own))
      object.__setattr__(self, "axis", _heads_axis(leaves[0]) if leaves else None)

  def __repr__(self) -> str:
    def shown(x):
      if not hasattr(x, "shape"):
        return repr(x)
      return f"{x.dtype}[{','.join(map(str, x.shape))}]"

    outputs = str(jax.tree.map(shown, self.shared)).replace("'", "")
    moved = "" if self._heads_lead() else f", axis={shown(self.axis)}"
    return f"HeadOutputs({outputs}{moved})"

  @property
  def num_heads(self) -> int:
    """Number of heads, the length of the leading axis.

    Raises:
      ValueError: If the heads are not on axis 0.
    """
    self.check_axis("HeadOutputs.num_heads")
    return jax.tree.leaves(self.shared)[0].shape[0]

  def map(self, fn: Callable[[jax.Array], jax.Array]) -> "HeadOutputs":
    """Applies a function to every array of both halves.

    Unlike :func:`jax.tree.map` it skips the empty array, which can't be sliced.

    Args:
      fn: A function of one array ``(num_heads, ...)`` that keeps the heads on axis 0.

    Returns:
      The changed outputs.

    Raises:
      ValueError: If the heads are not on axis 0.
    """
    self.check_axis("HeadOutputs.map")
    shared, own = jax.tree.map(fn, (self.shared, self.own))
    return HeadOutputs(shared, own, self.axis)

  def check_axis(self, call: str) -> None:
    """Refuses outputs whose heads are no longer on axis 0.

    Args:
      call: What needs them there, for the error.

    Raises:
      ValueError: If they are on another axis.
    """
    if not self._heads_lead():
      axis = self.axis.shape.index(0)
      raise ValueError(
        f"{call} needs the heads on axis 0, got them on axis {axis} of {self!r}, as "
        "jax.vmap leaves a model of single examples. Write jax.vmap(model, "
        f"out_axes=1), or jax.tree.map(lambda x: jnp.moveaxis(x, {axis}, 0), heads)."
      )

  def _heads_lead(self) -> bool:
    return getattr(self.axis, "shape", (0,))[0] == 0


def _heads_axis(leaf: Any) -> Any:
  """The empty leaf for outputs like this; for an axis or a sharding, one like it."""
  if hasattr(leaf, "shape"):
    return jnp.zeros(0, jnp.float32)
  if isinstance(leaf, PartitionSpec):
    return PartitionSpec(*leaf[:1])
  if isinstance(leaf, NamedSharding):
    return NamedSharding(leaf.mesh, PartitionSpec(*leaf.spec[:1]))
  return leaf


def multi_head(
  head_fn: Callable[..., Any],
  stacked_params: PyTree,
  features: PyTree,
  *,
  aux: PyTree = None,
  has_aux: bool = False,
) -> Any:
  r"""Evaluates ``num_heads`` copies of an output layer on the same features.

  Every head is evaluated once. Let :math:`L` be the mixture's loss and :math:`L_j` the
  loss of head :math:`j` alone. A loss :math:`L(\text{shared}) + \sum_j L_j(\text{own})`
  sends :math:`\partial L` to the features, as if the heads were constants, and
  :math:`\partial L_j` to the parameters of head :math:`j`, as if the features were
  constants. The losses of this package have that form.

  **Non-finite gradients.** A head has a part in the mixture if its cotangent of
  ``shared`` is not all zero. Its non-finite gradient is passed on, since loss scaling
  must see an overflow there; :func:`drop_diverged`, the first part of :func:`alrao` and
  of any chain, keeps it out of an optimizer's state. A head without a part has
  diverged, or is so bad that its responsibility is 0. It must not stop the others: its
  non-finite entries become zero. The features' gradient of heads of one dense layer is
  computed without such heads. If that of others has non-finite entries, it is computed
  again without such heads. (That is a :func:`jax.lax.cond`: under :func:`jax.vmap` both
  its branches run. A single head needs none.) Your own loss must give a diverged head a
  cotangent of exactly zero, as the losses of this package do.

  **Large heads** are computed separately (on TPUs only within
  :func:`chunked_mixture_loss`). They have more than twice as many numbers in
  parameters and outputs as in the features; for a dense layer, more outputs than the
  harmonic mean of its features and the examples. Each gets its own copy of the
  features, and the gradient of a head without a part is made finite before the sum over
  heads. On a CPU, XLA then transposes no kernels. Results may differ in the last bits
  from those of joint heads. Heads with convolutions are always computed together.

  Values that ``head_fn`` closes over, such as the matrix of a tied embedding, are
  treated like features. If any of them is traced, even a scalar, large heads are
  computed together too; values without gradient may go into ``aux``.

  Limits: forward-mode differentiation is not available. Second derivatives are those of
  the routed gradient.

  Args:
    head_fn: One head, a pure function ``head_fn(params_j, features) -> outputs``. With
      ``aux`` it is ``head_fn(params_j, features, aux_j)``. The outputs are any pytree
      of arrays.
    stacked_params: Parameters of all heads, a pytree of arrays with leading axis
      ``num_heads``.
    features: What every head receives, any pytree of arrays.
    aux: Everything else that differs between heads and has no gradient, a pytree of
      arrays with leading axis ``num_heads``: batch statistics, one random key a head.
    has_aux: Whether ``head_fn`` returns ``(outputs, new_aux_j)``, say with updated
      batch statistics.

  Returns:
    :class:`HeadOutputs`, or ``(HeadOutputs, new_aux)`` when ``has_aux``; ``new_aux``
    has the leading axis ``num_heads`` and no gradient.

  Raises:
    TypeError: If ``head_fn`` is not callable.
    ValueError: If leading axes differ, are missing, or have length 0.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from alrao_jax import multi_head
    >>> kernels = jax.random.normal(jax.random.key(0), (10, 3, 2))
    >>> heads = multi_head(lambda kernel, x: x @ kernel, kernels, jnp.ones((5, 3)))
    >>> heads.num_heads, heads.shared.shape
    (10, (10, 5, 2))

  Reference:
    Blier, Wolinski, Ollivier, *Learning with Random Learning Rates*, arXiv
    1810.01322, Algorithm 1.
  """
  if not callable(head_fn):
    raise TypeError(
      "multi_head(head_fn=...) must be a function of one head's parameters and the "
      f"features, got {type(head_fn).__name__}."
    )
  num_heads = _leading_axis(stacked_params, aux)

  def all_heads(params, features, aux, features_axis=None):
    def head(params, features, aux):
      args = (params, features) if aux is None else (params, features, aux)
      return head_fn(*args) if has_aux else (head_fn(*args), None)

    in_axes = (0, features_axis, 0)
    return jax.vmap(head, in_axes, axis_size=num_heads)(params, features, aux)

  # A custom VJP has no gradient for closed-over values, so they become arguments.
  converted = closure_convert(all_heads, stacked_params, features, aux)
  routed: Any
  if are_better_apart(num_heads, stacked_params, features, converted):
    apart = functools.partial(all_heads, features_axis=0)
    routed = _route_apart(apart, stacked_params, features, aux)
  else:

    def evaluate(params, inputs, aux):
      features, closed_over = inputs
      return converted.fn(closed_over, params, features, aux)

    inputs = (features, converted.closed_over)
    plain = not converted.closed_over and _is_one_layer(converted.jaxpr)
    routed = _route(evaluate, plain, stacked_params, inputs, aux)
  heads, new_aux = routed
  return (heads, new_aux) if has_aux else heads


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _route(evaluate, is_one_layer, params, inputs, aux):
  del is_one_layer
  outputs, new_aux = evaluate(params, inputs, aux)
  return HeadOutputs(outputs, outputs), new_aux


def _route_forward(evaluate, is_one_layer, params, inputs, aux):
  del is_one_layer
  (params, inputs), reduce = _each_device_its_own(params, inputs, aux)
  outputs, pullback, new_aux = jax.vjp(
    lambda params, inputs: evaluate(params, inputs, aux), params, inputs, has_aux=True
  )
  residuals = (pullback, reduce, params, inputs, aux)
  return (HeadOutputs(outputs, outputs), new_aux), residuals


def _route_backward(evaluate, is_one_layer, residuals, cotangents):
  pullback, reduce, params, inputs, aux = residuals
  heads, _ = cotangents
  takes_part = _any_nonzero(heads.shared)
  # Each call computes the half that is kept; XLA removes the other.
  d_params = pullback(_finite_without_part(heads.own, takes_part))[0]
  d_params = _finite_without_part(d_params, takes_part)

  def with_params(params, aux):
    _, pullback = jax.vjp(lambda x: evaluate(params, x, aux)[0], inputs)
    return pullback(heads.shared)[0]

  def inexact(change, *trees):
    return jax.tree.map(
      lambda x: change(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x, trees
    )

  def column(mask, x):
    return mask.reshape(mask.shape + (1,) * (x.ndim - 1))

  def again():
    # A zero cotangent times an infinite residual is NaN, so the first head with a part
    # replaces the heads without one. Unlike zeros, its parameters are known to be good
    # (a head that normalises its weights is 0/0 at zero).
    first = jnp.arange(takes_part.size) == jnp.argmax(takes_part)

    def replace(x):
      donor = jnp.where(column(first, x), x, 0).sum(axis=0, keepdims=True)
      return jnp.where(column(takes_part, x), x, donor)

    return none_without_part(_inexact(with_params(*inexact(replace, params, aux))))

  def none_without_part(d_inputs):
    return [jnp.where(takes_part.any(), x, 0) for x in d_inputs]

  if is_one_layer:
    # Nothing is computed again, since the layer is affine: no condition is needed.
    zero = lambda x: jnp.where(column(takes_part, x), x, 0)  # noqa: E731
    d_inputs = with_params(*inexact(zero, params, aux))
  else:
    d_inputs = pullback(heads.shared)[1]
    known = _inexact(d_inputs)
    if takes_part.size == 1:
      known = none_without_part(known)  # there is no other head to protect
    else:
      # If every head has a part, pass on what is not finite.
      as_it_is = _all_finite(known) | takes_part.all()
      known = jax.lax.cond(as_it_is, lambda: known, again)
    d_inputs = _with_inexact(d_inputs, known)
  return *map(_without_float0, reduce((d_params, d_inputs))), None


_route.defvjp(_route_forward, _route_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _route_apart(evaluate, params, features, aux):
  outputs, new_aux = evaluate(params, _copies(params, features, aux), aux)
  return HeadOutputs(outputs, outputs), new_aux


def _route_apart_forward(evaluate, params, features, aux):
  (params, features), reduce = _each_device_its_own(params, features, aux)
  outputs, pullback, new_aux = jax.vjp(
    lambda params, copies: evaluate(params, copies, aux),
    params,
    _copies(params, features, aux),
    has_aux=True,
  )
  return (HeadOutputs(outputs, outputs), new_aux), (pullback, reduce)


def _route_apart_backward(evaluate, residuals, cotangents):
  del evaluate
  pullback, reduce = residuals
  heads, _ = cotangents
  takes_part = _any_nonzero(heads.shared)
  # A zero cotangent times an infinite residual is NaN, which stays in its own head.
  d_copies = _finite_without_part(pullback(heads.shared)[1], takes_part)
  d_features = jax.tree.map(
    lambda x: x[0] if _is_float0(x) else x.sum(axis=0), d_copies
  )
  d_params = pullback(_finite_without_part(heads.own, takes_part))[0]
  d_params = _finite_without_part(d_params, takes_part)
  return *map(_without_float0, reduce((d_params, d_features))), None


_route_apart.defvjp(_route_apart_forward, _route_apart_backward)


def _each_device_its_own(params: PyTree, inputs: PyTree, aux: PyTree) -> Any:
  """Keeps each device's gradients apart within :func:`jax.shard_map`.

  So what a device's heads give back is made finite before it reaches other devices.

  Returns:
    Parameters and inputs, and the function that adds up their cotangents.
  """

  def axes_of(tree):
    varying = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)]
    return frozenset().union(*varying)

  axes = axes_of((params, inputs, aux))

  def vary(x):
    missing = tuple(sorted(axes - axes_of(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.vjp(lambda *trees: jax.tree.map(vary, trees), params, inputs)


def _copies(params: PyTree, features: PyTree, aux: PyTree) -> PyTree:
  """The features, copied for each head, on the devices of that head."""
  return jax.vmap(lambda _, x: x, in_axes=(0, None))((params, aux), features)


def _leading_axis(*stacked: PyTree) -> int:
  """The length of the first axis, the same in all leaves."""
  leaves = [x for tree in stacked for x in jax.tree.leaves(tree)]
  lengths = sorted({jnp.shape(x)[0] if jnp.ndim(x) else None for x in leaves}, key=str)
  if len(lengths) != 1 or not lengths[0]:
    raise ValueError(
      "multi_head(stacked_params=..., aux=...) must have arrays with one leading axis "
      f"num_heads >= 1, got leading axes {lengths}. Stack the heads' parameters with "
      "jax.vmap(init)(jax.random.split(key, num_heads))."
    )
  return lengths[0]


def _finite_without_part(tree: PyTree, takes_part: jax.Array) -> PyTree:
  """Replaces NaN and infinities of heads without a part in the mixture by zeros."""

  def finite(x):
    if _is_float0(x):
      return x
    told = takes_part.reshape(takes_part.shape + (1,) * (x.ndim - 1))
    return jnp.where(told | jnp.isfinite(x), x, 0)

  return jax.tree.map(finite, tree)


def _is_float0(x: Any) -> bool:
  """Whether it is the cotangent of integers or keys."""
  return x.dtype == jax.dtypes.float0


def _without_float0(tree: PyTree) -> PyTree:
  """Replaces the cotangents of integers and keys by None, which means zero."""
  return jax.tree.map(lambda x: None if _is_float0(x) else x, tree)


def _inexact(tree: PyTree) -> list[jax.Array]:
  """The leaves that are cotangents of real or complex numbers."""
  return [x for x in jax.tree.leaves(tree) if not _is_float0(x)]


def _with_inexact(tree: PyTree, leaves: list[jax.Array]) -> PyTree:
  """The tree with those leaves replaced."""
  rest = iter(leaves)
  return jax.tree.map(lambda x: x if _is_float0(x) else next(rest), tree)


def _all_finite(leaves: list[jax.Array]) -> jax.Array:
  finite = [jnp.isfinite(x).all() for x in leaves]
  return jnp.stack(finite).all() if finite else jnp.array(True)


def _any_nonzero(cotangents: PyTree) -> jax.Array:
  """For each head, whether any entry of its cotangent is not zero."""
  leaves = jax.tree.leaves(cotangents)
  nonzero = [
    (x != 0).any(axis=tuple(range(1, x.ndim))) for x in leaves if not _is_float0(x)
  ]
  if not nonzero:
    return jnp.zeros(leaves[0].shape[:1], bool)  # outputs of integers alone
  return jnp.stack(nonzero).any(axis=0)
