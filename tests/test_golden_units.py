"""Which parameters share a rate: here, and in the authors' implementation.

The authors' generator gives each parameter a tensor of rates; equal entries share one.
Where it follows the papers, sharing must be the same here, entry by entry. Elsewhere
this library shares more, never less:

- a norm layer's scale and bias have one rate a feature (the authors draw them apart);
- all gates of a recurrent cell, input and recurrent, have one rate a unit, as the
  papers say (the authors draw apart for each gate, and for input and recurrent);
- layers that the authors' generator doesn't know have one rate a unit (there, each
  single weight draws its own).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import cut

import alrao_jax as alrao


@pytest.fixture(scope="module")
def traces():
  with np.load(cut.HERE / "traces.npz") as kept:
    return {key: value for key, value in kept.items() if key.startswith("rates/")}


def _layer(rates, order=None):
  """A layer's rates in PyTorch's layout: output features first, then input, space."""
  found = {}
  if "kernel" in rates:
    kernel = rates["kernel"]
    order = order or (kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2))
    found["weight"] = kernel.transpose(order)
  if "scale" in rates:
    found["weight"] = rates["scale"]
  if "embedding" in rates:
    found["weight"] = rates["embedding"]
  if "bias" in rates:
    found["bias"] = rates["bias"]
  return found


def _transposed(rates):
  """A transposed convolution, which keeps input features first in PyTorch."""
  return _layer(rates, (2, 3, 0, 1))


def _cell(rates, inputs, recurrent, number=0):
  """A recurrent cell: PyTorch stacks the gates, one after another, on axis 0.

  It has two biases to each gate where Flax has one; the other is left out.
  """

  def stack(names, leaf):
    gates = [rates[name][leaf].T for name in names if leaf in rates[name]]
    return np.concatenate(gates) if len(gates) == len(names) else None

  found = {
    f"weight_ih_l{number}": stack(inputs, "kernel"),
    f"weight_hh_l{number}": stack(recurrent, "kernel"),
    f"bias_ih_l{number}": stack(inputs, "bias"),
    f"bias_hh_l{number}": stack(recurrent, "bias"),
  }
  return {name: array for name, array in found.items() if array is not None}


def _lstm(rates, number=0):
  return _cell(rates, ("ii", "if", "ig", "io"), ("hi", "hf", "hg", "ho"), number)


def _gru(rates):
  return _cell(rates["cell"], ("ir", "iz", "in"), ("hr", "hz", "hn"))


def _rnn(rates):
  return _cell(rates["cell"], ("i",), ("h",))


class ConvNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(6, (3, 3), name="c1")(x)
    x = nn.BatchNorm(use_running_average=False, name="n1")(x)
    x = nn.Conv(8, (3, 3), use_bias=False, name="c2")(nn.relu(x))
    return nn.BatchNorm(use_running_average=False, name="n2")(x)


class LanguageModel(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(12, 6, name="encoder")(tokens)
    x = nn.RNN(nn.OptimizedLSTMCell(7, name="cell0"))(x)
    return nn.RNN(nn.OptimizedLSTMCell(7, name="cell1"))(x)


def _conv_net(rates, layers):
  return {
    f"{name}.{leaf}": array
    for name in layers
    for leaf, array in _layer(rates[name]).items()
  }


def _language_model(rates):
  cells = _lstm(rates["cell0"]) | _lstm(rates["cell1"], 1)
  return {f"rnn.{name}": array for name, array in cells.items()}


_IMAGES, _VECTORS = (2, 8, 8, 3), (2, 5)
_BATCH_NORM = nn.BatchNorm(use_running_average=False)

# Name in the traces, module, shape of its input, and its rates in PyTorch's layout.
SAME = [
  ("linear(5->4)", nn.Dense(4), _VECTORS, _layer),
  ("linear_nobias", nn.Dense(4, use_bias=False), _VECTORS, _layer),
  ("conv2d(3->6,k3)", nn.Conv(6, (3, 3)), _IMAGES, _layer),
  (
    "conv2d_depthwise(8)",
    nn.Conv(8, (3, 3), feature_group_count=8),
    (2, 8, 8, 8),
    _layer,
  ),
  ("embedding(12x6)", nn.Embed(12, 6), None, _layer),
  ("public_conv", ConvNet(), _IMAGES, lambda r: _conv_net(r, ("c1", "c2"))),
  (
    "public_lstm",
    LanguageModel(),
    None,
    lambda r: {"encoder.weight": r["encoder"]["embedding"]},
  ),
]
# The same, and the number of units, each with one rate.
COARSER = [
  ("batchnorm2d(6)", _BATCH_NORM, (2, 6), _layer, 6),
  ("layernorm(6)", nn.LayerNorm(), (2, 6), _layer, 6),
  ("groupnorm(2,6)", nn.GroupNorm(2), (2, 6), _layer, 6),
  ("conv1d(3->6)", nn.Conv(6, (3,)), (2, 8, 3), _layer, 6),
  ("conv3d(3->4)", nn.Conv(4, (2, 2, 2)), (2, 4, 4, 4, 3), _layer, 4),
  ("convtranspose2d(3->6)", nn.ConvTranspose(6, (3, 3)), _IMAGES, _transposed, 6),
  ("gru(6->7)", nn.RNN(nn.GRUCell(7)), (2, 3, 6), _gru, 7),
  ("rnn_tanh(6->7)", nn.RNN(nn.SimpleCell(7)), (2, 3, 6), _rnn, 7),
  ("public_conv", ConvNet(), _IMAGES, lambda r: _conv_net(r, ("n1", "n2")), 6 + 8),
  ("public_lstm", LanguageModel(), None, _language_model, 7 + 7),
]


def _flat(traces, name, module, shape, to_torch):
  """Labels of equal rates, entry by entry: here, and in the traces."""
  x = jnp.zeros((2, 3), jnp.int32) if shape is None else jnp.zeros(shape)
  params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  opt_state = alrao.scale_by_unit_rates(jax.random.key(0)).init(params)
  rates = to_torch(jax.tree.map(np.asarray, alrao.unit_rates(opt_state, params)))
  expected = {leaf: traces[f"rates/{name}/{leaf}"] for leaf in rates}
  assert {k: v.shape for k, v in rates.items()} == {
    k: v.shape for k, v in expected.items()
  }
  flat = lambda arrays: np.concatenate([a.ravel() for a in arrays.values()])  # noqa: E731
  return flat(cut.labels(rates)), flat(expected)


def _count(*labels):
  return len(set(zip(*(one.tolist() for one in labels), strict=True)))


@pytest.mark.parametrize("case", SAME, ids=lambda case: case[0])
def test_rates_are_shared_as_in_the_reference(traces, case):
  here, there = _flat(traces, *case)
  assert _count(here) == _count(there) == _count(here, there)


@pytest.mark.parametrize("case", COARSER, ids=lambda case: case[0])
def test_rates_are_shared_more_than_in_the_reference(traces, case):
  *case, num_units = case
  here, there = _flat(traces, *case)
  # Whatever shares there shares here, and here there is one rate a unit.
  assert _count(here, there) == _count(there)
  assert _count(here) == num_units < _count(there)
