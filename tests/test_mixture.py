"""Losses and predictions of a mixture of heads, against their formulas."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alrao_jax._losses import (
  binary_loss,
  classification_loss,
  mixture_loss,
  regression_loss,
)
from alrao_jax._multi_head import HeadOutputs, multi_head
from alrao_jax._predict import mixture_log_probs, mixture_mean

NUM_HEADS, BATCH, CLASSES = 3, 6, 4


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def normal(index, *shape):
  return np.random.default_rng(index).normal(size=shape)


def twice(outputs):
  outputs = jax.tree.map(jnp.asarray, outputs)
  return HeadOutputs(shared=outputs, own=outputs)


def log_softmax(x):
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def mix(log_weights, log_likelihoods):
  """The log-likelihood of a mixture of heads on axis 0."""
  return np.log(np.tensordot(np.exp(log_weights), np.exp(log_likelihoods), axes=1))


LOGITS = normal(0, NUM_HEADS, BATCH, CLASSES)
LABELS = np.array([0, 1, 2, 3, 0, 1])
LOG_WEIGHTS = log_softmax(normal(1, NUM_HEADS))
LOG_PROBS = log_softmax(LOGITS)[:, np.arange(BATCH), LABELS]  # (heads, batch)
SOFT = np.exp(log_softmax(normal(2, BATCH, CLASSES)))
WEIGHTS = np.array([1.0, 0.0, 2.0, 0.5, 0.0, 1.0])


@functools.partial(jax.jit, static_argnums=0, static_argnames="label_smoothing")
def run(loss_fn, heads, *args, **kwargs):
  """A loss, its info and its gradient by both halves of the heads' outputs."""
  step = jax.value_and_grad(loss_fn, has_aux=True)
  (loss, info), grads = step(heads, *args, **kwargs)
  return loss, info, grads


log_probs_of = jax.jit(mixture_log_probs)
mean_of = jax.jit(mixture_mean, static_argnames="link")


def close(actual, expected, terms=10 * BATCH * CLASSES):
  """Equal up to the rounding, in float64, of so many operations on numbers near 1."""
  np.testing.assert_allclose(actual, expected, rtol=0, atol=terms * 2.0**-53)


# The loss and what it reports


def test_classification_loss_is_the_mixtures_negative_log_likelihood(x64):
  loss, info, _ = run(classification_loss, twice(LOGITS), LABELS, LOG_WEIGHTS)
  close(loss, -mix(LOG_WEIGHTS, LOG_PROBS).mean())
  close(info.nll, loss)
  close(info.head_log_likelihoods, LOG_PROBS.mean(axis=1))
  assert info.healthy.all()


def test_gradients_are_the_mixtures_and_each_heads_own(x64):
  _, _, grads = run(classification_loss, twice(LOGITS), LABELS, LOG_WEIGHTS)
  # d nll_j / d logits = p_j - one_hot; the mixture weighs it by the head's posterior.
  own = (np.exp(log_softmax(LOGITS)) - np.eye(CLASSES)[LABELS]) / BATCH
  joint = np.exp(LOG_WEIGHTS)[:, None] * np.exp(LOG_PROBS)
  close(grads.own, own)
  close(grads.shared, (joint / joint.sum(axis=0))[..., None] * own)


def test_one_head_is_the_plain_loss_with_the_plain_gradient(x64):
  plain = optax.losses.softmax_cross_entropy_with_integer_labels
  plain_step = jax.jit(jax.value_and_grad(lambda x: plain(x, LABELS).mean()))
  expected, gradient = plain_step(LOGITS[0])
  loss, info, grads = run(classification_loss, twice(LOGITS[:1]), LABELS, np.zeros(1))
  close(loss, expected)
  close(info.head_log_likelihoods, [-expected])
  close(grads.shared[0], gradient)
  close(grads.own[0], gradient)


def test_identical_heads_are_that_head_to_the_features(x64):
  same = np.broadcast_to(LOGITS[0], LOGITS.shape)
  loss, _, grads = run(classification_loss, twice(same), LABELS, LOG_WEIGHTS)
  one, _, single = run(classification_loss, twice(LOGITS[:1]), LABELS, np.zeros(1))
  close(loss, one)
  close(grads.shared.sum(axis=0), single.shared[0])


def test_weights_need_not_be_normalised(x64):
  args = LABELS, LOG_WEIGHTS + 7.0
  loss, _, grads = run(classification_loss, twice(LOGITS), *args)
  expected, _, expected_grads = run(
    classification_loss, twice(LOGITS), LABELS, LOG_WEIGHTS
  )
  close(loss, expected)
  close(grads.shared, expected_grads.shared)


@pytest.mark.parametrize("offset", [1e8, 1e30])
def test_value_stays_exact_beside_a_huge_own_loss(offset):
  logits = LOGITS.copy()
  logits[2, :, 3] += offset  # wrong on four of six examples
  loss, info, _ = run(classification_loss, twice(logits), LABELS, LOG_WEIGHTS)
  assert info.head_log_likelihoods[2] < -0.5 * offset
  assert info.healthy.all()
  with jax.enable_x64(True):
    exact, _, _ = run(classification_loss, twice(logits), LABELS, LOG_WEIGHTS)
  assert loss == info.nll
  np.testing.assert_allclose(loss, exact, rtol=BATCH * 2.0**-23)


def test_info_has_no_gradient():
  def total(heads):
    _, info = classification_loss(heads, LABELS, LOG_WEIGHTS)
    return info.nll + info.head_log_likelihoods.sum()

  grads = jax.jit(jax.grad(total))(twice(LOGITS))
  assert not grads.shared.any()
  assert not grads.own.any()


