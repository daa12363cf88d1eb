"""Layers whose units are measured: how each is called, and which output axes are units.

A case says nothing about parameters. It names the layer's *outputs* by the path of
the module that computes them, and the axes of each output that index its units.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import alrao_jax.equinox
import alrao_jax.linen
import alrao_jax.nnx
from alrao_jax._tree import path_of


@dataclass(frozen=True)
class Case:
  """A layer to be measured.

  Attributes:
    layer: The class, such as "linen.Dense".
    variant: What is special about it.
    build: Returns the parameters, and a function from them to the outputs by the path
      of the module that computes them.
    overrides: Returns what the types of the model's modules tell.
    units: The axes that index units in each output, by path.
    limit: How shapes alone go wrong: "coarse" (units share rates), "wrong", "error".
    apart: Whether the layer's parameters are in several groups.
    same: Cases of linen and nnx with the same name here and the same variant are one
      layer, and must have the same groups.
    options: Options of `unit_specs`.
  """

  layer: str
  variant: str
  build: Callable[[], tuple[Any, Callable]]
  units: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"": (-1,)})
  limit: str | None = None
  apart: bool = False
  same: str = ""
  overrides: Callable[[], tuple] = tuple
  options: Mapping[str, Any] = field(default_factory=dict)

  @property
  def id(self) -> str:
    return f"{self.layer}-{self.variant}".replace(" ", "-")


def fill(tree: Any, name: str) -> Any:
  """Random numbers in place of shapes: no initialiser needs to be compiled."""
  random = np.random.default_rng(zlib.crc32(name.encode()))

  def number(keys, leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.key(0)
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
      return jnp.zeros(leaf.shape, leaf.dtype)
    if path_of(keys).endswith("/u"):  # spectral norm: the matrix's norm counts as 1
      return jnp.zeros(leaf.shape, leaf.dtype)
    values = random.uniform(0.3, 0.9, leaf.shape)  # positive: some are variances
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
      values = values + 1j * random.uniform(0.3, 0.9, leaf.shape)
    return jnp.asarray(values, leaf.dtype)

  return jax.tree_util.tree_map_with_path(number, tree)


def ramp(*shape: int) -> jax.Array:
  """Inputs, all different."""
  return jnp.asarray(np.sin(1.0 + np.arange(np.prod(shape)).reshape(shape)), "float32")


CASES: list[Case] = []


def linen(module, *inputs, variant="bias", units=None, same=None, **rest):
  """Adds a case of flax.linen."""
  name = type(module).__name__.removeprefix("Vmap").removeprefix("Scan")
  layer = rest.pop("layer", None) or f"linen.{name}"
  units = units or {"": (-1,)}
  kwargs = rest.pop("kwargs", {})

  def build():
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **kwargs))
    variables = fill(shapes, layer + variant)
    params = variables.pop("params")

    def outputs(params):
      result, state = module.apply(
        {"params": params, **variables},
        *inputs,
        **kwargs,
        capture_intermediates=True,
        mutable=True,
      )
      found = {}
      for path in units:
        found[path] = result
        if path:
          found[path] = state["intermediates"]
          for key in (*path.split("/"), "__call__"):
            found[path] = found[path][key]
      return found

    return params, outputs

  def overrides():
    return alrao_jax.linen.unit_overrides(module, *inputs, **kwargs)

  same = same or layer.split(".")[1]
  case = Case(layer, variant, build, units, same=same, overrides=overrides, **rest)
  CASES.append(case)


def nnx_(make, call, variant="bias", units=None, same=None, **rest):
  """Adds a case of flax.nnx; `call` returns the output, or several by path."""
  model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
  layer = f"nnx.{type(model).__name__}"
  concrete = rest.pop("concrete", False)

  def build():
    layers = make(nnx.Rngs(0)) if concrete else model
    graphdef, params, state = nnx.split(layers, nnx.Param, ...)
    params, state = fill(params, layer + variant), fill(state, layer)

    def outputs(params):
      result = call(nnx.merge(graphdef, params, state))
      return result if isinstance(result, dict) else {"": result}

    return params, outputs

  def overrides():
    return alrao_jax.nnx.unit_overrides(model)

  units, same = units or {"": (-1,)}, same or layer.split(".")[1]
  case = Case(layer, variant, build, units, same=same, overrides=overrides, **rest)
  CASES.append(case)


def vmapped(module, **attributes):
  """A stack of two layers, as ensembles are made."""
  stacked = nn.vmap(
    module,
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True},
    in_axes=None,
    axis_size=2,
  )
  return stacked(**attributes)


class Scanned(nn.Module):
  """A stack of layers that keep their input's shape, as deep networks are made."""

  layer: Callable[[], nn.Module]
  length: int = 3

  @nn.compact
  def __call__(self, x):
    def body(layer, x):
      y = layer(x)
      return x, y  # every layer sees the same input, so that units can be told apart

    scan = nn.scan(
      lambda layer, x, _: body(layer, x),
      variable_axes={"params": 0, "intermediates": 0},
      split_rngs={"params": True},
      length=self.length,
    )
    return scan(self.layer(), x, None)[1]


