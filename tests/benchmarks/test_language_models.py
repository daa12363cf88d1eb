"""The language models: counts, units, and what each layer computes."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alrao_jax import UnitOptions, mixture_loss, unit_specs
from alrao_jax.linen import MultiHead
from benchmarks.models.class_factored import ClassFactored
from benchmarks.models.decoder import Decoder
from benchmarks.models.language import build_language_model
from benchmarks.models.lstm import LSTM, LSTMLayer

KEY = jax.random.key(0)


def shapes_of(model):
  symbols = jnp.zeros((2, 8), jnp.int32)
  carry = model.body.initial_carry(2)
  return jax.eval_shape(model.init, KEY, symbols, carry)["params"]


def initialized(module, *args):
  return jax.jit(module.init)(KEY, *args)


def applied(module, *args, **kwargs):
  return jax.jit(lambda args: module.apply(*args, **kwargs))(args)


def num_parameters(params):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
  ("size", "num_heads", "count"),
  [
    (50, None, 170_850),
    (50, 6, 196_100),
    (50, 10, 216_300),
    (10_000, None, 2_170_800),
    (10_000, 6, 7_220_800),
    (10_000, 10, 11_260_800),
  ],
)
def test_lstm_has_one_bias_a_gate(size, num_heads, count):
  model = build_language_model("lstm", size, num_heads=num_heads)
  assert num_parameters(shapes_of(model)) == count


def test_lstm_layers_share_one_rate_across_gates():
  params = shapes_of(build_language_model("lstm", 50, num_heads=6))
  specs = unit_specs(params, UnitOptions(strict=True))
  units = {spec.group: spec.num_units for spec in specs.values() if spec.kind == "unit"}
  layers = {f"body/lstm_{number}": 100 for number in (1, 2)}
  assert units == {"body/embedding/embedding": 100, **layers}
  heads = {path for path, spec in specs.items() if spec.kind == "head"}
  assert heads == {f"output/alrao_heads/{name}" for name in ("bias", "kernel")}


@pytest.mark.parametrize("output_layer", ["softmax", "class_factored"])
@pytest.mark.parametrize("name", ["lstm", "decoder"])
def test_heads_change_only_the_output_layer(name, output_layer):
  plain, heads = (
    shapes_of(
      build_language_model(name, 11, output_layer=output_layer, num_heads=num_heads)
    )
    for num_heads in (None, 3)
  )
  assert plain["body"] == heads["body"]
  stacked = jax.tree.map(lambda x: (3, *x.shape), plain["output"])
  assert jax.tree.map(lambda x: x.shape, heads["output"]["alrao_heads"]) == stacked
  specs = unit_specs(heads, UnitOptions(strict=True)).values()
  assert all(spec.rule for spec in specs)


def test_lstm_layer_equals_linens_cell():
  inputs = jax.random.normal(KEY, (2, 5, 3))
  oracle = nn.RNN(nn.OptimizedLSTMCell(4), return_carry=True, time_major=False)
  variables = initialized(oracle, inputs)
  carry = (jnp.full((2, 4), 0.3), jnp.full((2, 4), -0.2))
  params = variables["params"]["cell"]
  params = jax.tree.map(lambda x: x + 0.1, params)  # biases too
  last, expected = applied(
    oracle, {"params": {"cell": params}}, inputs, initial_carry=carry
  )
  layer = LSTMLayer(4)
  outputs, after = applied(layer, {"params": params}, inputs.swapaxes(0, 1), carry)
  # A few roundings in float32, through five steps.
  close = {"rtol": 1e-5, "atol": 1e-6}
  np.testing.assert_allclose(outputs.swapaxes(0, 1), expected, **close)
  for a, b in zip(after, last, strict=True):
    np.testing.assert_allclose(a, b, **close)
  shapes = jax.tree.map(jnp.shape, params)
  own = jax.eval_shape(layer.init, KEY, inputs.swapaxes(0, 1), carry)["params"]
  assert jax.tree.map(lambda x: x.shape, own) == shapes


def test_carry_makes_two_halves_a_whole():
  body = LSTM(vocabulary_size=7, features=3, units=4)
  symbols = jnp.arange(20).reshape(2, 10) % 7
  variables = initialized(body, symbols, body.initial_carry(2))
  whole, last = applied(body, variables, symbols, body.initial_carry(2))
  first, carry = applied(body, variables, symbols[:, :6], body.initial_carry(2))
  second, carry = applied(body, variables, symbols[:, 6:], carry)
  halves = jnp.concatenate([first, second], axis=1)
  np.testing.assert_allclose(halves, whole, rtol=1e-5, atol=1e-7)
  for a, b in zip(jax.tree.leaves(carry), jax.tree.leaves(last), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_decoder_sees_nothing_of_the_future():
  body = Decoder(vocabulary_size=7, context=6, width=8, num_layers=1)
  symbols = jnp.arange(6)[None]
  variables = initialized(body, symbols, ())
  before, _ = applied(body, variables, symbols, ())
  after, _ = applied(body, variables, symbols.at[0, 3].add(1) % 7, ())
  changed = (before != after).any(axis=-1)[0]
  assert changed.tolist() == [False, False, False, True, True, True]


@pytest.mark.parametrize(("size", "num_classes"), [(9, None), (10, None), (10, 7)])
def test_class_factored_softmax_is_a_distribution(size, num_classes):
  layer = ClassFactored(size, num_classes)
  features = jax.random.normal(KEY, (2, 3, 4))
  variables = initialized(layer, features)
  log_probs = applied(layer, variables, features)
  assert log_probs.shape == (2, 3, size)
  np.testing.assert_allclose(jnp.exp(log_probs).sum(axis=-1), 1.0, rtol=1e-5)
  targets = jnp.arange(6).reshape(2, 3) + size - 6
  chosen = applied(layer, variables, features, targets)
  expected = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(chosen, expected, rtol=1e-5, atol=1e-6)


def test_class_factored_softmax_is_a_head():
  """Its two ways to the log-likelihood train body and heads alike."""
  layer = MultiHead(ClassFactored(10), num_heads=3)
  features = jax.random.normal(KEY, (5, 4))
  targets, log_weights = jnp.arange(5) * 2, jnp.log(jnp.full(3, 1 / 3))
  variables = initialized(layer, features)

  def of_targets(variables, features):
    heads = layer.apply(variables, features, targets)
    return mixture_loss(heads, lambda log_probs: log_probs, log_weights)[0]

  def of_all(variables, features):
    heads = layer.apply(variables, features)
    pick = jax.nn.one_hot(targets, 10)
    return mixture_loss(heads, lambda x: (pick * x).sum(axis=-1), log_weights)[0]

  results = [
    jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(variables, features)
    for loss in (of_targets, of_all)
  ]
  for a, b in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