# Heads that have diverged


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_diverged_head_is_as_if_absent(bad, x64):
  logits = LOGITS.copy()
  logits[1, 2] = bad  # a single example is enough
  heads = twice(logits)
  loss, info, grads = run(classification_loss, heads, LABELS, LOG_WEIGHTS)
  rest = [0, 2]
  expected, _, expected_grads = run(
    classification_loss, twice(LOGITS[rest]), LABELS, LOG_WEIGHTS[rest]
  )
  close(loss, expected)
  close(grads.shared[np.array(rest)], expected_grads.shared)
  close(grads.own[np.array(rest)], expected_grads.own)
  assert info.healthy.tolist() == [True, False, True]
  assert info.head_log_likelihoods[1] == -np.inf


def test_all_heads_diverged_is_an_infinite_loss_without_gradient():
  def loss_fn(params, features):
    heads = multi_head(lambda kernel, x: x @ kernel, params, features)
    return classification_loss(heads, LABELS, LOG_WEIGHTS)

  params = jnp.full((NUM_HEADS, 2, CLASSES), jnp.nan)
  step = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))
  (loss, info), grads = step(params, jnp.ones((BATCH, 2)))
  assert loss == info.nll == np.inf
  assert not info.healthy.any()
  assert (info.head_log_likelihoods == -np.inf).all()
  assert not any(x.any() for x in grads)


def test_a_head_of_weight_zero_still_learns_and_is_heard(x64):
  log_weights = np.array([-np.inf, *LOG_WEIGHTS[1:]])
  loss, info, grads = run(classification_loss, twice(LOGITS), LABELS, log_weights)
  rest, _, _ = run(classification_loss, twice(LOGITS[1:]), LABELS, LOG_WEIGHTS[1:])
  close(loss, rest)
  assert not grads.shared[0].any()
  assert grads.own[0].any()
  close(info.head_log_likelihoods[0], LOG_PROBS[0].mean())


def test_only_heads_of_weight_zero_left_is_an_infinite_loss():
  logits = LOGITS.copy()
  logits[0] = np.nan
  log_weights = np.array([0.0, -np.inf, -np.inf])
  loss, info, grads = run(classification_loss, twice(logits), LABELS, log_weights)
  assert loss == np.inf
  assert info.healthy.tolist() == [False, True, True]
  assert not grads.shared[1:].any()
  assert np.isfinite(grads.own[1:]).all()
  assert grads.own[1:].any()


# Weights and masks


def test_weighted_examples_are_a_weighted_mean(x64):
  loss, info, _ = run(
    classification_loss, twice(LOGITS), LABELS, LOG_WEIGHTS, weights=WEIGHTS
  )
  close(loss, -np.average(mix(LOG_WEIGHTS, LOG_PROBS), weights=WEIGHTS))
  expected = np.average(LOG_PROBS, axis=1, weights=WEIGHTS)
  close(info.head_log_likelihoods, expected)


@pytest.mark.parametrize("soft", [False, True])
def test_masked_examples_never_matter(soft, x64):
  mask = np.array([True, True, False, True, False, True])
  labels = SOFT if soft else LABELS
  kept = run(
    classification_loss,
    twice(LOGITS[:, mask]),
    labels[mask],
    LOG_WEIGHTS,
    label_smoothing=0.1 * soft,
  )
  logits, labels = LOGITS.copy(), labels.copy()
  logits[:, 2], logits[0, 4] = np.nan, np.inf
  labels[~mask] = np.nan if soft else -100

  def loss_fn(kernels, features):
    # Through multi_head, as the softmax itself turns a cotangent of 0 to NaN here.
    heads = multi_head(lambda kernel, x: x + kernel, kernels, features)
    heads = HeadOutputs(heads.shared + logits, heads.own + logits)
    return classification_loss(
      heads, labels, LOG_WEIGHTS, label_smoothing=0.1 * soft, weights=mask
    )

  step = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))
  kernels = jnp.zeros((NUM_HEADS, BATCH, CLASSES))
  (loss, info), (own, shared) = step(kernels, jnp.zeros((BATCH, CLASSES)))
  close(loss, kept[0])
  close(info.head_log_likelihoods, kept[1].head_log_likelihoods)
  close(own[:, mask], kept[2].own)
  close(shared[mask], kept[2].shared.sum(axis=0))
  assert not own[:, ~mask].any()
  assert not shared[~mask].any()


@pytest.mark.parametrize("logits", [LOGITS, np.full_like(LOGITS, np.nan)])
def test_no_weight_at_all_is_a_loss_of_zero(logits):
  loss, info, grads = run(
    classification_loss, twice(logits), LABELS, LOG_WEIGHTS, weights=np.zeros(BATCH)
  )
  assert loss == info.nll == info.num_examples == 0
  assert np.isnan(info.head_log_likelihoods).all()  # nothing was seen
  assert info.healthy.all()
  assert not grads.shared.any()
  assert not grads.own.any()


def test_info_tells_the_sum_of_weights_last():
  for labels in (LABELS, SOFT):
    args = twice(LOGITS), labels, LOG_WEIGHTS
    *_, num_examples = run(classification_loss, *args)[1]
    assert num_examples == BATCH
    *_, num_examples = run(classification_loss, *args, weights=WEIGHTS)[1]
    assert num_examples == WEIGHTS.sum()
  *_, num_examples = run(regression_loss, twice(LOGITS), LOGITS[0], LOG_WEIGHTS)[1]
  assert num_examples == BATCH