class Step(nn.Module):
  """One step of a recurrent cell from a given carry: the new carry."""

  cell: nn.Module

  @nn.compact
  def __call__(self, carry, x):
    return self.cell(carry, x)[0]


STACK = {"": (0, -1)}
ATTENTION = {
  "query": (-2, -1),
  "key": (-2, -1),
  "value": (-2, -1),
  "out": (-1,),
}
NORMALISED = {**ATTENTION, "query_ln": (-1,), "key_ln": (-1,)}

X, SEQUENCE = ramp(2, 3), ramp(2, 3, 4)
LINE, IMAGE, VOLUME = ramp(2, 5, 2), ramp(2, 4, 4, 2), ramp(1, 3, 3, 3, 2)

# --- dense layers
linen(nn.Dense(4), X)
linen(nn.Dense(4, use_bias=False), X, variant="no bias")
linen(nn.Dense(3), X, variant="square")
linen(nn.Dense(1), X, variant="one feature")
linen(vmapped(nn.Dense, features=4), X, variant="vmap", units=STACK)
linen(
  vmapped(nn.Dense, features=4, use_bias=False),
  X,
  variant="vmap, no bias",
  units=STACK,
  limit="coarse",
)
linen(
  Scanned(lambda: nn.Dense(4)),
  ramp(2, 4),
  layer="linen.Dense",
  variant="scan, square",
  units=STACK,
)
linen(
  Scanned(lambda: nn.Dense(3)),
  X,
  layer="linen.Dense",
  variant="scan, cube",
  units=STACK,
  limit="error",
)
linen(nn.DenseGeneral(4), X)
linen(nn.DenseGeneral((2, 4)), X, variant="two features", units={"": (-2, -1)})
linen(
  nn.DenseGeneral((2, 4), use_bias=False),
  X,
  variant="two features, no bias",
  units={"": (-2, -1)},
  limit="coarse",
)
linen(nn.DenseGeneral(5, axis=(-2, -1)), SEQUENCE, variant="two axes")
linen(
  nn.DenseGeneral(5, axis=(-2, -1), use_bias=False),
  SEQUENCE,
  variant="two axes, no bias",
)
linen(nn.DenseGeneral(5, batch_dims=(0,)), X, variant="batch", units=STACK)
linen(
  nn.DenseGeneral(5, batch_dims=(0,), use_bias=False),
  X,
  variant="batch, no bias",
  units=STACK,
  limit="coarse",
)
linen(
  nn.DenseGeneral((3, 4)), X, variant="ambiguous", units={"": (-2, -1)}, limit="error"
)
linen(nn.Einsum((3, 2, 4), "ab,bcd->acd"), X, units={"": (-2, -1)})
linen(
  nn.Einsum((3, 2, 4), "ab,bcd->acd", use_bias=False),
  X,
  variant="no bias",
  units={"": (-2, -1)},
  limit="coarse",
)
linen(
  nn.Einsum((3, 2, 4), "ab,bcd->adc"),
  X,
  variant="permuted",
  units={"": (-2, -1)},
  limit="error",
  apart=True,
)
linen(
  nn.Einsum((3, 4, 4), "ab,bcd->adc"),
  X,
  variant="permuted, square",
  units={"": (-2, -1)},
  limit="wrong",
  apart=True,
)
linen(nn.Embed(5, 3), jnp.arange(5))
linen(nn.Embed(1, 3), jnp.arange(1), variant="one entry")
linen(
  vmapped(nn.Embed, num_embeddings=5, features=3),
  jnp.arange(5),
  variant="vmap",
  units=STACK,
  limit="coarse",
)

