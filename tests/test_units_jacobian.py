"""Units by measurement: which parameters feed which unit, by Jacobians.

Every layer of flax.linen and flax.nnx that has parameters is called; whatever the
library says of the units of its parameters is compared with which outputs each entry
of each parameter changes.
"""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from unit_cases import CASES

from alrao_jax._tree import flatten_with_paths
from alrao_jax._units import UnitOptions, unit_specs

# Compiling takes most of the time here, so: one program a layer, hardly optimised.
QUICK = {"xla_backend_optimization_level": 0}


def measure(case, params, outputs):
  """Which units each entry of each parameter feeds: (units, *shape) by path."""

  @functools.partial(jax.jit, compiler_options=QUICK)
  def pull_back(params):
    out, vjp = jax.vjp(outputs, params)
    cotangents, owners = one_unit_at_a_time(out, case.units)
    return jax.vmap(lambda c: vjp(c)[0])(cotangents), jnp.array(owners)

  gradients, owners = pull_back(params)
  feeds = {}
  for path, gradient in flatten_with_paths(gradients)[0]:
    above = [
      name for name in case.units if f"{path}/".startswith(f"{name}/" if name else "")
    ]
    owner = list(case.units).index(max(above, key=len))
    feeds[path] = np.asarray(gradient)[np.asarray(owners) == owner] != 0
  return feeds


def one_unit_at_a_time(out, units):
  """Cotangents: random numbers where one unit's outputs are, a row for each unit."""
  random = np.random.default_rng(0)

  def units_of_output(name):
    array = jax.tree.leaves(out[name])[0]
    return list(np.ndindex(*(array.shape[axis] for axis in units[name])))

  rows = [(name, unit) for name in units for unit in units_of_output(name)]

  def cotangent(array, of):
    filled = np.zeros((len(rows), *array.shape), array.dtype)
    for row, (name, unit) in zip(filled, rows, strict=True):
      place: list = [slice(None)] * array.ndim
      for axis, index in zip(units[name], unit, strict=True):
        place[axis] = index
      if name == of:
        row[tuple(place)] = random.uniform(0.5, 1.5, row[tuple(place)].shape)
    return filled

  cotangents = {
    of: jax.tree.map(lambda array, of=of: cotangent(array, of), out[of]) for of in units
  }
  names = list(units)
  return cotangents, [names.index(name) for name, _ in rows]


def units_of(spec):
  """The unit of each entry, as the library says."""
  grid = np.indices(spec.shape)
  indices = [grid[axis] for axis in spec.axes]
  if spec.tiles > 1:
    indices[-1] = indices[-1] % spec.unit_shape[-1]
  if not indices:
    return np.zeros(spec.shape, int)
  return np.ravel_multi_index(indices, spec.unit_shape)


def pairs(specs, feeds):
  """Pairs (unit that the library names, unit that an entry feeds) of each group."""
  found = {}
  for path, spec in specs.items():
    if spec.shape == ():  # a scalar feeds them all
      assert spec.num_units == 1
      continue
    assert (feeds[path].sum(0) == 1).all(), f"{path} feeds none or several units"
    named, fed = units_of(spec), feeds[path].argmax(0)
    group = found.setdefault(spec.group, set())
    group.update(zip(named.ravel().tolist(), fed.ravel().tolist(), strict=True))
  return found


def is_exact(found):
  """Whether entries share a rate if and only if they feed the same unit."""
  return all(
    len(group) == len({a for a, _ in group}) == len({b for _, b in group})
    for group in found.values()
  )


def is_coarse(found):
  """Whether entries that feed the same unit share a rate, and others may."""
  return all(len(group) == len({b for _, b in group}) for group in found.values())


@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")
@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_entries_share_a_rate_iff_they_feed_the_same_unit(case):
  with jax.numpy_rank_promotion("allow"):
    params, outputs = case.build()
    feeds = measure(case, params, outputs)
    overrides = case.overrides()
  exact = unit_specs(
    params, UnitOptions(overrides=overrides, strict=True, **case.options)
  )
  assert is_exact(pairs(exact, feeds))
  if not case.apart:
    assert len({spec.group for spec in exact.values()}) == len(case.units)
  plain = UnitOptions(**case.options)
  if case.limit == "error":
    with pytest.raises(ValueError, match=r"write units=UnitOptions\(overrides="):
      unit_specs(params, plain)
    return
  specs = unit_specs(params, plain)
  found = pairs(specs, feeds)
  assert is_exact(found) == (case.limit in (None, "assumed"))
  if case.limit == "coarse":
    assert is_coarse(found)
  else:
    assert bool(overrides) == (case.limit is not None)
  assert any(spec.assumed for spec in specs.values()) == (case.limit == "assumed")


# Classes without parameters of their own, and why.
EXCLUDED = {
  "linen": {
    "Module": "base class",
    "RNNCellBase": "base class",
    "Sequential": "container",
    "Dropout": "no parameters",
    "Fp8DotGeneral": "statistics in a collection of its own, no parameters",
    "Fp8DotGeneralOp": "statistics in a collection of its own, no parameters",
    "Fp8DirectDotGeneralOp": "statistics in a collection of its own, no parameters",
    "NANOOFp8DotGeneralOp": "statistics in a collection of its own, no parameters",
    "Fp8Einsum": "statistics in a collection of its own, no parameters",
  },
  "nnx": {
    "Module": "base class",
    "RNNCellBase": "base class",
    "Dict": "container",
    "List": "container",
    "Dropout": "no parameters",
    "RoPE": "no parameters",
  },
}


@pytest.mark.parametrize(("api", "module"), [("linen", nn), ("nnx", nnx)])
def test_every_layer_of_flax_is_measured(api, module):
  layers = {
    name
    for name, item in vars(module).items()
    if inspect.isclass(item) and issubclass(item, module.Module)
  }
  measured = {case.layer.split(".")[1] for case in CASES if case.layer.startswith(api)}
  assert not measured & EXCLUDED[api].keys()
  assert layers == measured | (layers & EXCLUDED[api].keys())


PAIRS = [
  (one, other)
  for one in CASES
  for other in CASES
  if one.layer.startswith("linen") and other.layer.startswith("nnx")
  if (one.same, one.variant) == (other.same, other.variant) and one.limit != "error"
]


def test_many_layers_of_linen_are_compared_with_nnx():
  assert len(PAIRS) >= 40


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=[case.id for case, _ in PAIRS])
def test_linen_and_nnx_give_the_same_groups(one, other):
  def groups(case):
    specs = unit_specs(case.build()[0]).values()
    return {spec.group: spec.unit_shape for spec in specs}

  assert groups(one) == groups(other)