def test_reports_weighed_by_their_examples_are_that_of_the_whole(x64):
  args = LABELS, LOG_WEIGHTS
  whole = run(classification_loss, twice(LOGITS), *args, weights=WEIGHTS)[1]
  # Two halves, one that saw nothing and one whose heads have all diverged.
  halves = [WEIGHTS * (np.arange(BATCH) < 3), WEIGHTS * (np.arange(BATCH) >= 3)]
  parts = [(LOGITS, weights) for weights in (*halves, np.zeros(BATCH))]
  parts.append((np.full_like(LOGITS, np.nan), WEIGHTS))
  total, count = np.zeros(NUM_HEADS), 0.0
  for logits, weights in parts:
    info = run(classification_loss, twice(logits), *args, weights=weights)[1]
    seen = np.isfinite(info.head_log_likelihoods).any()
    total = total + np.where(seen, info.num_examples * info.head_log_likelihoods, 0)
    count = count + np.where(seen, info.num_examples, 0)
  close(total / count, whole.head_log_likelihoods)
  assert count == whole.num_examples


def test_batches_of_many_axes_are_one_batch(x64):
  def fold(x, axis):
    return x.reshape(*x.shape[:axis], 2, 3, *x.shape[axis + 1 :])

  heads = twice(fold(LOGITS, 1))
  for labels in (LABELS, SOFT):
    weights = fold(WEIGHTS, 0)
    loss, info, _ = run(
      classification_loss, heads, fold(labels, 0), LOG_WEIGHTS, weights=weights
    )
    expected, expected_info, _ = run(
      classification_loss, twice(LOGITS), labels, LOG_WEIGHTS, weights=WEIGHTS
    )
    close(loss, expected)
    close(info.head_log_likelihoods, expected_info.head_log_likelihoods)


# Classification


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32"])
def test_labels_may_have_any_integer_dtype(dtype, x64):
  expected, *_ = run(classification_loss, twice(LOGITS), LABELS, LOG_WEIGHTS)
  labels = LABELS.astype(dtype)
  loss, *_ = run(classification_loss, twice(LOGITS), labels, LOG_WEIGHTS)
  assert loss == expected


@pytest.mark.parametrize("dtype", [int, float, bool])
def test_one_hot_labels_equal_integer_labels(dtype, x64):
  expected, info, grads = run(classification_loss, twice(LOGITS), LABELS, LOG_WEIGHTS)
  one_hot = np.eye(CLASSES)[LABELS].astype(dtype)
  loss, hot_info, hot = run(classification_loss, twice(LOGITS), one_hot, LOG_WEIGHTS)
  close(loss, expected)
  close(hot_info.head_log_likelihoods, info.head_log_likelihoods)
  close(hot.shared, grads.shared)
  close(hot.own, grads.own)


def test_soft_targets_give_the_cross_entropy_of_the_mixture(x64):
  loss, info, _ = run(
    classification_loss, twice(LOGITS), SOFT, LOG_WEIGHTS, weights=WEIGHTS
  )
  log_probs = log_softmax(LOGITS)
  expected = -(SOFT * mix(LOG_WEIGHTS, log_probs)).sum(axis=-1)
  close(loss, np.average(expected, weights=WEIGHTS))
  expected = (SOFT * log_probs).sum(axis=-1)
  close(info.head_log_likelihoods, np.average(expected, axis=1, weights=WEIGHTS))


@pytest.mark.parametrize("traced", [False, True])
def test_label_smoothing_gives_the_cross_entropy_of_the_mixture(traced, x64):
  def loss_fn(heads, smoothing):
    smoothing = smoothing if traced else 0.2
    return classification_loss(heads, LABELS, LOG_WEIGHTS, label_smoothing=smoothing)

  loss, _ = jax.jit(loss_fn)(twice(LOGITS), 0.2)
  targets = 0.8 * np.eye(CLASSES)[LABELS] + 0.2 / CLASSES
  expected = -(targets * mix(LOG_WEIGHTS, log_softmax(LOGITS))).sum(axis=-1).mean()
  close(loss, expected)


@pytest.mark.parametrize("soft", [False, True])
def test_excluded_classes_are_as_if_absent(soft, x64):
  logits = np.concatenate([LOGITS, np.full((NUM_HEADS, BATCH, 2), -np.inf)], axis=-1)
  labels = np.eye(CLASSES + 2)[LABELS] if soft else LABELS
  loss, info, grads = run(classification_loss, twice(logits), labels, LOG_WEIGHTS)
  expected, _, without = run(classification_loss, twice(LOGITS), LABELS, LOG_WEIGHTS)
  close(loss, expected)
  assert info.healthy.all()
  close(grads.shared[..., :CLASSES], without.shared)
  assert not grads.shared[..., CLASSES:].any()
  close(grads.own[..., :CLASSES], without.own)
  assert not grads.own[..., CLASSES:].any()