# --- convolutions
for rank, inputs in ((1, LINE), (2, IMAGE), (3, VOLUME)):
  linen(nn.Conv(4, (2,) * rank), inputs, variant=f"{rank}d")
  linen(nn.Conv(4, (2,) * rank, use_bias=False), inputs, variant=f"{rank}d, no bias")
linen(nn.Conv(4, (3, 3), feature_group_count=2), IMAGE, variant="grouped")
linen(
  nn.Conv(4, (3, 3), feature_group_count=2, use_bias=False),
  IMAGE,
  variant="grouped, no bias",
)
linen(nn.Conv(2, (3, 3), feature_group_count=2), IMAGE, variant="depthwise")
linen(nn.Conv(2, (2, 2)), IMAGE, variant="all equal")
linen(nn.Conv(4, (3, 3), strides=2, padding="CIRCULAR"), IMAGE, variant="strided")
linen(
  Scanned(lambda: nn.Conv(2, (3, 3))),
  IMAGE,
  layer="linen.Conv",
  variant="scan as long as the kernel",
  units=STACK,
)
linen(
  Scanned(lambda: nn.Conv(2, (3, 3), use_bias=False)),
  IMAGE,
  layer="linen.Conv",
  variant="scan, no bias",
  units=STACK,
  limit="coarse",
)
linen(nn.ConvTranspose(4, (3, 3)), IMAGE)
linen(nn.ConvTranspose(4, (3, 3), use_bias=False), IMAGE, variant="no bias")
linen(nn.ConvTranspose(4, (3, 3), transpose_kernel=True), IMAGE, variant="transposed")
linen(
  nn.ConvTranspose(4, (3, 3), transpose_kernel=True, use_bias=False),
  IMAGE,
  variant="transposed, no bias",
  limit="wrong",
)
linen(
  nn.ConvTranspose(2, (3, 3), transpose_kernel=True),
  IMAGE,
  variant="transposed, square",
  limit="wrong",
)
linen(nn.ConvLocal(3, (3,), padding="VALID"), LINE, variant="1d", units={"": (-2, -1)})
linen(
  nn.ConvLocal(3, (2,), padding="VALID"),  # 4 places, 4 inputs to each
  LINE,
  variant="ambiguous",
  units={"": (-2, -1)},
  limit="error",
)
linen(
  nn.ConvLocal(3, (2, 2), padding="VALID"),
  IMAGE,
  variant="2d",
  units={"": (-3, -2, -1)},
)
linen(
  nn.ConvLocal(3, (2, 2), padding="VALID", use_bias=False),
  IMAGE,
  variant="no bias",
  units={"": (-3, -2, -1)},
  limit="coarse",
)

# --- norms, activations, wrappers
for layer in (nn.BatchNorm(use_running_average=True), nn.LayerNorm()):
  linen(layer, SEQUENCE)
