"""Judges: which examples they are, and that they alone tell the posterior."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alrao_jax
from alrao_jax import HeadOutputs, judges

HEADS, BATCH, OUTPUTS = 3, 6, 4
MASK = np.array([False, True, False, False, True, False])
WEIGHTS = np.array([1.0, 0.5, 2.0, 0.0, 2.0, 1.0], np.float32)
LABELS = np.array([0, 1, 2, 3, 0, 1])
LOG_WEIGHTS = jnp.log(jnp.array([0.2, 0.3, 0.5]))


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Who judges


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int32", "int64"])
@pytest.mark.parametrize("one_in", [2, 16])
def test_one_in_so_many_neighbours_judges(one_in, dtype):
  mask = judges(np.arange(96).astype(dtype), one_in)
  assert (mask.reshape(-1, one_in).sum(axis=1) == 1).all()


def test_who_judges_depends_on_the_index_alone():
  index = np.random.default_rng(0).permutation(1000)
  known = judges(np.arange(1000), 8)
  assert isinstance(known, np.ndarray)
  np.testing.assert_array_equal(judges(index, 8), known[index])
  in_jit = jax.jit(functools.partial(judges, one_in=8))(index.astype(np.int32))
  np.testing.assert_array_equal(in_jit, known[index])


def test_every_place_among_neighbours_is_equally_likely():
  places = judges(np.arange(16 * 4096), 16).reshape(-1, 16).sum(axis=0)
  assert (abs(places - 256) < 5 * np.sqrt(256 * 15 / 16)).all()


def test_neighbourhoods_choose_independently():
  places = np.flatnonzero(judges(np.arange(8 * 4096), 8)) % 8
  pairs = np.bincount(places[1:] + 8 * places[:-1], minlength=64)
  assert (abs(pairs - 64) < 5 * 8).all()


@pytest.mark.parametrize(
  ("index", "one_in", "error"),
  [([0, 1], 1, ValueError), ([0, 1], 2.0, TypeError), ([0.0], 2, TypeError)],
)
def test_refuses_what_is_no_index_or_no_share(index, one_in, error):
  with pytest.raises(error, match=r"judges\("):
    judges(index, one_in)


# What they tell


def mixture(heads, weights, judges):
  return alrao_jax.mixture_loss(
    heads, lambda x: -(x[:, 0] ** 2), LOG_WEIGHTS, weights=weights, judges=judges
  )


def classification(heads, weights, judges, smoothing=0.0):
  return alrao_jax.classification_loss(
    heads,
    LABELS,
    LOG_WEIGHTS,
    label_smoothing=smoothing,
    weights=weights,
    judges=judges,
  )


def binary(heads, weights, judges):
  labels = normal(1, BATCH, OUTPUTS) > 0
  return alrao_jax.binary_loss(
    heads, labels, LOG_WEIGHTS, weights=weights, judges=judges
  )


def regression(heads, weights, judges):
  return alrao_jax.regression_loss(
    heads, normal(1, BATCH, OUTPUTS), LOG_WEIGHTS, weights=weights, judges=judges
  )


def chunked(heads, weights, judges):
  return alrao_jax.chunked_mixture_loss(
    lambda x: HeadOutputs(*(jnp.swapaxes(each, 0, 1) for each in x)),
    (jnp.swapaxes(heads.shared, 0, 1), jnp.swapaxes(heads.own, 0, 1)),
    lambda x, y: -((x[:, 0] - y) ** 2),
    normal(2, BATCH),
    LOG_WEIGHTS,
    chunk_size=4,
    weights=weights,
    judges=judges,
  )


LOSSES = {
  "mixture": mixture,
  "classification": classification,
  "smoothed": functools.partial(classification, smoothing=0.1),
  "binary": binary,
  "regression": regression,
  "chunked": chunked,
}


@functools.partial(jax.jit, static_argnums=0)
def run(loss_fn, outputs, weights=None, judges=None):
  heads = HeadOutputs(outputs, outputs)
  step = jax.value_and_grad(loss_fn, has_aux=True)
  return step(heads, weights, judges)


@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES)
def test_judges_tell_the_posterior_and_the_others_train(loss_fn):
  outputs = normal(0, HEADS, BATCH, OUTPUTS)
  (loss, info), grads = run(loss_fn, outputs, WEIGHTS, MASK)
  (others, seen), of_others = run(loss_fn, outputs, np.where(MASK, 0, WEIGHTS), None)
  (_, by_judges), _ = run(loss_fn, outputs, np.where(MASK, WEIGHTS, 0), None)
  near = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
  near(loss, others)
  near(info.nll, seen.nll)
  near(info.head_log_likelihoods, by_judges.head_log_likelihoods)
  near(info.num_examples, by_judges.num_examples)
  jax.tree.map(near, grads, of_others)


def test_without_a_judge_nothing_is_observed():
  outputs, nobody = normal(0, HEADS, BATCH, OUTPUTS), np.zeros(BATCH, bool)
  (loss, info), _ = run(classification, outputs, None, nobody)
  assert jnp.isfinite(loss)
  assert jnp.isnan(info.head_log_likelihoods).all()
  assert info.num_examples == 0


@pytest.mark.parametrize("example", [0, 1], ids=["training", "judge"])
def test_a_head_diverges_on_any_example(example):
  outputs = normal(0, HEADS, BATCH, OUTPUTS)
  outputs[1, example] = np.inf
  (loss, info), grads = run(classification, outputs, None, MASK)
  assert jnp.isfinite(loss)
  assert info.healthy.tolist() == [True, False, True]
  assert info.head_log_likelihoods[1] == -jnp.inf
  assert not grads.own[1].any() and grads.own[0].any()


def test_a_head_that_diverges_without_a_judge_stops_and_the_posterior_stands():
  outputs = normal(0, HEADS, BATCH, OUTPUTS)
  outputs[1, 0] = np.inf
  (_, info), _ = run(classification, outputs, None, np.zeros(BATCH, bool))
  params = {"out": {"alrao_heads": {"bias": jnp.ones((HEADS, 2))}}}
  tracker = alrao_jax.track_heads()
  before = tracker.init(params)
  moves, state = tracker.update(
    params, before, params, head_log_likelihoods=info.head_log_likelihoods
  )
  np.testing.assert_array_equal(state.log_weights, before.log_weights)
  moved = moves["out"]["alrao_heads"]["bias"].any(axis=1)
  assert moved.tolist() == [True, False, True]


def test_reports_of_micro_batches_weigh_by_their_judges():
  outputs = normal(0, HEADS, BATCH, OUTPUTS)
  whole = run(mixture, outputs, WEIGHTS, MASK)[0][1]
  total, count = jnp.zeros(HEADS), 0.0
  for part in (slice(0, 2), slice(2, 4), slice(4, 6)):  # of 1, 0 and 1 judges
    weights = np.zeros(BATCH, np.float32)  # one program for parts and whole
    weights[part] = WEIGHTS[part]
    info = run(mixture, outputs, weights, MASK)[0][1]
    seen = jnp.isfinite(info.head_log_likelihoods).any()
    total += jnp.where(seen, info.num_examples * info.head_log_likelihoods, 0)
    count += jnp.where(seen, info.num_examples, 0)
  np.testing.assert_allclose(total / count, whole.head_log_likelihoods, rtol=1e-6)


def test_a_mask_of_sequences_is_one_of_all_their_symbols():
  logits, labels = normal(0, HEADS, BATCH, 2, OUTPUTS), np.stack([LABELS, LABELS], 1)

  def loss_fn(heads, weights, mask):
    return alrao_jax.classification_loss(
      heads, labels, LOG_WEIGHTS, weights=weights, judges=mask
    )

  found = run(loss_fn, logits, None, MASK)
  expected = run(loss_fn, logits, None, MASK[:, None].repeat(2, 1))
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
  ("mask", "error"),
  [(MASK.astype(int), TypeError), (MASK[:3], ValueError), (np.True_, ValueError)],
)
def test_refuses_what_is_no_mask_of_the_examples(mask, error):
  with pytest.raises(error, match=r"classification_loss\(judges="):
    run(classification, normal(0, HEADS, BATCH, OUTPUTS), None, mask)


def test_a_posterior_of_judges_leaves_the_head_that_overfits():
  # Head 1 knows the training examples by heart, and is wrong about all others.
  outputs = np.zeros((HEADS, BATCH, OUTPUTS), np.float32)
  outputs[1, np.arange(BATCH), LABELS] = np.where(MASK, -2.0, 2.0)
  averaging = alrao_jax.switch()
  for mask, best in ((None, 1), (MASK, 0)):
    _, info = run(classification, outputs, None, mask)[0]
    state = averaging.update(averaging.init(HEADS), info.head_log_likelihoods)
    assert jnp.argmax(averaging.log_weights(state)) == best
