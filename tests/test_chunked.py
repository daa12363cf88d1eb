"""The mixture's loss, a few examples at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alrao_jax import mixture_loss, multi_head
from alrao_jax._losses import chunked_mixture_loss

HEADS, EXAMPLES, FEATURES, CLASSES = 3, 7, 4, 11


@pytest.fixture(autouse=True)
def _double_precision():
  with jax.enable_x64(True):
    yield


def log_softmax_at(scale, outputs, targets):
  return -optax.losses.softmax_cross_entropy_with_integer_labels(
    scale * outputs, targets
  )


def problem():
  keys = jax.random.split(jax.random.key(0), 4)
  params = {
    "body": jax.random.normal(keys[0], (FEATURES, FEATURES), jnp.float64),
    "heads": jax.random.normal(keys[1], (HEADS, FEATURES, CLASSES), jnp.float64),
    "scale": jnp.float64(0.7),
  }
  inputs = jax.random.normal(keys[2], (EXAMPLES, FEATURES), jnp.float64)
  targets = jax.random.randint(keys[3], (EXAMPLES,), 0, CLASSES)
  return params, inputs, targets, jnp.log(jnp.array([0.5, 0.3, 0.2]))


def loss_of(params, inputs, targets, log_weights, chunk_size=None, weights=None):
  """Loss and info, with a trained factor on the logits; chunked if told to be."""
  features = inputs @ params["body"]
  log_prob = functools.partial(log_softmax_at, params["scale"])

  def evaluate(features):
    return multi_head(lambda kernel, x: x @ kernel, params["heads"], features)

  if chunk_size is None:
    return mixture_loss(
      evaluate(features), lambda x: log_prob(x, targets), log_weights, weights=weights
    )
  return chunked_mixture_loss(
    evaluate,
    features,
    log_prob,
    targets,
    log_weights,
    chunk_size=chunk_size,
    weights=weights,
  )


def assert_equal_to_whole(params, *args, chunk_size, weights=None):
  gradient = jax.value_and_grad(loss_of, has_aux=True)
  whole = jax.jit(lambda p: gradient(p, *args, None, weights))(params)
  parts = jax.jit(lambda p: gradient(p, *args, chunk_size, weights))(params)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    assert a.dtype == b.dtype
    # Sums of a few terms of size 1 in another order.
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
  return parts


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_value_and_gradient_are_the_whole_batchs(chunk_size):
  params, *args = problem()
  (loss, _), gradients = assert_equal_to_whole(params, *args, chunk_size=chunk_size)
  assert np.isfinite(loss)
  assert all((np.asarray(g) != 0).any() for g in jax.tree.leaves(gradients))


def test_head_that_diverges_in_one_chunk_has_diverged_in_all():
  params, inputs, targets, log_weights = problem()
  # One head's logits overflow, for one example.
  inputs = inputs.at[:, 0].set(0).at[3, 0].set(1e10)
  params["body"] = jnp.eye(FEATURES, dtype=jnp.float64)
  params["heads"] = params["heads"].at[1, 0].set(1e305)
  args = (inputs, targets, log_weights)
  (loss, info), gradients = assert_equal_to_whole(params, *args, chunk_size=2)
  assert np.isfinite(loss)
  assert info.healthy.tolist() == [True, False, True]
  assert (gradients["heads"][1] == 0).all()
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_examples_of_weight_zero_never_matter():
  params, inputs, targets, log_weights = problem()
  weights = jnp.array([1.0, 2.0, 0.0, 1.0, 0.0, 0.0, 3.0])
  targets = targets.at[2].set(CLASSES + 5)  # no such class: NaN
  args = (inputs, targets, log_weights)
  (loss, info), _ = assert_equal_to_whole(params, *args, chunk_size=2, weights=weights)
  assert np.isfinite(loss)
  assert info.healthy.all()


def test_chunks_without_weight_are_no_observation():
  params, *args = problem()
  for weights in (jnp.zeros(EXAMPLES), (jnp.arange(EXAMPLES) > 3).astype(float)):
    (loss, info), gradients = assert_equal_to_whole(
      params, *args, chunk_size=2, weights=weights
    )
    assert np.isfinite(loss)
    seen = bool(weights.any())
    assert np.isfinite(info.head_log_likelihoods).tolist() == [seen] * HEADS
    assert info.num_examples == weights.sum()
    assert all((np.asarray(g) != 0).any() == seen for g in jax.tree.leaves(gradients))


def test_targets_have_no_gradient():
  params, inputs, _, log_weights = problem()

  def loss_fn(targets):
    return chunked_mixture_loss(
      lambda x: multi_head(lambda kernel, x: x @ kernel, params["heads"], x),
      inputs,
      lambda outputs, targets: -((outputs - targets) ** 2).sum(axis=-1),
      targets,
      log_weights,
      chunk_size=3,
    )[0]

  gradient = jax.grad(loss_fn)(jnp.ones((EXAMPLES, CLASSES)))
  assert (gradient == 0).all()


def test_peak_memory_is_that_of_a_chunk():
  heads, examples, classes, chunk_size = 4, 512, 2_000, 32
  params = {
    "body": jnp.ones((FEATURES, FEATURES), jnp.float32),
    "heads": jnp.ones((heads, FEATURES, classes), jnp.float32),
    "scale": jnp.float32(1),
  }
  inputs = jnp.ones((examples, FEATURES), jnp.float32)
  targets = jnp.zeros(examples, jnp.int32)
  log_weights = jnp.log(jnp.full(heads, 1 / heads, jnp.float32))

  def peak(chunk_size):
    def gradient(params):
      return jax.grad(
        lambda p: loss_of(p, inputs, targets, log_weights, chunk_size)[0]
      )(params)

    analysis = jax.jit(gradient).lower(params).compile().memory_analysis()
    return analysis.temp_size_in_bytes

  outputs = 4 * heads * examples * classes
  # Logits, and at least the cotangent of one of their halves.
  assert peak(None) >= 2 * outputs
  # A sixteenth of whatever the whole takes, and some of the parameters' gradient.
  slack = 8 * 4 * heads * FEATURES * classes
  assert peak(chunk_size) <= peak(None) * chunk_size / examples + slack


@pytest.mark.parametrize(
  ("changes", "error", "text"),
  [
    ({"chunk_size": 0}, ValueError, "chunk_size"),
    ({"chunk_size": 2.0}, TypeError, "chunk_size"),
    ({"targets": jnp.zeros(5, jnp.int32)}, ValueError, r"axis 0.*lengths \[5, 7\]"),
    ({"evaluate": lambda x: x}, TypeError, "must be HeadOutputs"),
    ({"log_prob": lambda x, _: x}, ValueError, r"log_prob=\.\.\.\) must return shape"),
    ({"log_weights": jnp.zeros(2)}, ValueError, "log_weights"),
    ({"weights": jnp.ones(3)}, ValueError, "weights"),
  ],
)
def test_wrong_arguments_are_named(changes, error, text):
  params, inputs, targets, log_weights = problem()
  arguments = {
    "evaluate": lambda x: multi_head(lambda k, x: x @ k, params["heads"], x),
    "features": inputs,
    "log_prob": functools.partial(log_softmax_at, 1.0),
    "targets": targets,
    "log_weights": log_weights,
    "chunk_size": 2,
    **changes,
  }
  with pytest.raises(error, match=text):
    chunked_mixture_loss(**arguments)