linen(nn.BatchNorm(use_running_average=True, use_bias=False), X, variant="no bias")
linen(nn.LayerNorm(use_bias=False), SEQUENCE, variant="no bias")
linen(nn.LayerNorm(use_scale=False), SEQUENCE, variant="no scale")
linen(
  nn.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1)),
  SEQUENCE,
  variant="two axes",
  units={"": (-2, -1)},
)
linen(vmapped(nn.LayerNorm), X, variant="vmap", units=STACK)
linen(nn.RMSNorm(), SEQUENCE)
linen(nn.GroupNorm(num_groups=2), SEQUENCE)
linen(nn.GroupNorm(num_groups=2, use_bias=False), SEQUENCE, variant="no bias")
linen(nn.InstanceNorm(), SEQUENCE)
linen(nn.PReLU(), X)
linen(vmapped(nn.PReLU), X, variant="vmap", units={"": (0,)}, limit="assumed")
linen(nn.WeightNorm(nn.Dense(4)), X)
linen(nn.WeightNorm(nn.Dense(4, use_bias=False)), X, variant="no bias")
linen(
  nn.WeightNorm(nn.DenseGeneral((2, 4)), feature_axes=(-2, -1)),
  X,
  variant="two features",
  units={"": (-2, -1)},
)
SPECTRAL = {"kwargs": {"update_stats": False}}
linen(nn.SpectralNorm(nn.Dense(4)), X, **SPECTRAL)
linen(nn.SpectralNorm(nn.Dense(4, use_bias=False)), X, variant="no bias", **SPECTRAL)
linen(
  nn.SpectralNorm(nn.Conv(4, (2, 2)), error_on_non_matrix=False),
  IMAGE,
  variant="conv",
  **SPECTRAL,
)

# --- recurrent cells: the new carry after one step
HIDDEN = 4
CARRY, CARRIES = ramp(2, HIDDEN), (ramp(2, HIDDEN), 0.5 * ramp(2, HIDDEN))
GATED = {
  "LSTMCell": nn.LSTMCell,
  "OptimizedLSTMCell": nn.OptimizedLSTMCell,
  "SimpleCell": nn.SimpleCell,
  "GRUCell": nn.GRUCell,
  "MGUCell": nn.MGUCell,
}


def carry_of(layer: str):
  return CARRIES if "LSTM" in layer else CARRY


for layer, cell in GATED.items():
  linen(cell(HIDDEN), carry_of(layer), X, variant="cell")
linen(nn.SimpleCell(HIDDEN, residual=True), CARRY, X, variant="residual")
linen(nn.MGUCell(HIDDEN, reset_gate=False), CARRY, X, variant="no reset")
linen(nn.LSTMCell(3), (X, 0.5 * X), X, variant="square")
for bias in (True, False):
  linen(
    nn.ConvLSTMCell(HIDDEN, (2, 2), use_bias=bias),
    (ramp(2, 4, 4, HIDDEN), ramp(2, 4, 4, HIDDEN)),
    IMAGE,
    variant="bias" if bias else "no bias",
  )
linen(nn.ConvLSTMCell(HIDDEN, (2,)), (ramp(2, 5, 4), ramp(2, 5, 4)), LINE, variant="1d")
for layer in ("LSTMCell", "GRUCell"):
  linen(
    nn.RNN(GATED[layer](HIDDEN)),
    ramp(2, 1, 3),
    kwargs={"initial_carry": carry_of(layer)},
    variant=layer,
  )
linen(
  nn.Bidirectional(nn.RNN(nn.GRUCell(HIDDEN)), nn.RNN(nn.GRUCell(HIDDEN))),
  ramp(2, 1, 3),
  kwargs={"initial_carry": (CARRY, CARRY)},
  variant="GRUCell",
  units={"forward_rnn": (-1,), "backward_rnn": (-1,)},
)
for layer in ("LSTMCell", "SimpleCell"):
  linen(
    vmapped(GATED[layer], features=HIDDEN),
    carry_of(layer),
    X,
    variant="vmap",
    units=STACK,
  )

# --- attention: the projections, and what comes out
for attention in (nn.MultiHeadDotProductAttention, nn.MultiHeadAttention):
  linen(attention(2, qkv_features=6), SEQUENCE, units=ATTENTION)
  linen(
    attention(2, qkv_features=6, use_bias=False),
    SEQUENCE,
    variant="no bias",
    units=ATTENTION,
  )
  linen(
    attention(2, qkv_features=6, normalize_qk=True),
    SEQUENCE,
    variant="normalised",
    units=NORMALISED,
  )
