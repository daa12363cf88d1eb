"""A convolutional network with batch normalisation against the authors' implementation.

Five whole training steps in float64, to 1e-11 of each array's largest entry. The
authors draw apart for the scale and the bias of a norm layer, where this library has
one rate a feature: overrides give each its own here.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import cut

import alrao_jax as alrao
import alrao_jax.linen

NUM_HEADS, NUM_CLASSES = 3, 3
APART = tuple(
  (path, alrao.Units((0,), group=path)) for path in ("n1/scale", "n2/scale")
)


class ConvNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    def norm(name):
      # PyTorch's momentum of 0.1 is Flax's of 0.9.
      return nn.BatchNorm(
        use_running_average=False, momentum=0.9, param_dtype=x.dtype, name=name
      )

    x = nn.relu(norm("n1")(nn.Conv(6, (3, 3), param_dtype=x.dtype, name="c1")(x)))
    x = nn.max_pool(x, (2, 2), (2, 2))
    x = nn.Conv(8, (3, 3), use_bias=False, param_dtype=x.dtype, name="c2")(x)
    x = nn.relu(norm("n2")(x)).mean((1, 2))
    head = nn.Dense(NUM_CLASSES, param_dtype=x.dtype)
    return alrao_jax.linen.MultiHead(head, num_heads=NUM_HEADS, name="out")(x)


def _tree(arrays, body, head):
  """The reference's arrays as this model's: output features go last."""

  def array(name):
    value = arrays[name]
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value

  tree = {
    "c1": {"kernel": array(f"{body}c1.weight"), "bias": array(f"{body}c1.bias")},
    "c2": {"kernel": array(f"{body}c2.weight")},
    "n1": {"scale": array(f"{body}n1.weight"), "bias": array(f"{body}n1.bias")},
    "n2": {"scale": array(f"{body}n2.weight"), "bias": array(f"{body}n2.bias")},
  }
  kernels = np.stack([head(j, "weight") for j in range(NUM_HEADS)])
  biases = np.stack([head(j, "bias") for j in range(NUM_HEADS)])
  tree["out"] = {"alrao_heads": {"kernel": kernels, "bias": biases}}
  return jax.tree.map(jnp.asarray, tree)


def _parameters(traces, moment):
  def head(j, leaf):
    return traces[f"{moment}/last_layer_{j}.fc.{leaf}"].T

  return _tree(traces, f"{moment}/internal_nn.", head)


def _rates(traces):
  def head(j, leaf):
    shape = traces[f"init/last_layer_{j}.fc.{leaf}"].T.shape
    return np.full(shape, traces["lr/heads"][j])

  return _tree(traces, "lr/", head)


def _assert_close(got, expected):
  def check(got, expected):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype == np.float64
    assert np.abs(got - expected).max() <= 1e-11 * np.abs(expected).max()

  jax.tree.map(check, got, expected)


@pytest.fixture(scope="module")
def traces():
  name = "public_conv/"
  with np.load(cut.HERE / "traces.npz") as kept:
    return {k.removeprefix(name): v for k, v in kept.items() if k.startswith(name)}


@pytest.mark.slow
def test_training_equals_the_reference(traces):
  # Flax's BatchNorm itself mixes types.
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    _check_training(traces)


def _check_training(traces):
  model = ConvNet()
  optimizer = alrao.alrao(
    jax.random.key(0),
    averaging=alrao.switch(0.9999),
    units=alrao.UnitOptions(overrides=APART),
  )
  params = _parameters(traces, "init")
  opt_state = optimizer.init(params)
  opt_state = alrao.with_unit_rates(
    opt_state, params, _rates(traces), units=alrao.UnitOptions(overrides=APART)
  )
  stats = {
    name: {"mean": jnp.zeros(size), "var": jnp.ones(size)}
    for name, size in (("n1", 6), ("n2", 8))
  }

  @jax.jit
  def train_step(params, stats, opt_state, x, y):
    def loss_fn(params):
      variables = {"params": params, "batch_stats": stats}
      heads, new = model.apply(variables, x, mutable=["batch_stats"])
      loss, info = alrao.classification_loss(heads, y, alrao.log_weights(opt_state))
      return loss, (info, new["batch_stats"])

    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (info, new_stats)), grads = value_and_grad(params)
    updates, opt_state_ = optimizer.update(
      grads, opt_state, params, head_log_likelihoods=info.head_log_likelihoods
    )
    return optax.apply_updates(params, updates), new_stats, opt_state_, loss, info

  for i in range(5):
    x, y = traces["x"][i].transpose(0, 2, 3, 1), traces["y"][i]
    params, stats, opt_state, loss, info = train_step(params, stats, opt_state, x, y)
    _assert_close(loss, traces["loss"][i])
    _assert_close(-info.head_log_likelihoods, traces["head_loss"][i])
    _assert_close(alrao.log_weights(opt_state), traces["logposterior"][i + 1])
    if i + 1 in (1, 2, 5):
      _assert_close(params, _parameters(traces, f"step{i + 1}"))
      means = {n: traces[f"step{i + 1}/buf/{n}.running_mean"] for n in ("n1", "n2")}
      _assert_close({name: stats[name]["mean"] for name in means}, means)
