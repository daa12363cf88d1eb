"""Splits the heads over devices: shardings for JAX's jit."""

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from . import _checks, _tree
from ._heads import TrackHeadsState
from ._rates import ScaleByUnitRatesState
from ._tree import head_name, need_heads, path_of


@_checks.refuses_removed
def head_shardings(
  optimizer: optax.GradientTransformation,
  params: Any,
  mesh: Mesh,
  axis: str = "heads",
) -> tuple[Any, Any]:
  """Splits the heads over an axis of a mesh, and replicates everything else.

  Each device along the axis trains and evaluates its own heads. It alone holds their
  parameters and what the optimizer keeps for them (momenta, averages). The body, the
  vector of rates and the heads' posterior (a few numbers) are replicated. With these
  shardings, ``jax.jit`` divides an ordinary training step. The devices exchange only
  sums over heads: the mixture's probabilities and the gradient of the features.

  Give them to ``jax.jit`` as ``out_shardings``, too. Otherwise XLA may return arrays
  elsewhere, and the next step would compile again. You choose how to split the batch:
  over another axis of the mesh (``PartitionSpec("data")``), or over both axes.
  :func:`tree_head_shardings` splits other trees with heads, such as batch statistics.

  If layers carry Flax's sharding metadata (``MultiHead(head_axis="heads")``,
  ``nn.with_partitioning``), use Flax's own ``nn.get_sharding`` instead. It gives the
  same for the heads, and splits the body too. This function reads no metadata.

  Args:
    optimizer: The optimizer. Its ``init`` tells which axes of its state are the
      heads', and runs on shapes only.
    params: The parameters, arrays or ``jax.ShapeDtypeStruct``.
    mesh: The mesh, with axes of type ``Auto``.
    axis: Name of the mesh's axis for the heads; its size divides their number.

  Returns:
    The shardings of ``optimizer.init(params)`` and of ``params``: trees like these,
    with their boxes, of ``NamedSharding``.

  Raises:
    ValueError: If ``params`` has no heads; the mesh has no such axis, or one whose size
      does not divide the number of heads, or axes of another type than ``Auto``.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp
    >>> params = {"out": {"alrao_heads": {"kernel": jnp.ones((8, 3, 2))}}}
    >>> optimizer = alrao.alrao(jax.random.key(0))
    >>> auto = jax.sharding.AxisType.Auto
    >>> mesh = jax.make_mesh((1, 1), ("data", "heads"), (auto, auto))
    >>> state_shardings, shardings = alrao.head_shardings(optimizer, params, mesh)
    >>> shardings["out"]["alrao_heads"]["kernel"].spec == jax.P("heads")
    True
  """
  call = "head_shardings()"
  _tree.check_optimizer(call, optimizer)
  _tree.check_params(call, params)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), params)
  num_heads = need_heads(call, shapes)
  split = _split(call, shapes, mesh, axis)
  state = jax.eval_shape(optimizer.init, shapes)
  leaves, treedef = jax.tree.flatten(state)
  # The heads' axis is the one that grows with their number.
  more = _tree.fresh_shapes(optimizer, shapes, num_heads + 1)

  def sharding(shape, grown):
    pairs = list(zip(shape, grown, strict=False))
    axes = [i for i, sizes in enumerate(pairs) if sizes == (num_heads, num_heads + 1)]
    return _over(mesh, axis, axes[0]) if len(axes) == 1 else _over(mesh)

  found = [
    sharding(leaf.shape, grown) for leaf, grown in zip(leaves, more, strict=True)
  ]
  shardings = jax.tree.unflatten(treedef, found)

  def whole(node):
    return jax.tree.map(lambda _: _over(mesh), node) if _is_shared(node) else node

  return jax.tree.map(whole, shardings, is_leaf=_is_shared), split


@_checks.refuses_removed
def tree_head_shardings(tree: Any, mesh: Mesh, axis: str = "heads") -> Any:
  """Splits the heads' arrays of any tree over an axis of a mesh.

  Use it for what :func:`head_shardings` does not split, such as batch statistics.

  Args:
    tree: Any tree that has the heads' arrays below the key ``alrao_heads``, with the
      heads on axis 0; arrays or ``jax.ShapeDtypeStruct``. It may hold none.
    mesh: The mesh, with axes of type ``Auto``.
    axis: Name of the mesh's axis for the heads; its size divides their number.

  Returns:
    A tree like it, with its boxes, of ``NamedSharding``.

  Raises:
    ValueError: If the mesh has no such axis, or one whose size does not divide the
      number of heads, or axes of another type than ``Auto``.

  Example:
    >>> import alrao_jax as alrao, jax, jax.numpy as jnp
    >>> batch_stats = {"norm": {"mean": jnp.ones(4)}}
    >>> mesh = jax.make_mesh((1,), ("heads",), (jax.sharding.AxisType.Auto,))
    >>> alrao.tree_head_shardings(batch_stats, mesh)["norm"]["mean"].spec == jax.P()
    True
  """
  _tree.check_tree("tree_head_shardings()", tree, "tree")
  return _split("tree_head_shardings()", tree, mesh, axis)


def _split(call, tree, mesh, axis):
  if axis not in mesh.axis_names:
    raise ValueError(
      f"{call[:-1]}axis=...) must be an axis of the mesh, got {axis!r}; it has "
      f"{mesh.axis_names}."
    )
  if any(kind != AxisType.Auto for kind in mesh.axis_types):
    kinds = ", ".join(kind.name for kind in mesh.axis_types)
    raise ValueError(
      f"{call[:-1]}mesh=...) must have axes of type Auto, got {kinds}. Write "
      f"jax.make_mesh({tuple(mesh.shape.values())}, {mesh.axis_names}, "
      f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)})."
    )

  def sharding(path, leaf):
    if head_name(path_of(path)) is None:
      return _over(mesh)
    _check_divides(call, path_of(path), np.shape(leaf), axis, mesh.shape[axis])
    return _over(mesh, axis, 0)

  return jax.tree_util.tree_map_with_path(sharding, tree)


def _over(mesh, name=None, axis=0):
  """An array's sharding along one of its axes; replicated without a name."""
  spec = PartitionSpec() if name is None else PartitionSpec(*[None] * axis, name)
  return NamedSharding(mesh, spec)


def _is_shared(node):
  """Whether a state is a few numbers a head, which every device needs."""
  return isinstance(node, (TrackHeadsState, ScaleByUnitRatesState))


def _check_divides(call, path, shape, axis, size):
  if not shape:
    raise ValueError(f"{call} needs the heads on axis 0, got a scalar at {path!r}.")
  num_heads = shape[0]
  if num_heads % size:
    sizes = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    nearest = {max(num_heads // size, 1) * size, (num_heads // size + 1) * size}
    raise ValueError(
      f"{call[:-1]}mesh=...) must split {num_heads} heads evenly, got {size} devices "
      f"along {axis!r}. Write a mesh with {_listed(sizes)} there, or "
      f"num_heads={_listed(sorted(nearest))}."
    )


def _listed(numbers):
  *rest, last = map(str, numbers)
  return f"{', '.join(rest)} or {last}" if rest else last