linen(nn.SelfAttention(2, qkv_features=6), SEQUENCE, units=ATTENTION)
linen(
  nn.MultiHeadDotProductAttention(4, qkv_features=16),
  SEQUENCE,
  variant="all equal",
  units=ATTENTION,
)
linen(
  Scanned(lambda: nn.MultiHeadDotProductAttention(3, use_bias=False, qkv_features=9)),
  ramp(2, 3, 3),
  layer="linen.MultiHeadDotProductAttention",
  variant="scan, no bias, all equal",
  units={
    f"MultiHeadDotProductAttention_0/{name}": (0, *axes)
    for name, axes in ATTENTION.items()
  },
)


# --- flax.nnx
def nnx_stack(make):
  """Makes a stack of two layers."""

  @nnx.split_rngs(splits=2)
  @nnx.vmap
  def stack(rngs):
    return make(rngs)

  return stack


def call_stack(layer, *inputs):
  axes = (0, *(None for _ in inputs))
  return nnx.vmap(lambda layer, *inputs: layer(*inputs), in_axes=axes)(layer, *inputs)


def on(inputs):
  return lambda layer: layer(inputs)


def nnx_simple(layer, *args, inputs=X, **rest):
  """Adds a layer of nnx that is called with one array."""
  names = ("variant", "units", "same", "limit", "apart")
  case = {name: rest.pop(name) for name in names if name in rest}
  nnx_(lambda rngs: layer(*args, **rest, rngs=rngs), on(inputs), **case)


for bias, variant in ((True, "bias"), (False, "no bias")):
  nnx_simple(nnx.Linear, 3, 4, use_bias=bias, variant=variant, same="Dense")
  nnx_simple(
    nnx.LinearGeneral,
    3,
    (2, 4),
    use_bias=bias,
    variant=f"two features{'' if bias else ', no bias'}",
    units={"": (-2, -1)},
    limit=None if bias else "coarse",
    same="DenseGeneral",
  )
  nnx_simple(
    nnx.LinearGeneral,
    3,
    5,
    batch_axis={0: 2},
    use_bias=bias,
    variant=f"batch{'' if bias else ', no bias'}",
    units=STACK,
    limit=None if bias else "coarse",
    same="DenseGeneral",
  )
  nnx_simple(
    nnx.LinearGeneral,
    (3, 4),
    5,
    axis=(-2, -1),
    use_bias=bias,
    inputs=SEQUENCE,
    variant=f"two axes{'' if bias else ', no bias'}",
    same="DenseGeneral",
  )
  nnx_simple(
    nnx.Einsum,
    "ab,bcd->acd",
    (3, 2, 4),
    (2, 4) if bias else None,
    variant=variant,
    units={"": (-2, -1)},
    limit=None if bias else "coarse",
  )
  for rank, inputs in ((1, LINE), (2, IMAGE), (3, VOLUME)):
    nnx_simple(
      nnx.Conv,
      2,
      4,
      (2,) * rank,
      use_bias=bias,
      inputs=inputs,
      variant=f"{rank}d{'' if bias else ', no bias'}",
    )
  nnx_simple(
    nnx.Conv,
    2,
    4,
    (3, 3),
    feature_group_count=2,
    use_bias=bias,
    inputs=IMAGE,
    variant=f"grouped{'' if bias else ', no bias'}",
  )
  nnx_simple(
    nnx.ConvTranspose, 2, 4, (3, 3), use_bias=bias, inputs=IMAGE, variant=variant
  )
  nnx_simple(
    nnx.ConvTranspose,
    2,
    4,
    (3, 3),
    transpose_kernel=True,
    use_bias=bias,
    inputs=IMAGE,
    variant=f"transposed{'' if bias else ', no bias'}",
    limit=None if bias else "wrong",
  )
  nnx_(
    nnx_stack(lambda rngs, bias=bias: nnx.Linear(3, 4, use_bias=bias, rngs=rngs)),
    lambda m: call_stack(m, X),
    variant=f"vmap{'' if bias else ', no bias'}",
    units=STACK,
    limit=None if bias else "coarse",
    same="Dense",
  )
  nnx_(
    lambda rngs, bias=bias: nnx.MultiHeadAttention(
      2, 4, 6, use_bias=bias, decode=False, rngs=rngs
    ),
    lambda m: attention_outputs(m),
    variant=variant,
    units=ATTENTION,
    same="MultiHeadDotProductAttention",
  )