NO_CLASSES = {
  "one too large": np.array([4, *LABELS[1:]]),
  "-1": np.array([-1, *LABELS[1:]]),
  "-1 of int8": np.array([-1, *LABELS[1:]], np.int8),
  "-1 as uint8": np.array([255, *LABELS[1:]], np.uint8),
  "-1 as uint32": np.array([-1, *LABELS[1:]]).astype(np.uint32),
  "-100": np.array([-100, *LABELS[1:]]),
  "2^32 + 2": np.array([2**32 + 2, *LABELS[1:]]),
  "-2^32": np.array([-(2**32), *LABELS[1:]]),
  "2^64 - 1": np.array([2**64 - 1, *LABELS[1:]], np.uint64),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("labels", NO_CLASSES.values(), ids=NO_CLASSES)
def test_labels_that_are_no_classes_train_nothing(labels, smoothing, x64):
  args = twice(LOGITS), labels, LOG_WEIGHTS
  loss, info, grads = run(classification_loss, *args, label_smoothing=smoothing)
  assert loss == info.nll == np.inf
  assert (info.head_log_likelihoods == -np.inf).all()  # all diverged: no observation
  assert not grads.shared.any()
  assert not grads.own.any()


@pytest.mark.parametrize("labels", NO_CLASSES.values(), ids=NO_CLASSES)
def test_ignored_labels_are_as_if_absent(labels, x64):
  rest = run(classification_loss, twice(LOGITS[:, 1:]), LABELS[1:], LOG_WEIGHTS)
  args = twice(LOGITS), labels, LOG_WEIGHTS
  ignoring = functools.partial(classification_loss, ignore_label=int(labels[0]))
  weighted = functools.partial(classification_loss, weights=np.arange(BATCH) > 0)
  for loss_fn in (ignoring, weighted):
    loss, info, grads = run(loss_fn, *args)
    close(loss, rest[0])
    close(info.head_log_likelihoods, rest[1].head_log_likelihoods)
    assert info.num_examples == BATCH - 1
    close(grads.own[:, 1:], rest[2].own)
    close(grads.shared[:, 1:], rest[2].shared)
    assert not grads.own[:, 0].any()
    loss_fn(*args)  # nor is it an error where labels are known


def test_ignored_labels_and_weights_go_together(x64):
  labels, kept = LABELS.copy(), np.array([True, True, False, False, True, True])
  labels[~kept] = 255
  labels = labels.astype(np.uint8)
  ignoring = functools.partial(classification_loss, ignore_label=255)
  for smoothing in (0.0, 0.2):
    kwargs = {"weights": WEIGHTS, "label_smoothing": smoothing}
    actual = run(ignoring, twice(LOGITS), labels, LOG_WEIGHTS, **kwargs)
    kwargs["weights"] = WEIGHTS * kept
    expected = run(classification_loss, twice(LOGITS), LABELS, LOG_WEIGHTS, **kwargs)
    jax.tree.map(close, actual, expected)
  # A class may be what is ignored; and nothing may be left.
  for value, num_examples in ((1, 4), (-100, BATCH)):
    ignoring = functools.partial(classification_loss, ignore_label=value)
    _, info, _ = run(ignoring, twice(LOGITS), LABELS.astype(np.uint32), LOG_WEIGHTS)
    assert info.num_examples == num_examples
  ignoring = functools.partial(classification_loss, ignore_label=-1)
  loss, info, _ = run(ignoring, twice(LOGITS), np.full(BATCH, -1), LOG_WEIGHTS)
  assert loss == info.num_examples == 0
  assert np.isnan(info.head_log_likelihoods).all()


@pytest.mark.parametrize("labels", NO_CLASSES.values(), ids=NO_CLASSES)
def test_known_labels_that_are_no_classes_are_an_error(labels):
  """Of 64 bits too, which JAX would have cut to another class."""
  message = (
    rf"^classification_loss\(labels=...\) must be classes, 0 to 3, got {labels[0]}\. "
    rf".*ignore_label={labels[0]}, or weights= .*labels % num_classes"
  )
  with pytest.raises(ValueError, match=message):
    classification_loss(HEADS, labels, LOG_WEIGHTS)
  with pytest.raises(ValueError, match=message):
    jax.grad(lambda heads: classification_loss(heads, labels, LOG_WEIGHTS)[0])(
      twice(LOGITS)
    )


@pytest.mark.parametrize("bad", [-0.5, np.nan])
def test_targets_that_are_no_probabilities_train_nothing(bad, x64):
  targets = SOFT.copy()
  targets[2, 1] = bad
  loss, info, grads = run(classification_loss, twice(LOGITS), targets, LOG_WEIGHTS)
  assert loss == np.inf
  assert not info.healthy.any()
  assert not grads.own.any()
  with pytest.raises(ValueError, match=r"must be probabilities, 0 or more, got"):
    classification_loss(HEADS, targets, LOG_WEIGHTS)


# Binary and regression losses


def test_binary_loss_is_that_of_a_distribution_over_all_label_sets(x64):
  logits = normal(3, NUM_HEADS, 1, 3)
  total, head_totals = 0.0, np.zeros(NUM_HEADS)
  for labels in itertools.product([0, 1], repeat=3):
    loss, info, _ = run(binary_loss, twice(logits), np.array([labels]), LOG_WEIGHTS)
    signs = 2 * np.array(labels) - 1
    heads = np.prod(1 / (1 + np.exp(-signs * logits[:, 0])), axis=-1)
    close(np.exp(-loss), np.exp(LOG_WEIGHTS) @ heads)
    close(np.exp(info.head_log_likelihoods), heads)
    total, head_totals = total + np.exp(-loss), head_totals + heads
  close(total, 1)
  close(head_totals, np.ones(NUM_HEADS))


def test_binary_loss_takes_one_label_an_example(x64):
  logits, labels = LOGITS[..., 0], LABELS % 2
  loss, _, _ = run(binary_loss, twice(logits), labels, LOG_WEIGHTS, weights=WEIGHTS)
  log_probs = -np.log1p(np.exp(-(2 * labels - 1) * logits))
  close(loss, -np.average(mix(LOG_WEIGHTS, log_probs), weights=WEIGHTS))
  with_axis, _, _ = run(
    binary_loss,
    twice(logits[..., None]),
    labels[:, None].astype(bool),
    LOG_WEIGHTS,
    weights=WEIGHTS,
  )
  close(with_axis, loss)


@pytest.mark.parametrize("bad", [-1, 2, 255, -100.0, np.nan])
def test_labels_beyond_0_to_1_train_nothing(bad, x64):
  labels = (LOGITS[0] > 0).astype(float)
  labels[2, 1] = bad
  args = twice(LOGITS), labels, LOG_WEIGHTS
  loss, info, grads = run(binary_loss, *args)
  assert loss == np.inf
  assert (info.head_log_likelihoods == -np.inf).all()
  assert not grads.shared.any()
  assert not grads.own.any()
  message = rf"^binary_loss\(labels=...\) must be 0 to 1, got {labels[2, 1]}"
  with pytest.raises(ValueError, match=message):
    binary_loss(*args)
  weights = np.arange(BATCH) != 2
  loss, _, _ = run(binary_loss, *args, weights=weights)
  labels[2, 1] = 0
  close(loss, run(binary_loss, *args, weights=weights)[0])


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_missing_labels_are_left_out_of_their_examples_sum(dtype, x64):
  labels = (LOGITS[0] > 0).astype(dtype)
  labels[2, 1] = labels[4] = -1
  missing = labels == -1
  losses = np.log1p(np.exp(-(2 * labels - 1) * LOGITS))
  log_probs = -np.where(missing, 0, losses).sum(axis=-1)
  ignoring = functools.partial(binary_loss, ignore_label=-1)
  loss, info, grads = run(ignoring, twice(LOGITS), labels, LOG_WEIGHTS)
  used = ~missing.all(axis=-1)
  close(loss, -mix(LOG_WEIGHTS, log_probs)[used].mean())
  close(info.head_log_likelihoods, log_probs[:, used].mean(axis=1))
  assert info.num_examples == BATCH - 1
  assert not grads.own[:, missing].any()
  assert grads.own[:, ~missing].all()
  one = run(ignoring, twice(LOGITS[..., 0]), labels[:, 0], LOG_WEIGHTS)
  assert one[1].num_examples == BATCH - 1


def test_targets_of_64_bits_are_not_cut_to_32():
  large = 2**32 + 1
  means = twice(np.zeros((NUM_HEADS, BATCH), np.float32))
  loss, _ = regression_loss(
    means, np.full(BATCH, large), np.zeros(NUM_HEADS), noise_scale=float(large)
  )
  expected = 0.5 + math.log(large) + 0.5 * math.log(2 * math.pi)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_missing_targets_of_weight_zero_reach_no_learned_noise(x64):
  means, log_scales = normal(4, NUM_HEADS, BATCH, 2), normal(6, NUM_HEADS, 1, 2)
  targets, weights = normal(5, BATCH, 2), np.arange(BATCH) != 1

  def step(targets):
    def loss_fn(heads, noise_scale):
      return regression_loss(
        heads, targets, LOG_WEIGHTS, noise_scale=noise_scale, weights=weights
      )[0]

    return jax.grad(loss_fn, (0, 1))(twice((means, log_scales)), 2.0)

  expected = step(targets)
  targets[1] = np.nan
  jax.tree.map(np.testing.assert_array_equal, step(targets), expected)


@pytest.mark.parametrize("num_outputs", [1, 3])
@pytest.mark.parametrize("noise_scale", [1.0, 0.25, "vector"])
def test_regression_loss_is_the_gaussian_density(num_outputs, noise_scale, x64):
  means, targets = (
    normal(4, NUM_HEADS, BATCH, num_outputs),
    normal(5, BATCH, num_outputs),
  )
  if noise_scale == "vector":
    noise_scale = np.linspace(0.5, 1.0, num_outputs)
  loss, info, _ = run(
    regression_loss, twice(means), targets, LOG_WEIGHTS, noise_scale=noise_scale
  )
  z = (targets - means) / noise_scale
  density = np.exp(-0.5 * z**2) / (noise_scale * math.sqrt(2 * math.pi))
  log_probs = np.log(density).sum(axis=-1)
  bound = 1000 * np.abs(log_probs).max()
  close(info.head_log_likelihoods, log_probs.mean(axis=1), bound)
  mixture = np.exp(LOG_WEIGHTS) @ density.prod(axis=-1)
  close(loss, -np.log(mixture).mean(), bound)


def test_regression_loss_takes_one_output_an_example(x64):
  means, targets = LOGITS[..., 0], normal(5, BATCH)
  loss, _, _ = run(regression_loss, twice(means), targets, LOG_WEIGHTS)
  with_axis, _, _ = run(
    regression_loss, twice(means[..., None]), targets[:, None], LOG_WEIGHTS
  )
  close(loss, with_axis)


def test_heads_may_learn_their_noise(x64):
  means, log_scales = normal(4, NUM_HEADS, BATCH, 2), normal(6, NUM_HEADS, 1, 2)
  targets = normal(5, BATCH, 2)
  loss, info, grads = run(
    regression_loss,
    twice((means, log_scales)),
    targets,
    LOG_WEIGHTS,
    noise_scale=2.0,
  )
  scale = 2.0 * np.exp(log_scales)
  z = (targets - means) / scale
  log_probs = (-0.5 * z**2 - np.log(scale * math.sqrt(2 * math.pi))).sum(axis=-1)
  bound = 1000 * np.abs(log_probs).max()
  close(info.head_log_likelihoods, log_probs.mean(axis=1), bound)
  close(loss, -mix(LOG_WEIGHTS, log_probs).mean(), bound)
  close(grads.own[1], (1 - z**2).mean(axis=1, keepdims=True), bound)


def test_traced_noise_scale_gets_the_mixtures_gradient_alone(x64):
  means, targets = normal(4, NUM_HEADS, BATCH, 2), normal(5, BATCH, 2)

  def nll(noise_scale):
    z = (targets - means) / noise_scale
    log_probs = (-0.5 * z**2 - jnp.log(noise_scale * math.sqrt(2 * math.pi))).sum(-1)
    return -jax.nn.logsumexp(log_probs + LOG_WEIGHTS[:, None], axis=0).mean()

  def loss_fn(noise_scale):
    heads = twice(means)
    return regression_loss(heads, targets, LOG_WEIGHTS, noise_scale=noise_scale)[0]

  expected = jax.jit(jax.grad(nll))(0.7)
  close(jax.jit(jax.grad(loss_fn))(0.7), expected, 1000 * abs(expected))


def test_traced_targets_and_weights_get_the_mixtures_gradient_alone(x64):
  def nll(targets, weights):
    log_probs = jax.nn.log_softmax(LOGITS) + LOG_WEIGHTS[:, None, None]
    mixture = jax.nn.logsumexp(log_probs, axis=0)
    return -((weights[:, None] * targets) * mixture).sum() / weights.sum()

  def loss_fn(targets, weights):
    heads = twice(LOGITS)
    return classification_loss(heads, targets, LOG_WEIGHTS, weights=weights)[0]

  args = SOFT, np.arange(1.0, BATCH + 1)
  expected = jax.jit(jax.grad(nll, argnums=(0, 1)))(*args)
  jax.tree.map(close, jax.jit(jax.grad(loss_fn, argnums=(0, 1)))(*args), expected)


# Any loss


def test_a_loss_that_is_no_likelihood_is_a_soft_minimum(x64):
  signs = 2.0 * (LABELS % 2) - 1

  def hinge(scores):
    return optax.losses.hinge_loss(scores, signs)

  scores = LOGITS[..., 0]
  loss, info, grads = run(
    lambda heads, log_weights: mixture_loss(heads, lambda x: -hinge(x), log_weights),
    twice(scores),
    LOG_WEIGHTS,
  )
  losses = np.maximum(0, 1 - signs * scores)
  close(loss, -mix(LOG_WEIGHTS, -losses).mean())
  close(info.head_log_likelihoods, -losses.mean(axis=1))
  close(grads.own, np.where(losses > 0, -signs, 0) / BATCH)


def test_log_prob_may_take_a_tree_and_return_any_shape(x64):
  outputs = {"a": LOGITS, "b": LOGITS[..., 0]}

  def log_prob(outputs):
    return outputs["b"][:, None] - outputs["a"] ** 2

  def loss_fn(heads, log_weights):
    return mixture_loss(heads, log_prob, log_weights)

  loss, _, _ = run(loss_fn, twice(outputs), LOG_WEIGHTS)
  close(loss, -mix(LOG_WEIGHTS, LOGITS[..., :1] - LOGITS**2).mean(), 10_000)
  scalar, info, _ = run(
    lambda heads, log_weights: mixture_loss(heads, lambda x: x["a"].sum(), log_weights),
    twice(outputs),
    LOG_WEIGHTS,
  )
  sums = LOGITS.sum(axis=(1, 2))
  close(info.head_log_likelihoods, sums, 10_000)
  close(scalar, -mix(LOG_WEIGHTS, sums), 10_000)


def test_what_log_prob_closes_over_gets_the_mixtures_gradient_alone(x64):
  def nll(table):
    log_probs = -((LOGITS - table[None]) ** 2).sum(axis=-1) + LOG_WEIGHTS[:, None]
    return -jax.nn.logsumexp(log_probs, axis=0).mean()

  def loss_fn(table):
    return mixture_loss(
      twice(LOGITS), lambda x: -((x - table) ** 2).sum(axis=-1), LOG_WEIGHTS
    )[0]

  table = normal(6, BATCH, CLASSES)
  close(jax.jit(jax.grad(loss_fn))(table), jax.jit(jax.grad(nll))(table), 10_000)


# Dtypes and transformations


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_log_likelihoods_have_at_least_float32(dtype):
  with jax.enable_x64(dtype == "float64"):
    heads = twice(jnp.asarray(LOGITS, dtype))
    log_weights = jnp.asarray(LOG_WEIGHTS, "float32")
    loss, info, grads = run(classification_loss, heads, LABELS, log_weights)
    expected = "float64" if dtype == "float64" else "float32"
    assert loss.dtype == info.nll.dtype == info.head_log_likelihoods.dtype == expected
    assert grads.shared.dtype == grads.own.dtype == dtype
    for predict in (mixture_log_probs, mixture_mean):
      assert jax.eval_shape(predict, heads, log_weights).dtype == expected
    # As exact as if the outputs had been float64: only they were rounded.
    rounded = np.asarray(heads.shared, float)
    log_probs = log_softmax(rounded)[:, np.arange(BATCH), LABELS]
    mixture = mix(log_softmax(np.asarray(log_weights, float)), log_probs)
    np.testing.assert_allclose(
      loss, -mixture.mean(), rtol=BATCH * CLASSES * np.finfo(expected).eps
    )


def test_vmap_and_scan_over_batches_equal_a_loop(x64):
  logits = normal(7, 2, NUM_HEADS, BATCH, CLASSES)
  labels = np.stack([LABELS, LABELS[::-1]])

  def loss_fn(logits, labels):
    return classification_loss(twice(logits), labels, LOG_WEIGHTS)

  one = jax.jit(loss_fn)
  expected = [one(*pair) for pair in zip(logits, labels, strict=True)]
  expected = jax.tree.map(lambda *x: np.stack(x), *expected)
  jax.tree.map(close, jax.jit(jax.vmap(loss_fn))(logits, labels), expected)
  _, scanned = jax.lax.scan(lambda _, xs: (None, loss_fn(*xs)), None, (logits, labels))
  jax.tree.map(close, scanned, expected)


# Predictions


def test_mixture_log_probs_are_those_of_the_mixture(x64):
  log_probs = log_probs_of(twice(LOGITS), LOG_WEIGHTS)
  close(log_probs, mix(LOG_WEIGHTS, log_softmax(LOGITS)))
  close(np.exp(log_probs).sum(axis=-1), np.ones(BATCH))


def test_heads_that_are_nan_for_an_example_are_left_out_there(x64):
  logits = LOGITS.copy()
  logits[0, :3, 1] = np.nan
  logits[1, 2] = np.inf
  log_probs = log_probs_of(twice(logits), LOG_WEIGHTS)
  close(log_probs[3:], mix(LOG_WEIGHTS, log_softmax(LOGITS[:, 3:])))
  for example, heads in ((0, [1, 2]), (2, [2])):
    close(
      log_probs[example],
      mix(log_softmax(LOG_WEIGHTS[heads]), log_softmax(LOGITS[heads, example])),
    )
  assert np.isnan(log_probs_of(twice(logits[:1]), np.zeros(1))[:3]).all()


def test_excluded_classes_have_no_probability_and_harm_no_gradient(x64):
  logits = np.concatenate([LOGITS, np.full((NUM_HEADS, BATCH, 1), -np.inf)], axis=-1)
  log_probs = log_probs_of(twice(logits), LOG_WEIGHTS)
  assert (log_probs[:, CLASSES] == -np.inf).all()

  def total(logits):
    log_probs = log_probs_of(twice(logits), LOG_WEIGHTS)
    return log_probs[jnp.arange(BATCH), LABELS].sum()

  grad_fn = jax.jit(jax.grad(total))
  grads, expected = grad_fn(logits), grad_fn(LOGITS)
  close(grads[..., :CLASSES], expected)
  assert not grads[..., CLASSES].any()


def test_mixture_mean_is_the_weighted_mean_of_the_finite_entries(x64):
  close(
    mean_of(twice(LOGITS), LOG_WEIGHTS),
    np.tensordot(np.exp(LOG_WEIGHTS), LOGITS, 1),
  )
  values = LOGITS.copy()
  values[0, 1, 2], values[:, 3, 3] = np.inf, np.nan
  mean = mean_of(twice(values), LOG_WEIGHTS)
  weights = np.exp(LOG_WEIGHTS[1:]) / np.exp(LOG_WEIGHTS[1:]).sum()
  close(mean[1, 2], weights @ LOGITS[1:, 1, 2])
  assert np.isnan(mean[3, 3])
  assert np.isnan(mean).sum() == 1


def test_mixture_mean_averages_what_the_link_says(x64):
  probabilities = mean_of(twice(LOGITS), LOG_WEIGHTS, link=jax.nn.sigmoid)
  close(probabilities, np.tensordot(np.exp(LOG_WEIGHTS), 1 / (1 + np.exp(-LOGITS)), 1))
  heads = twice((LOGITS, LOGITS[..., :1]))
  means = mean_of(heads, LOG_WEIGHTS, link=lambda outputs: outputs[0])
  close(means, mean_of(twice(LOGITS), LOG_WEIGHTS))


def test_predictions_train_no_head():
  def total(kernels, features):
    heads = multi_head(lambda kernel, x: x @ kernel, kernels, features)
    return log_probs_of(heads, LOG_WEIGHTS)[:, 0].sum()

  kernels = jnp.asarray(normal(8, NUM_HEADS, 2, CLASSES))
  d_kernels, d_features = jax.jit(jax.grad(total, (0, 1)))(
    kernels, jnp.ones((BATCH, 2))
  )
  assert not d_kernels.any()
  assert d_features.any()


# Bad arguments

HEADS = HeadOutputs(LOGITS, LOGITS)
PAIR = HeadOutputs((LOGITS, LOGITS), (LOGITS, LOGITS))
CALLS = {
  "mixture_loss": lambda heads, a: mixture_loss(heads, lambda x: x, a),
  "classification_loss": lambda heads, a: classification_loss(heads, LABELS, a),
  "binary_loss": lambda heads, a: binary_loss(heads, LOGITS[0], a),
  "regression_loss": lambda heads, a: regression_loss(heads, LOGITS[0], a),
  "mixture_log_probs": mixture_log_probs,
  "mixture_mean": mixture_mean,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_plain_array_is_refused(name):
  with pytest.raises(TypeError, match=rf"^{name}\(heads=...\) .* wrap .* in MultiHead"):
    CALLS[name](LOGITS, LOG_WEIGHTS)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("log_weights", [np.zeros(2), np.zeros((3, 1)), 0.0])
def test_weights_of_another_number_of_heads_are_refused(name, log_weights):
  message = (
    rf"^{name}\(log_weights=...\) must have shape \(3,\).*log_weights\(opt_state"
  )
  with pytest.raises(ValueError, match=message):
    CALLS[name](HEADS, log_weights)


@pytest.mark.parametrize(
  "name", ["classification_loss", "binary_loss", "mixture_log_probs", "mixture_mean"]
)
def test_heads_of_several_outputs_are_refused_where_one_is_needed(name):
  with pytest.raises(
    TypeError, match=rf"^{name}\(\) needs heads .* one array, got .*tuple"
  ):
    CALLS[name](PAIR, LOG_WEIGHTS)


@pytest.mark.parametrize(
  ("error", "message", "call"),
  [
    (
      ValueError,
      r"labels=...\) must have the shape of the examples, \(6,\), .*got \(5,\)",
      lambda: classification_loss(HEADS, LABELS[:5], LOG_WEIGHTS),
    ),
    (
      TypeError,
      r"labels=...\) of shape \(6,\) must be integers, got float",
      lambda: classification_loss(HEADS, LABELS * 1.0, LOG_WEIGHTS),
    ),
    (
      TypeError,
      r"labels=...\) of shape \(6,\) must be integers, got bool",
      lambda: classification_loss(HEADS, LABELS > 1, LOG_WEIGHTS),
    ),
    (
      TypeError,
      r"ignore_label=...\) must be an integer or None, got 1.5",
      lambda: classification_loss(HEADS, LABELS, LOG_WEIGHTS, ignore_label=1.5),
    ),
    (
      ValueError,
      r"ignore_label=...\) is for integer labels, got .* shape \(6, 4\): write weights",
      lambda: classification_loss(HEADS, SOFT, LOG_WEIGHTS, ignore_label=-1),
    ),
    (
      ValueError,
      r"label_smoothing=...\) must be between 0 and 1, got 1.5",
      lambda: classification_loss(HEADS, LABELS, LOG_WEIGHTS, label_smoothing=1.5),
    ),
    (
      ValueError,
      r"classification_loss\(weights=...\) must have shape \(6,\), got \(6, 1\)",
      lambda: classification_loss(HEADS, LABELS, LOG_WEIGHTS, weights=WEIGHTS[:, None]),
    ),
    (
      ValueError,
      r"binary_loss\(labels=...\) must have shape \(6, 4\), got \(6,\)",
      lambda: binary_loss(HEADS, LABELS, LOG_WEIGHTS),
    ),
    (
      ValueError,
      r"regression_loss\(targets=...\) must have shape \(6, 4\), got \(6,\)",
      lambda: regression_loss(HEADS, LABELS, LOG_WEIGHTS),
    ),
    (
      ValueError,
      r"regression_loss\(noise_scale=...\) must be positive, got 0",
      lambda: regression_loss(HEADS, LOGITS[0], LOG_WEIGHTS, noise_scale=0),
    ),
    (
      ValueError,
      r"mixture_loss\(weights=...\) must have shape \(6, 4\), got \(6,\)",
      lambda: mixture_loss(HEADS, lambda x: x, LOG_WEIGHTS, weights=WEIGHTS),
    ),
  ],
)
def test_bad_arguments_are_refused(error, message, call):
  with pytest.raises(error, match=message):
    call()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("out", [(1,), (0, 1, 2)], ids=["one", "all"])
def test_a_diverged_head_leaves_trained_values_of_the_loss_alone(bad, out):
  log_weights = jnp.log(jnp.array([0.2, 0.5, 0.3]))
  targets = jnp.asarray(normal(3, BATCH, 1), jnp.float32)
  means = jnp.asarray(normal(4, NUM_HEADS, BATCH, 1), jnp.float32)
  broken = means.at[np.array(out)].set(bad)

  def regression(scale, means, log_weights):
    heads = HeadOutputs(means, means)
    return regression_loss(heads, targets, log_weights, noise_scale=scale)[0]

  def tempered(scale, means, log_weights):
    heads = HeadOutputs(means, means)
    log_prob = lambda mean: -scale * ((mean - targets) ** 2).sum(axis=-1)  # noqa: E731
    return mixture_loss(heads, log_prob, log_weights)[0]

  left = np.array([j for j in range(NUM_HEADS) if j not in out])
  for loss_fn in (regression, tempered):
    gradient = jax.jit(jax.grad(loss_fn))(2.0, broken, log_weights)
    expected = 0.0
    if left.size:
      rest = jax.nn.log_softmax(log_weights[left])
      expected = jax.grad(loss_fn)(2.0, means[left], rest)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_the_gradient_of_weights_is_finite_when_all_heads_have_diverged():
  heads = twice(np.full((NUM_HEADS, BATCH, CLASSES), np.nan, np.float32))
  log_weights = jnp.log(jnp.full(NUM_HEADS, 1 / NUM_HEADS))
  loss = lambda weights: classification_loss(  # noqa: E731
    heads, LABELS, log_weights, weights=weights
  )[0]
  value, gradient = jax.value_and_grad(loss)(jnp.ones(BATCH))
  assert value == jnp.inf
  np.testing.assert_array_equal(gradient, np.zeros(BATCH))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_predictions_have_finite_gradients_beside_a_head_that_is_not(bad):
  logits = jnp.asarray(LOGITS, jnp.float32).at[1, 2, 3].set(bad)

  def total(logits):
    heads = HeadOutputs(logits, logits)
    return mixture_log_probs(heads, jnp.asarray(LOG_WEIGHTS, jnp.float32))[2, 0]

  gradient = jax.grad(total)(logits)
  assert np.isfinite(gradient).all()
  assert (gradient[1] == 0).all()
  assert (gradient[0, 2] != 0).any()


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_means_have_finite_gradients_beside_what_is_left_out(bad):
  logits = jnp.asarray(LOGITS, jnp.float32).at[1, 2, 3].set(bad)

  def total(logits):
    heads = HeadOutputs(logits, logits)
    log_weights = jnp.asarray(LOG_WEIGHTS, jnp.float32)
    return mixture_mean(heads, log_weights, jax.nn.softmax)[2, 0]

  gradient = jax.grad(total)(logits)
  assert np.isfinite(gradient).all()
  assert (gradient[1] == 0).all()
  assert (gradient[0, 2] != 0).any()


def test_mean_leaves_out_heads_below_the_least_weight():
  values = jnp.array([1.0, 3.0, 1e9])[:, None]
  heads = HeadOutputs(shared=values, own=values)
  log_weights = jnp.log(jnp.array([0.6, 0.3999, 0.0001]))
  assert mixture_mean(heads, log_weights)[0] > 1e4
  mean = mixture_mean(heads, log_weights, min_weight=0.05)
  expected = (0.6 * 1.0 + 0.3999 * 3.0) / 0.9999
  np.testing.assert_allclose(mean, [expected], rtol=1e-6)


def test_mean_keeps_a_head_whatever_the_rounding():
  values = jnp.array([1.0, 3.0, 5.0])[:, None]
  heads = HeadOutputs(shared=values, own=values)
  even = jnp.full(3, jnp.log(1 / 3) - 1e-6)  # a little too small each
  np.testing.assert_allclose(mixture_mean(heads, even, min_weight=1 / 3), [3.0])


@pytest.mark.parametrize("min_weight", [-0.1, 0.6, float("nan")])
def test_least_weight_that_may_leave_no_head_is_an_error(min_weight):
  heads = HeadOutputs(shared=jnp.ones((2, 1)), own=jnp.ones((2, 1)))
  with pytest.raises(ValueError, match=r"min_weight=.* must be from 0 to 1 / num_h"):
    mixture_mean(heads, jnp.zeros(2), min_weight=min_weight)
