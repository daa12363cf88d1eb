"""Units of Keras's layers by measurement, where Keras is installed with JAX."""

import os

import jax
import numpy as np
import pytest
from test_units_jacobian import is_exact, measure, pairs
from unit_cases import Case, ramp

import alrao_jax.keras
from alrao_jax._units import UnitOptions, unit_specs

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras")
if keras.backend.backend() != "jax":
  pytest.skip("Keras runs on another backend here", allow_module_level=True)

layers = keras.layers
X, LINE, IMAGE = ramp(2, 3), ramp(2, 5, 4), ramp(2, 5, 5, 4)
STATE, CARRY = ramp(2, 4), (ramp(2, 4), 0.5 * ramp(2, 4))
LAST = {"": (-1,)}

# Layers, what they are called with, and which axes of their outputs are units. A GRU
# that resets before its recurrent product is left out: by its reset gate, every unit
# feeds all others.
CASES = {
  "Dense": (lambda: layers.Dense(4), (X,), LAST),
  "Conv2D": (lambda: layers.Conv2D(4, 3), (IMAGE,), LAST),
  "Conv2DTranspose": (lambda: layers.Conv2DTranspose(3, 3), (IMAGE,), LAST),
  "Conv2DTranspose, square": (lambda: layers.Conv2DTranspose(4, 3), (IMAGE,), LAST),
  "Conv2DTranspose, no bias": (
    lambda: layers.Conv2DTranspose(3, 3, use_bias=False),
    (IMAGE,),
    LAST,
  ),
  "Conv1DTranspose": (lambda: layers.Conv1DTranspose(3, 3), (LINE,), LAST),
  "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(2), (IMAGE,), LAST),
  "DepthwiseConv2D, two": (
    lambda: layers.DepthwiseConv2D(2, depth_multiplier=2),
    (IMAGE,),
    LAST,
  ),
  "DepthwiseConv2D, two, no bias": (
    lambda: layers.DepthwiseConv2D(2, depth_multiplier=2, use_bias=False),
    (IMAGE,),
    LAST,
  ),
  "EinsumDense": (
    lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"),
    (LINE,),
    {"": (-2, -1)},
  ),
  "LayerNormalization": (layers.LayerNormalization, (LINE,), LAST),
  "GroupNormalization": (lambda: layers.GroupNormalization(2), (LINE,), LAST),
  "PReLU": (lambda: layers.PReLU(shared_axes=[1, 2]), (IMAGE - 2,), LAST),
  "SimpleRNNCell": (lambda: layers.SimpleRNNCell(4), (X, [STATE]), LAST),
  "GRUCell": (lambda: layers.GRUCell(4), (X, [STATE]), LAST),
  "GRUCell, two inputs": (lambda: layers.GRUCell(4), (X[:, :2], [STATE]), LAST),
  "LSTMCell": (lambda: layers.LSTMCell(4), (X, list(CARRY)), LAST),
}


def build(name):
  make, inputs, units = CASES[name]
  layer = make()
  layer(*map(np.asarray, inputs[:1]), *inputs[1:])
  variables = layer.trainable_variables
  random = np.random.default_rng(0)
  params = {v.path: random.uniform(0.3, 0.9, v.shape) for v in variables}
  params = jax.tree.map(lambda p: p.astype("float32"), params)

  def outputs(params):
    values = [params[v.path] for v in variables]
    rest = [v.value for v in layer.non_trainable_variables]
    result, _ = layer.stateless_call(values, rest, *inputs)
    return {"": jax.tree.leaves(result)[0]}

  return layer, params, outputs, Case(name, "", lambda: (params, outputs), units)


@pytest.mark.parametrize("name", CASES)
def test_entries_share_a_rate_iff_they_feed_the_same_unit(name):
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    layer, params, outputs, case = build(name)
    feeds = measure(case, params, outputs)
  found = pairs(unit_specs(params), feeds)
  assert is_exact(found) and len(found) == 1
  # The list of variables, without names, has the same units.
  overrides = alrao_jax.keras.unit_overrides(layer)
  values = [v.value for v in layer.trainable_variables]
  listed = unit_specs(values, UnitOptions(overrides, strict=True))
  same = {
    f"{index}": feeds[v.path] for index, v in enumerate(layer.trainable_variables)
  }
  assert is_exact(pairs(listed, same))