nnx_simple(nnx.Linear, 3, 3, variant="square", same="Dense")
nnx_simple(
  nnx.LinearGeneral,
  3,
  (3, 4),
  variant="ambiguous",
  units={"": (-2, -1)},
  limit="error",
  same="DenseGeneral",
)
nnx_simple(
  nnx.Einsum,
  "ab,bcd->adc",
  (3, 2, 4),
  (4, 2),
  variant="permuted",
  units={"": (-2, -1)},
  limit="error",
  apart=True,
)
nnx_simple(
  nnx.ConvTranspose,
  2,
  2,
  (3, 3),
  transpose_kernel=True,
  inputs=IMAGE,
  variant="transposed, square",
  limit="wrong",
)
nnx_(lambda rngs: nnx.Embed(5, 3, rngs=rngs), on(jnp.arange(5)))
nnx_(
  nnx_stack(lambda rngs: nnx.Embed(5, 3, rngs=rngs)),
  lambda m: call_stack(m, jnp.arange(5)),
  variant="vmap",
  units=STACK,
  limit="coarse",
)


def attention_outputs(layer):
  found = {name: getattr(layer, name)(SEQUENCE) for name in ("query", "key", "value")}
  for name in ("query", "key"):
    if getattr(layer, f"{name}_ln") is not None:
      found[f"{name}_ln"] = getattr(layer, f"{name}_ln")(found[name])
  return {**found, "out": layer(SEQUENCE)}


nnx_(
  lambda rngs: nnx.MultiHeadAttention(
    2, 4, 6, normalize_qk=True, decode=False, rngs=rngs
  ),
  attention_outputs,
  variant="normalised",
  units=NORMALISED,
  same="MultiHeadDotProductAttention",
)
for layer, variant in (
  (nnx.LSTMCell, "cell"),
  (nnx.OptimizedLSTMCell, "cell"),
  (nnx.SimpleCell, "cell"),
  (nnx.GRUCell, "cell"),
):
  nnx_(
    lambda rngs, layer=layer: layer(3, HIDDEN, rngs=rngs),
    lambda m: m(carry_of(type(m).__name__), X),
    variant=variant,
  )
for layer in (nnx.LSTMCell, nnx.GRUCell):
  nnx_(
    lambda rngs, layer=layer: nnx.RNN(layer(3, HIDDEN, rngs=rngs)),
    lambda m: m(ramp(2, 1, 3), initial_carry=carry_of(type(m.cell).__name__)),
    variant=layer.__name__,
  )
nnx_(
  lambda rngs: nnx.Bidirectional(
    *(nnx.RNN(nnx.GRUCell(3, HIDDEN, rngs=rngs)) for _ in range(2)),
    merge_fn=lambda forward, backward: {
      "forward_rnn": forward,
      "backward_rnn": backward,
    },
  ),
  lambda m: m(ramp(2, 1, 3), initial_carry=(CARRY, CARRY)),
  variant="GRUCell",
  units={"forward_rnn": (-1,), "backward_rnn": (-1,)},
)
nnx_(
  nnx_stack(lambda rngs: nnx.GRUCell(3, HIDDEN, rngs=rngs)),
  lambda m: call_stack(m, CARRY, X),
  variant="vmap",
  units=STACK,
)
for layer in (nnx.LayerNorm, nnx.RMSNorm):
  nnx_simple(layer, 4, inputs=SEQUENCE)
nnx_simple(nnx.LayerNorm, 4, use_bias=False, inputs=SEQUENCE, variant="no bias")
nnx_simple(nnx.LayerNorm, 4, use_scale=False, inputs=SEQUENCE, variant="no scale")
nnx_simple(nnx.BatchNorm, 4, use_running_average=True, inputs=SEQUENCE)
nnx_simple(nnx.GroupNorm, 4, num_groups=2, inputs=SEQUENCE)
nnx_simple(nnx.InstanceNorm, 4, inputs=SEQUENCE)
nnx_(lambda rngs: nnx.PReLU(), on(X))
nnx_(
  lambda rngs: nnx.WeightNorm(nnx.Linear(3, 4, rngs=rngs), rngs=rngs),
  on(X),
  concrete=True,  # older releases keep its scales outside nnx.Param
)
nnx_(
  lambda rngs: nnx.SpectralNorm(nnx.Linear(3, 4, rngs=rngs), rngs=rngs),
  lambda m: m(X, update_stats=False),
)


def lora_outputs(layer, prefix=""):
  """What each factor feeds; the first one's units are seen through an identity."""
  lora = layer.lora if prefix else layer
  found = {prefix + "lora_b": layer(X)}
  lora.lora_b[...] = jnp.eye(2, 4)
  return {**found, prefix + "lora_a": layer(X)}


LORA = {"lora_a": (-1,), "lora_b": (-1,)}
nnx_(lambda rngs: nnx.LoRA(3, 2, 4, rngs=rngs), lora_outputs, units=LORA)
nnx_(
  lambda rngs: nnx.LoRALinear(3, 4, lora_rank=2, rngs=rngs),
  lambda m: {"": m(X), **lora_outputs(m, "lora/")},
  units={"": (-1,), **{f"lora/{name}": axes for name, axes in LORA.items()}},
)
nnx_(
  lambda rngs: nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)),
  lambda m: {"layers/0": m.layers[0](X), "layers/1": m(X)},
  units={"layers/0": (-1,), "layers/1": (-1,)},
)


# --- haiku, equinox
def haiku(call, *inputs, layer, prepare=None):
  """Adds a case of haiku; `call` makes the layer and calls it."""
  model = hk.without_apply_rng(hk.transform(call))

  def build():
    shapes = jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), *inputs))
    params = fill(shapes, layer)
    if prepare is not None:
      params = prepare(params)
    return params, lambda params: {"": model.apply(params, *inputs)}

  CASES.append(Case(f"haiku.{layer}", "bias", build))


def open_gate(params):
  """Makes the GRU's reset gate of a unit act on that unit alone, to tell it apart."""
  weights = params["gru"]["w_h"].at[:, 2 * HIDDEN :].set(jnp.eye(HIDDEN))
  return {"gru": {**params["gru"], "w_h": weights}}


def carry_after(cell, carry, inputs=X):
  return cell(inputs, carry)[1]


haiku(lambda x: hk.Linear(4)(x), X, layer="Linear")
haiku(lambda x: hk.nets.MLP([4])(x), X, layer="MLP")
haiku(lambda x: hk.Conv2D(4, 3)(x), IMAGE, layer="Conv2D")
haiku(lambda x: hk.Conv2DTranspose(4, 3)(x), IMAGE, layer="Conv2DTranspose")
haiku(lambda x: hk.DepthwiseConv2D(2, 3)(x), IMAGE, layer="DepthwiseConv2D")
haiku(lambda x: hk.LayerNorm(-1, True, True)(x), SEQUENCE, layer="LayerNorm")
haiku(lambda i: hk.Embed(5, 3)(i), jnp.arange(5), layer="Embed")
haiku(lambda x: carry_after(hk.VanillaRNN(HIDDEN), CARRY), X, layer="VanillaRNN")
haiku(lambda x: carry_after(hk.LSTM(HIDDEN), hk.LSTMState(*CARRIES)), X, layer="LSTM")
haiku(lambda x: carry_after(hk.GRU(HIDDEN), CARRY), X, layer="GRU", prepare=open_gate)
haiku(
  lambda x: carry_after(
    hk.Conv2DLSTM((4, 4), HIDDEN, 2), hk.LSTMState(*[ramp(2, 4, 4, HIDDEN)] * 2), x
  ),
  IMAGE,
  layer="Conv2DLSTM",
)


def equinox(make, *inputs, variant="bias", axis=-1, limit=None):
  """Adds a case of equinox; layers are called with one example."""
  model = eqx.filter_eval_shape(make, key=jax.random.key(0))
  layer = f"equinox.{type(model).__name__}"

  def build():
    arrays, static = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    params = fill(arrays, layer)
    return params, lambda p: {"": eqx.combine(p, static)(*inputs)}

  CASES.append(
    Case(layer, variant, build, {"": (axis,)}, limit, options={"unit_axis": "first"})
  )


def equinox_stack(make, *inputs, variant, units=(0, -1), limit=None):
  """Adds a case of two layers of equinox in one, as filter_vmap makes them."""
  keys = jax.random.split(jax.random.key(0), 2)
  model = eqx.filter_eval_shape(eqx.filter_vmap(lambda key: make(key=key)), keys)
  layer = f"equinox.{type(model).__name__}"

  def build():
    arrays, static = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    @eqx.filter_vmap(in_axes=(eqx.if_array(0), None))
    def call(arrays, inputs):
      return eqx.combine(arrays, static)(*inputs)

    return fill(arrays, layer), lambda p: {"": call(p, inputs)}

  def overrides():
    return alrao_jax.equinox.unit_overrides(model)

  CASES.append(
    Case(
      layer,
      variant,
      build,
      {"": units},
      limit,
      overrides=overrides,
      options={"unit_axis": "first"},
    )
  )


# --- complex layers
COMPLEX = jnp.complex64
for module, inputs, units in (
  (partial(nn.Dense, 4), X, None),
  (partial(nn.Conv, 4, (2, 2), feature_group_count=2), IMAGE, None),
  (partial(nn.DenseGeneral, (2, 4)), X, {"": (-2, -1)}),
):
  dtypes = {"dtype": COMPLEX, "param_dtype": COMPLEX}
  linen(module(**dtypes), inputs.astype(COMPLEX), variant="complex", units=units)
nnx_simple(
  nnx.Linear, 3, 4, param_dtype=COMPLEX, inputs=X.astype(COMPLEX), variant="complex"
)
equinox(
  partial(eqx.nn.Linear, 3, 4, dtype=COMPLEX), X[0].astype(COMPLEX), variant="complex"
)
PIXELS = IMAGE[0].transpose(2, 0, 1)  # equinox's channels come first
for bias in (True, False):
  variant = "bias" if bias else "no bias"
  equinox(partial(eqx.nn.Linear, 3, 4, use_bias=bias), X[0], variant=variant)
  equinox(
    partial(eqx.nn.Linear, 3, 3, use_bias=bias), X[0], variant=f"{variant}, square"
  )
  equinox(
    partial(eqx.nn.Conv2d, 2, 4, 3, use_bias=bias), PIXELS, variant=variant, axis=0
  )
  equinox(
    partial(eqx.nn.ConvTranspose2d, 2, 4, 3, use_bias=bias),
    PIXELS,
    variant=variant,
    axis=0,
  )
  equinox(
    partial(eqx.nn.LSTMCell, 3, HIDDEN, use_bias=bias),
    X[0],
    (CARRIES[0][0], CARRIES[1][0]),
    variant=variant,
  )
  equinox(
    partial(eqx.nn.GRUCell, 3, HIDDEN, use_bias=bias), X[0], CARRY[0], variant=variant
  )
  equinox(
    lambda key, bias=bias: eqx.nn.LayerNorm(4, use_bias=bias), CARRY[0], variant=variant
  )

equinox_stack(partial(eqx.nn.Linear, 3, 4), X[0], variant="stack")
equinox_stack(
  partial(eqx.nn.Linear, 3, 4, use_bias=False),
  X[0],
  variant="stack, no bias",
  limit="coarse",
)
equinox_stack(
  partial(eqx.nn.Conv2d, 2, 4, 3, use_bias=False),
  PIXELS,
  variant="stack, no bias",
  units=(0, 1),
  limit="coarse",
)
equinox_stack(lambda key: eqx.nn.LayerNorm(4), CARRY[0], variant="stack")
equinox_stack(
  lambda key: eqx.nn.LayerNorm(4, use_bias=False),
  CARRY[0],
  variant="stack, no bias",
  limit="coarse",
)
