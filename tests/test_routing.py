"""Heads evaluated once, gradients on two ways."""

import collections
import functools
import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alrao_jax._losses import classification_loss
from alrao_jax._multi_head import HeadOutputs, multi_head
from alrao_jax._predict import mixture_log_probs

NUM_HEADS, BATCH, FEATURES, HIDDEN, CLASSES = 5, 16, 12, 8, 3
MANY_CLASSES = 40  # of large heads, which are handled apart


def normal(index, *shape):
  return jnp.asarray(np.random.default_rng(index).normal(size=shape))


def dense(params, x):
  return x @ params["kernel"] + params["bias"][None]


def mlp(params, x):
  return dense(params["out"], jax.nn.relu(dense(params["hidden"], x)))


def layer_norm(params, x):
  centred = x - x.mean(axis=-1, keepdims=True)
  variance = (centred**2).mean(axis=-1, keepdims=True)
  scale = params["scale"][None]
  return centred * jax.lax.rsqrt(variance + 1e-6) * scale + params["bias"][None]


def norm_first(params, x):
  return dense(params["out"], layer_norm(params["norm"], x))


def cosine(params, x):
  """Weights of length one, which are 0/0 where the parameters are zero."""
  kernel = params["kernel"]
  return x @ (kernel / jnp.sqrt((kernel**2).sum(axis=0, keepdims=True)))


def dense_params(index, inputs, outputs, num_heads=NUM_HEADS):
  kernel = normal(index, num_heads, inputs, outputs) / inputs**0.5
  return {"kernel": kernel, "bias": 0.1 * normal(index + 1, num_heads, outputs)}


def dense_head(classes=CLASSES):
  return dense, dense_params(0, FEATURES, classes)


def mlp_head(classes=CLASSES):
  params = {
    "hidden": dense_params(0, FEATURES, HIDDEN),
    "out": dense_params(2, HIDDEN, classes),
  }
  return mlp, params


def norm_head(classes=CLASSES):
  norm = {
    "scale": 1 + 0.1 * normal(4, NUM_HEADS, FEATURES),
    "bias": 0.1 * normal(5, NUM_HEADS, FEATURES),
  }
  return norm_first, {"norm": norm, "out": dense_params(2, FEATURES, classes)}


def cosine_head(classes=CLASSES):
  return cosine, {"kernel": normal(0, NUM_HEADS, FEATURES, classes)}


def scaled(params, x):
  """A parameter that is divided by on the way back, too."""
  return x @ params["kernel"] / params["scale"]


def scaled_head(classes=CLASSES):
  kernel = normal(0, NUM_HEADS, FEATURES, classes)
  return scaled, {"kernel": kernel, "scale": 2 + normal(1, NUM_HEADS) ** 2}


def large(make_head):
  return functools.partial(make_head, MANY_CLASSES)


SMALL_HEADS = {"dense": dense_head, "mlp": mlp_head, "norm": norm_head}
LARGE_HEADS = {f"large {name}": large(make) for name, make in SMALL_HEADS.items()}
HEADS = SMALL_HEADS | LARGE_HEADS
DIVIDING_HEADS = {
  "cosine": cosine_head,
  "scaled": scaled_head,
  "large cosine": large(cosine_head),
  "large scaled": large(scaled_head),
}
all_heads = pytest.mark.parametrize("head", HEADS)


@pytest.fixture(params=["small", "large"])
def sized(request):
  """Makes heads of both kinds."""
  return large if request.param == "large" else lambda make_head: make_head


def batch():
  features = 1 + normal(10, BATCH, FEATURES)
  labels = jnp.asarray(np.random.default_rng(1).integers(CLASSES, size=BATCH))
  log_weights = normal(11, NUM_HEADS)
  return features, labels, log_weights - np.log(np.exp(log_weights).sum())


def two_evaluations(head_fn, params, features):
  """The oracle: what the custom VJP does, said with stop_gradient."""
  evaluate = jax.vmap(head_fn, in_axes=(0, None))
  constant = jax.lax.stop_gradient
  return HeadOutputs(
    shared=evaluate(constant(params), features),
    own=evaluate(params, constant(features)),
  )


def gradient_fn(head_fn, route=multi_head):
  def loss_fn(params, features, labels, log_weights):
    heads = route(head_fn, params, features)
    return classification_loss(heads, labels, log_weights)

  return jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)


@functools.cache
def compiled_step(head_fn, route=multi_head):
  return jax.jit(gradient_fn(head_fn, route))


def assert_close(actual, expected, terms):
  """Equal up to the rounding of sums of so many terms, leaf by leaf."""

  def check(actual, expected):
    assert actual.dtype == expected.dtype
    eps = float(jnp.finfo(expected.dtype).eps)
    actual, expected = np.asarray(actual, float), np.asarray(expected, float)
    bound = terms * eps * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)

  jax.tree.map(check, actual, expected)


def all_finite(tree):
  return all(np.isfinite(x.astype(jnp.float32)).all() for x in jax.tree.leaves(tree))


# The oracle


@all_heads
def test_gradient_equals_two_evaluations(head):
  with jax.enable_x64(True):
    head_fn, params = HEADS[head]()
    args = params, *batch()
    (loss, _), grads = compiled_step(head_fn)(*args)
    (expected_loss, _), expected = compiled_step(head_fn, two_evaluations)(*args)
    assert grads[1].dtype == jnp.float64
    assert_close(loss, expected_loss, terms=BATCH)
    assert_close(grads, expected, terms=NUM_HEADS * BATCH)


def test_shared_cotangent_spares_parameters_and_own_spares_features(sized):
  head_fn, params = sized(mlp_head)()
  features, *_ = batch()

  def total(half):
    return lambda params, features: getattr(
      multi_head(head_fn, params, features), half
    ).sum()

  def gradients(half):
    return jax.jit(jax.grad(total(half), (0, 1)))(params, features)

  d_params, d_features = gradients("shared")
  assert not any(x.any() for x in jax.tree.leaves(d_params))
  assert d_features.any()
  d_params, d_features = gradients("own")
  assert all(x.any() for x in jax.tree.leaves(d_params))
  assert not d_features.any()


def test_outputs_are_those_of_each_head(sized):
  head_fn, params = sized(mlp_head)()
  features, *_ = batch()
  heads = multi_head(head_fn, params, features)
  assert heads.num_heads == NUM_HEADS
  for half in (heads.shared, heads.own):
    for j in range(NUM_HEADS):
      expected = head_fn(jax.tree.map(lambda x, j=j: x[j], params), features)
      assert_close(half[j], expected, terms=FEATURES + HIDDEN)


# The compiled program


def op_counts(fn, *args):
  """Ops by name in a compiled program, without the branches of conditionals."""
  text = jax.jit(fn).lower(*args).compile().as_text()
  computations = {}
  for line in text.splitlines():
    if match := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
      name = "ENTRY" if match[1] else match[2]
      computations[name] = body = []
    elif line.startswith("  "):
      body.append(line)
  counts, waiting, seen = collections.Counter(), ["ENTRY"], set()
  while waiting:
    name = waiting.pop()
    if name in seen:
      continue
    seen.add(name)
    for line in computations[name]:
      op = re.search(r" = .*? ([\w\-]+)\(", line)[1]
      counts[op] += 1
      if op != "conditional":
        called = re.findall(r"%([\w.\-]+)", line.split(" = ")[1])
        waiting += [name for name in called if name in computations]
  return counts


def plain_gradient_fn(head_fn):
  """A plain model with as many heads, trained on the sum of their losses."""

  def loss_fn(params, features, labels, log_weights):
    logits = jax.vmap(head_fn, in_axes=(0, None))(params, features)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels
    return jax.vmap(loss, in_axes=(0, None))(logits, labels).sum(), None

  return jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)


# A layer has one product forwards, one back to its kernel and one to its input. Where
# parameters lie below it, that input has two cotangents (shared and own) for one.
@pytest.mark.parametrize(
  ("kind", "additional"), [("dense", 0), ("norm", 1), ("mlp", 1)]
)
def test_compiled_step_evaluates_heads_once(kind, additional, sized):
  head_fn, params = sized(SMALL_HEADS[kind])()
  args = params, *batch()
  routed = op_counts(gradient_fn(head_fn), *args)
  plain = op_counts(plain_gradient_fn(head_fn), *args)
  assert plain["dot"] == (6 if kind == "mlp" else 3)
  assert routed["dot"] == plain["dot"] + additional
  assert routed["rsqrt"] == plain["rsqrt"]
  assert bool(plain["rsqrt"]) == (kind == "norm")
  assert routed["conditional"] == (0 if sized is large or kind == "dense" else 1)


def test_heads_with_more_outputs_than_the_harmonic_mean_are_large():
  """Of features and examples, here 12 and 16, hence from 14 outputs on."""
  features, *_ = batch()
  copies = (NUM_HEADS, *features.shape)

  def has_copies(head_fn, *args):
    return f"f32[{','.join(map(str, copies))}]" in str(jax.make_jaxpr(head_fn)(*args))

  for classes, expected in ((13, False), (14, True)):
    head_fn, params = dense_head(classes)
    evaluate = functools.partial(multi_head, head_fn)
    assert has_copies(evaluate, params, features) == expected

  def closing(params, features, table):  # what they close over is shared
    return multi_head(lambda params, x: dense(params, x * table), params, features)

  _, params = large(dense_head)()
  assert not has_copies(closing, params, features, jnp.ones_like(features))


def test_heads_with_convolutions_make_no_grouped_ones():
  images, kernels = normal(0, 2, 6, 6, 3), normal(1, NUM_HEADS, 3, 3, 3, MANY_CLASSES)

  @jax.jit
  def convolve(kernel, images):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
      images, kernel, (1, 1), "SAME", dimension_numbers=numbers
    )

  def total(kernels, images):
    return multi_head(convolve, kernels, images).shared.sum()

  program = str(jax.make_jaxpr(jax.grad(total, 1))(kernels, images))
  assert "feature_group_count=1" in program
  assert not re.search(r"(feature|batch)_group_count=(?!1\b)", program)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="bounds are of XLA's CPU")
def test_large_heads_are_trained_without_a_transposed_copy_of_their_kernels():
  classes = 1000
  features, labels, log_weights = batch()
  kernels = normal(0, NUM_HEADS, FEATURES, classes)

  def step(kernels, *args):
    grads = gradient_fn(lambda kernel, x: x @ kernel)(kernels, *args)[1]
    return kernels - 0.1 * grads[0], grads[1]

  args = kernels, features, labels, log_weights
  compiled = jax.jit(step).lower(*args).compile()
  shape = rf"f32\[{NUM_HEADS},{FEATURES},{classes}\]"
  assert not re.search(rf"{shape}\S* (copy|transpose)\(", compiled.as_text())
  donated = jax.jit(step, donate_argnums=0).lower(*args).compile()
  # One gradient of the kernels and two of the outputs, with hardly anything beside.
  held = kernels.nbytes + 2 * NUM_HEADS * BATCH * classes * 4
  assert donated.memory_analysis().temp_size_in_bytes < 1.1 * held


def test_a_single_head_needs_no_condition():
  head_fn, params = mlp_head()
  params = jax.tree.map(lambda x: x[:1], params)
  features, labels, _ = batch()
  args = features, labels, jnp.zeros(1)
  assert "conditional" not in op_counts(gradient_fn(head_fn), params, *args)
  for factor in FACTORS:
    bad = jax.tree.map(lambda x, factor=factor: x * factor, params)
    _, grads = compiled_step(head_fn)(bad, *args)
    assert all_finite(grads), factor


def test_two_evaluations_behind_a_norm_layer_are_seen_by_the_count():
  head_fn, params = norm_head()
  args = params, *batch()
  assert op_counts(gradient_fn(head_fn, two_evaluations), *args)["dot"] == 3 + 1 + 1


def test_softmax_is_computed_once_for_both_losses(sized):
  head_fn, params = sized(dense_head)()
  text = compiled_step(head_fn).lower(params, *batch()).compile().as_text()
  classes = params["kernel"].shape[-1]
  logits = rf"f32\[{NUM_HEADS},{BATCH},{classes}\]"
  assert len(re.findall(rf"{logits}\S* exponential\(", text)) == 1


# Divergence

FACTORS = [1e25, np.inf, -np.inf, np.nan]
VICTIMS = {
  "one": [2],
  "all but one": [0, 1, 3, 4],
  "all": [0, 1, 2, 3, 4],
}


def diverge(params, factor, victims):
  def scale(x):
    factors = np.ones((NUM_HEADS,) + (1,) * (x.ndim - 1))
    factors[victims] = factor
    return jnp.asarray(np.asarray(x, float) * factors, x.dtype)

  return jax.tree.map(scale, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", [*HEADS, *DIVIDING_HEADS])
def test_diverged_heads_leave_finite_gradients_of_the_others(head, dtype):
  head_fn, params = {**HEADS, **DIVIDING_HEADS}[head]()
  features, labels, log_weights = batch()
  params, features = jax.tree.map(lambda x: x.astype(dtype), (params, features))
  step = compiled_step(head_fn)
  for name, victims in VICTIMS.items():
    without_victims = log_weights.at[np.array(victims)].set(-jnp.inf)
    (expected_loss, _), expected_grads = step(params, features, labels, without_victims)
    for factor in FACTORS:
      case = f"{name} heads times {factor}"
      bad = diverge(params, factor, victims)
      (loss, info), grads = step(bad, features, labels, log_weights)
      assert all_finite(grads), case
      assert not np.isnan(loss), case
      assert not np.isnan(info.head_log_likelihoods).any(), case
      healthy = set(np.flatnonzero(info.healthy).tolist())
      assert healthy >= set(range(NUM_HEADS)) - set(victims), case
      assert np.isfinite(factor) or not healthy & set(victims), case
      if not healthy:
        assert loss == jnp.inf, case
        assert not any(x.any() for x in jax.tree.leaves(grads)), case
      elif not healthy & set(victims):
        # As if they had never been there. (Some stay healthy at 1e25.)
        assert_close(loss, expected_loss, terms=BATCH)
        assert_close(grads[1], expected_grads[1], terms=NUM_HEADS)
        others = np.array(sorted(healthy))
        mine, expected = jax.tree.map(
          lambda x, i=others: x[i], (grads[0], expected_grads[0])
        )
        assert_close(mine, expected, terms=BATCH)


def test_only_heads_without_a_part_have_nonfinite_cotangents_made_zero(sized):
  head_fn, params = sized(dense_head)()
  features, *_ = batch()
  _, pullback = jax.vjp(lambda *args: multi_head(head_fn, *args), params, features)
  pullback = jax.jit(pullback)
  shared = own = jnp.ones((NUM_HEADS, BATCH, params["kernel"].shape[-1]))
  shared = shared.at[2].set(0)
  expected = pullback(HeadOutputs(shared, own.at[2, 2].set(0)))
  spared = pullback(HeadOutputs(shared, own.at[2, 2].set(jnp.inf)))
  jax.tree.map(np.testing.assert_array_equal, spared, expected)
  d_params, d_features = pullback(HeadOutputs(shared, own.at[1, 2].set(jnp.inf)))
  np.testing.assert_array_equal(d_features, expected[1])
  told = jnp.isfinite(d_params["kernel"]).all(axis=(1, 2))
  assert told.tolist() == [True, False, True, True, True]
  for bad in (jnp.nan, jnp.inf):
    d_params, d_features = pullback(HeadOutputs(shared.at[3, 4].set(bad), own))
    finite = jnp.isfinite(d_features).all(axis=1)
    assert np.flatnonzero(~finite).tolist() == [4]
    jax.tree.map(
      np.testing.assert_array_equal, d_params, pullback(HeadOutputs(shared, own))[0]
    )


def test_nonfinite_features_leave_finite_gradients(sized):
  head_fn, params = sized(norm_head)()
  features, labels, log_weights = batch()
  for bad in (jnp.nan, jnp.inf):
    args = params, features.at[0, 0].set(bad), labels, log_weights
    (loss, info), grads = compiled_step(head_fn)(*args)
    assert loss == jnp.inf
    assert not info.healthy.any()
    assert all_finite(grads)


def rematerialised(head_fn):
  """What it leaves for the gradient is its arguments, which are finite."""
  return jax.checkpoint(head_fn)


def unit_hidden(params, x):
  hidden = x @ params["hidden"]
  length = jnp.sqrt((hidden**2).sum(axis=-1, keepdims=True))
  return hidden / length @ params["out"]


def unit_hidden_head(classes=CLASSES):
  hidden = normal(0, NUM_HEADS, FEATURES, HIDDEN)
  return unit_hidden, {"hidden": hidden, "out": normal(1, NUM_HEADS, HIDDEN, classes)}


def test_division_by_exactly_zero_in_one_head_spares_the_others(sized):
  head_fn, params = sized(unit_hidden_head)()
  params["hidden"] = params["hidden"].at[2].set(0)
  assert_victim_is_spared(head_fn, params, victim=2)


@pytest.mark.parametrize("part", [True, False])
def test_overflow_of_what_a_head_gives_back_is_told_if_it_has_a_part(part, sized):
  _, params = sized(dense_head)()
  kernels = jnp.ones_like(params["kernel"]).at[2].set(3e38)
  features = jnp.zeros((BATCH, FEATURES))
  shares = jnp.ones(NUM_HEADS).at[2].set(float(part))

  def total(features):
    heads = multi_head(lambda kernel, x: x @ kernel, kernels, features)
    return (shares[:, None, None] * heads.shared).sum()

  gradient = jax.grad(total)(features)
  others = (NUM_HEADS - 1) * kernels.shape[-1]
  expected = jnp.full_like(features, jnp.inf if part else others)
  np.testing.assert_array_equal(gradient, expected)


def test_sum_over_heads_that_overflows_is_told():
  kernels = jnp.full((NUM_HEADS, FEATURES, MANY_CLASSES), 1000, jnp.float16)
  features = jnp.zeros((BATCH, FEATURES), jnp.float16)

  def total(features):
    return multi_head(lambda kernel, x: x @ kernel, kernels, features).shared.sum()

  # 40,000 from each of five heads: above float16's 65,504 in sum alone.
  assert (jax.grad(total)(features) == jnp.inf).all()


def test_own_gradient_that_overflows_is_told_if_the_head_has_a_part(sized):
  head_fn, params = sized(dense_head)()
  features = jnp.full((BATCH, FEATURES), 1e30)

  def total(params, shares):
    heads = multi_head(head_fn, params, features)
    losses = heads.own.sum(axis=(1, 2)) * 1e10
    return losses.sum() + (shares[:, None, None] * heads.shared).sum()

  shares = jnp.array([1.0, 0, 0, 1e-30, 0])
  gradient = jax.jit(jax.grad(total))(params, shares)["kernel"]
  told = jnp.isinf(gradient).all(axis=(1, 2))
  assert told.tolist() == [True, False, False, True, False]
  assert not gradient[jnp.array([1, 2, 4])].any()


@pytest.mark.slow
def test_overflow_in_a_rematerialised_head_spares_the_others(sized):
  head_fn, params = sized(mlp_head)()
  bad = diverge(params, 1e25, [2])
  assert_victim_is_spared(rematerialised(head_fn), bad, victim=2)


def assert_victim_is_spared(head_fn, params, victim):
  features, labels, log_weights = batch()
  step = compiled_step(head_fn)
  (loss, info), grads = step(params, features, labels, log_weights)
  assert np.flatnonzero(~info.healthy).tolist() == [victim]
  assert np.isfinite(loss)
  assert all_finite(grads)
  others = jax.tree.map(lambda x: jnp.delete(x, victim, axis=0), (params, log_weights))
  _, expected = step(others[0], features, labels, others[1])
  assert_close(grads[1], expected[1], terms=NUM_HEADS * HIDDEN)


def test_infinite_residuals_of_healthy_heads_count_as_they_are(sized):
  """Outputs are finite, and so are gradients."""

  def masked(params, inputs):
    x, mask = inputs
    return jax.nn.softmax(x + mask, axis=-1) @ params["kernel"] / params["scale"]

  _, params = sized(scaled_head)()
  params["scale"] = params["scale"].at[2].set(jnp.inf)
  features, labels, log_weights = batch()
  inputs = features, jnp.zeros_like(features).at[:, 3:6].set(-jnp.inf)
  for head_fn in (masked, rematerialised(masked)):
    (loss, info), grads = compiled_step(head_fn)(params, inputs, labels, log_weights)
    assert info.healthy.all()
    (expected_loss, _), expected = compiled_step(head_fn, two_evaluations)(
      params, inputs, labels, log_weights
    )
    assert_close(loss, expected_loss, terms=BATCH)
    assert_close(grads[1][0], expected[1][0], terms=NUM_HEADS * BATCH)


# Arguments of every kind


def test_aux_is_given_to_each_head_and_comes_back(sized):
  features, *_ = batch()
  _, params = sized(dense_head)()
  means = normal(7, NUM_HEADS, FEATURES)

  def head_fn(params, features, mean):
    return dense(params, features - mean[None]), 0.9 * mean + 0.1 * features.mean(0)

  heads, new_means = multi_head(head_fn, params, features, aux=means, has_aux=True)
  for j in range(NUM_HEADS):
    one = jax.tree.map(lambda x, j=j: x[j], params)
    assert_close(heads.shared[j], dense(one, features - means[j][None]), FEATURES)
    assert_close(new_means[j], 0.9 * means[j] + 0.1 * features.mean(axis=0), BATCH)


def test_aux_has_no_gradient(sized):
  features, *_ = batch()
  _, params = sized(dense_head)()

  def total(features, aux):
    heads, new_aux = multi_head(
      lambda params, features, aux: (dense(params, features) * aux, features.sum()),
      params,
      features,
      aux=aux,
      has_aux=True,
    )
    return heads.shared.sum() + heads.own.sum() + new_aux.sum(), heads.shared.sum()

  aux = normal(8, NUM_HEADS)
  d_features, d_aux = jax.grad(lambda *args: total(*args)[0], (0, 1))(features, aux)
  assert not d_aux.any()
  expected = jax.grad(lambda *args: total(*args)[1])(features, aux)
  np.testing.assert_array_equal(d_features, expected)


def test_random_keys_as_aux_give_each_head_its_own_mask(sized):
  features, *_ = batch()
  _, params = sized(dense_head)()

  def head_fn(params, features, key):
    mask = jax.random.bernoulli(key, 0.5, features.shape)
    return dense(params, jnp.where(mask, features, 0)), mask

  def total(params, keys):
    heads, masks = multi_head(head_fn, params, features, aux=keys, has_aux=True)
    return heads.own.sum(), masks

  keys = jax.random.split(jax.random.key(3), NUM_HEADS)
  d_params, masks = jax.jit(jax.grad(total, has_aux=True))(params, keys)
  assert len(np.unique(masks.reshape(NUM_HEADS, -1), axis=0)) == NUM_HEADS
  for j in range(NUM_HEADS):
    expected = np.where(masks[j], features, 0).sum(axis=0)
    assert_close(d_params["kernel"][j, :, 0], expected, terms=BATCH)


def test_closed_over_values_are_treated_as_features():
  features, labels, log_weights = batch()
  table = normal(9, FEATURES, CLASSES)  # as of an embedding that the output is tied to
  _, params = dense_head()

  def head_fn(params, inputs):
    features, table = inputs
    return features @ (table + params["kernel"])

  def closing(params, features, table):
    heads = multi_head(lambda params, x: head_fn(params, (x, table)), params, features)
    return classification_loss(heads, labels, log_weights)[0]

  def passing(params, features, table):
    heads = multi_head(head_fn, params, (features, table))
    return classification_loss(heads, labels, log_weights)[0]

  args = params, features, table
  grads = jax.jit(jax.grad(closing, (0, 1, 2)))(*args)
  jax.tree.map(
    np.testing.assert_array_equal, grads, jax.jit(jax.grad(passing, (0, 1, 2)))(*args)
  )
  assert grads[2].any()


def test_closed_over_integers_and_keys_need_no_gradient():
  features, *_ = batch()
  _, params = dense_head()

  def total(features, key, index):
    def head_fn(params, features):
      return dense(params, features * jax.random.normal(key, features.shape))[:, index]

    return multi_head(head_fn, params, features).shared.sum()

  keys = jax.random.split(jax.random.key(0), 2)
  grads = jax.jit(jax.vmap(jax.grad(total), in_axes=(None, 0, 0)))(
    features, keys, jnp.arange(2)
  )
  for j in range(2):
    noise = jax.random.normal(keys[j], features.shape)
    expected = noise * params["kernel"][:, :, j].sum(axis=0)[None]
    assert_close(grads[j], expected, terms=NUM_HEADS)


def test_closed_over_arrays_are_not_kept_alive(sized):
  features, _, log_weights = batch()
  head_fn, params = sized(dense_head)()

  def evaluate_once():
    labels, noise = batch()[1], jnp.ones_like(features)
    heads = multi_head(lambda params, x: head_fn(params, x * noise), params, features)
    classification_loss(heads, labels, log_weights)
    return weakref.ref(noise), weakref.ref(labels)

  arrays = evaluate_once()
  gc.collect()
  assert [array() for array in arrays] == [None, None]


@pytest.mark.parametrize("classes", [CLASSES, MANY_CLASSES])
def test_trees_with_integer_leaves_pass_through(classes):
  features, *_ = batch()
  kernels = normal(0, NUM_HEADS, FEATURES, classes)
  params = {"kernel": kernels, "index": jnp.arange(NUM_HEADS)}
  inputs = {"x": features, "mask": jnp.arange(BATCH) % 2}

  def head_fn(params, inputs):
    logits = (
      inputs["x"] @ params["kernel"] * inputs["mask"][:, None].astype(jnp.float32)
    )
    return {"logits": logits, "choice": logits.argmax(axis=-1) + params["index"]}

  def total(params, inputs):
    heads = multi_head(head_fn, params, inputs)
    return heads.shared["logits"].sum() + heads.own["logits"].sum(), heads

  grad_fn = jax.grad(total, argnums=(0, 1), allow_int=True, has_aux=True)
  (d_params, d_inputs), heads = grad_fn(params, inputs)
  assert heads.shared["choice"].shape == (NUM_HEADS, BATCH)
  assert d_params["index"].dtype == d_inputs["mask"].dtype == jax.dtypes.float0
  expected = jnp.broadcast_to(features[1::2].sum(axis=0)[None, :, None], kernels.shape)
  assert_close(d_params["kernel"], expected, terms=BATCH)


def test_numpy_parameters_and_features_work(sized):
  head_fn, params = sized(dense_head)()
  features, *_ = batch()
  heads = multi_head(head_fn, jax.tree.map(np.asarray, params), np.asarray(features))
  np.testing.assert_array_equal(
    heads.shared, multi_head(head_fn, params, features).shared
  )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gradients_keep_the_dtype(sized, dtype):
  head_fn, params = sized(dense_head)()
  features, labels, log_weights = batch()
  params, features = jax.tree.map(lambda x: x.astype(dtype), (params, features))
  step = compiled_step(head_fn)
  (loss, info), grads = step(params, features, labels, log_weights)
  assert loss.dtype == info.head_log_likelihoods.dtype == jnp.float32
  assert all(x.dtype == dtype for x in jax.tree.leaves(grads))


# Transformations


def test_vmap_over_models_equals_a_loop(sized):
  with jax.enable_x64(True):
    head_fn, params = sized(mlp_head)()
    models = params, diverge(params, np.inf, [1])
    step = gradient_fn(head_fn)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *models)
    vmapped = jax.jit(jax.vmap(step, in_axes=(0, None, None, None)))
    (losses, _), grads = vmapped(stacked, *batch())
    for i, model in enumerate(models):
      (loss, _), expected = compiled_step(head_fn)(model, *batch())
      assert_close(losses[i], loss, terms=BATCH)
      actual = jax.tree.map(lambda x, i=i: x[i], grads)
      assert_close(actual, expected, terms=NUM_HEADS * BATCH)


def test_scanned_training_equals_a_loop(sized):
  with jax.enable_x64(True):
    head_fn, params = sized(mlp_head)()
    rest = batch()

    def step(params, _):
      (loss, _), (grads, _) = gradient_fn(head_fn)(params, *rest)
      return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

    scanned, losses = jax.lax.scan(step, params, length=3)
    step = jax.jit(step)
    for i in range(3):
      params, loss = step(params, None)
      assert_close(losses[i], loss, terms=(i + 1) * BATCH)
    assert_close(scanned, params, terms=3 * BATCH * NUM_HEADS)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_shard_map_checks_how_values_vary_over_devices(num_devices, sized):
  head_fn, params = sized(mlp_head)()
  features, labels, log_weights = batch()
  mesh = auto_mesh("data", num_devices)
  rows = jax.P("data")

  @jax.jit
  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=(jax.P(), rows, rows), out_specs=(jax.P(), rows)
  )
  def gradients(params, features, labels):
    grads = gradient_fn(head_fn)(params, features, labels, jnp.asarray(log_weights))[1]
    return jax.tree.map(lambda x: x / num_devices, grads)  # of a sum over devices

  for bad in (params, diverge(params, np.inf, [1])):
    _, expected = compiled_step(head_fn)(bad, features, labels, log_weights)
    actual = gradients(bad, features, labels)
    assert_close(actual, expected, terms=NUM_HEADS * BATCH)


def auto_mesh(name, num_devices):
  types = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((num_devices,), (name,), axis_types=types)


def test_heads_of_several_devices_spare_each_other_in_shard_map(sized):
  """All heads of one device have diverged, and what it gives back is NaN."""
  head_fn, params = sized(norm_head)()
  params = jax.tree.map(lambda x: x[:4], params)
  features, labels, log_weights = batch()
  log_weights = log_weights[:4]
  over_heads = functools.partial(
    jax.shard_map,
    mesh=auto_mesh("heads", 2),
    in_specs=(jax.P("heads"), jax.P()),
    out_specs=jax.P("heads"),
  )

  def split(head_fn, params, features):
    return over_heads(functools.partial(multi_head, head_fn))(params, features)

  step = compiled_step(head_fn, split)
  for victims in ([], [3], [2, 3], [0, 1]):
    factors = jnp.ones(4).at[np.array(victims, int)].set(jnp.nan)
    bad = jax.tree.map(
      lambda x, f=factors: x * f.reshape((-1,) + (1,) * (x.ndim - 1)), params
    )
    args = bad, features, labels, log_weights
    (expected_loss, _), expected = compiled_step(head_fn)(*args)
    (loss, info), actual = step(*args)
    assert info.healthy.sum() == 4 - len(victims)
    assert all_finite(actual)
    assert_close((loss, actual), (expected_loss, expected), terms=NUM_HEADS * BATCH)


def test_checkpoint_changes_nothing(sized):
  with jax.enable_x64(True):
    head_fn, params = sized(mlp_head)()
    features, labels, log_weights = batch()

    def loss_fn(wrap):
      @wrap
      def heads_of(params, features):
        return multi_head(head_fn, params, jnp.tanh(features))

      return lambda *args: classification_loss(heads_of(*args), labels, log_weights)[0]

    args = params, features
    expected = jax.jit(jax.grad(loss_fn(lambda f: f), (0, 1)))(*args)
    grads = jax.jit(jax.grad(loss_fn(jax.checkpoint), (0, 1)))(*args)
    assert_close(grads, expected, terms=NUM_HEADS * BATCH)


def test_second_derivatives_are_those_of_the_routed_gradient(sized):
  with jax.enable_x64(True):
    head_fn, params = sized(dense_head)()
    features, labels, log_weights = batch()
    evaluate = jax.vmap(head_fn, in_axes=(0, None))

    def mixture(params, features):
      log_probs = jax.nn.log_softmax(evaluate(params, features))
      log_probs = log_probs[:, jnp.arange(BATCH), labels] + log_weights[:, None]
      return -jax.nn.logsumexp(log_probs, axis=0).mean()

    def sum_of_losses(params, features):
      log_probs = jax.nn.log_softmax(evaluate(params, features))
      return -log_probs[:, jnp.arange(BATCH), labels].mean(axis=1).sum()

    def expected(params, features):
      d_params = jax.grad(sum_of_losses)(params, features)
      return d_params, jax.grad(mixture, argnums=1)(params, features)

    def routed(params, features):
      return gradient_fn(head_fn)(params, features, labels, log_weights)[1]

    direction = jax.tree.map(jnp.cos, (params, features))

    def forward_over_reverse(gradient):
      return jax.jit(lambda *args: jax.jvp(gradient, *args)[1])(args, direction)

    def reverse_over_reverse(gradient):
      def squares(*args):
        return sum((x**2).sum() for x in jax.tree.leaves(gradient(*args)))

      return jax.jit(jax.grad(squares, argnums=(0, 1)))(*args)

    args = params, features
    terms = NUM_HEADS * BATCH * FEATURES
    for twice in (forward_over_reverse, reverse_over_reverse):
      assert_close(twice(routed), twice(expected), terms)


def test_forward_mode_is_refused():
  head_fn, params = dense_head()
  features, *_ = batch()
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(lambda x: multi_head(head_fn, params, x), (features,), (features,))


# HeadOutputs, and bad arguments


def test_head_outputs_are_a_tree_and_no_array():
  x = jnp.ones((3, 2))
  heads = jax.tree.map(lambda x: x / 2, HeadOutputs(shared=x, own=x))
  assert isinstance(heads, HeadOutputs)
  assert heads.num_heads == 3
  np.testing.assert_array_equal(heads.own, x / 2)
  with pytest.raises(TypeError):
    jax.nn.softmax(heads)
  with pytest.raises(AttributeError):
    heads.own = x


def test_head_outputs_are_shown_by_their_shapes():
  x = jnp.ones((3, 2))
  assert repr(HeadOutputs(x, x)) == "HeadOutputs(float32[3,2])"
  pair = (x, {"scale": x.astype(jnp.bfloat16)})
  shown = "HeadOutputs((float32[3,2], {scale: bfloat16[3,2]}))"
  assert repr(HeadOutputs(pair, pair)) == shown
  assert repr(HeadOutputs(0, 0)) == "HeadOutputs(0)"


def test_map_slices_both_halves():
  x, y = normal(0, 3, 5, 4), normal(1, 3, 5)
  heads = HeadOutputs((x, y), (x, 2 * y)).map(lambda x: x[:, :2])
  jax.tree.map(
    np.testing.assert_array_equal,
    (heads.shared, heads.own),
    ((x[:, :2], y[:, :2]), (x[:, :2], 2 * y[:, :2])),
  )
  assert heads.num_heads == 3


def single_example(params, x):
  """A model of one example, as under `jax.vmap`."""
  return multi_head(dense, params, x[None]).map(lambda outputs: outputs[:, 0])


@pytest.mark.parametrize("examples", [NUM_HEADS, BATCH])
def test_a_model_of_single_examples_needs_the_examples_on_axis_1(examples, sized):
  _, params = sized(dense_head)()
  features, labels, log_weights = batch()
  features, labels = features[:examples], labels[:examples]
  loss = functools.partial(classification_loss, labels=labels, log_weights=log_weights)
  moved = jax.vmap(single_example, (None, 0))(params, features)
  message = (
    r"got them on axis 1 of HeadOutputs\(.*axis=float32\[\d+,0\]\), as jax.vmap .*"
    r"jax.vmap\(model, out_axes=1\), or .*moveaxis\(x, 1, 0\)"
  )
  for refused in (
    lambda: loss(moved),
    lambda: jax.jit(loss)(moved),
    lambda: mixture_log_probs(moved, log_weights),
    lambda: moved.num_heads,
    lambda: moved.map(jnp.tanh),
  ):
    with pytest.raises(ValueError, match=message):
      refused()
  expected, _ = loss(multi_head(dense, params, features))
  in_place = jax.vmap(single_example, (None, 0), out_axes=1)(params, features)
  back = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), moved)
  for heads in (in_place, back):
    assert_close(loss(heads)[0], expected, terms=BATCH)


def test_outputs_stacked_by_scan_are_refused(sized):
  head_fn, params = sized(dense_head)()
  features, *_ = batch()
  _, heads = jax.lax.scan(
    lambda _, x: (None, multi_head(head_fn, params, x)), None, features[:, None]
  )
  with pytest.raises(ValueError, match="got them on axis 1 of"):
    _ = heads.num_heads


def test_head_outputs_pass_through_transformations():
  features, labels, log_weights = batch()
  head_fn, params = dense_head()
  heads = multi_head(head_fn, params, features)

  def loss(heads):
    return classification_loss(heads, labels, log_weights)[0]

  expected, gradients = jax.value_and_grad(loss)(heads)
  assert isinstance(gradients, HeadOutputs)
  assert gradients.shared.shape == heads.shared.shape
  # jit, cond and scan, as argument, result and carry
  passed = jax.jit(lambda heads: heads)(heads)
  passed = jax.lax.cond(loss(passed) > 0, lambda x: x, lambda x: x.map(jnp.sin), passed)
  made = HeadOutputs(passed.shared, passed.own)
  passed, _ = jax.lax.scan(
    lambda heads, _: (heads.map(lambda x: x), None), made, length=2
  )
  assert_close(loss(passed), expected, terms=BATCH)
  # seeds on axis 0 outside, and the loss of each inside
  seeds = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
  stacked = jax.vmap(multi_head, (None, 0, None), axis_size=2)(head_fn, seeds, features)
  losses = jax.vmap(loss)(stacked)
  assert_close(losses[0], expected, terms=BATCH)
  assert_close(loss(jax.tree.map(lambda x: x[0], stacked)), expected, terms=BATCH)
  # both halves are pairs of axes, too
  halves = jax.vmap(loss, in_axes=(HeadOutputs(0, 0),))(stacked)
  assert_close(halves, losses, terms=BATCH)
  assert jax.eval_shape(lambda: heads).num_heads == NUM_HEADS


def test_head_outputs_are_split_over_devices_by_heads_or_examples():
  features, labels, log_weights = batch()
  head_fn, params = dense_head()
  params = jax.tree.map(lambda x: x[:4], params)
  heads = multi_head(head_fn, params, features)
  mesh = auto_mesh("axis", 2)
  for axis in (0, 1):
    spec = jax.P(*[None] * axis, "axis")
    specs = HeadOutputs(spec, spec)
    assert specs.axis == (jax.P("axis") if axis == 0 else jax.P(None))
    passed = jax.shard_map(lambda x: x, mesh=mesh, in_specs=(specs,), out_specs=specs)(
      heads
    )
    shardings = jax.tree.map(
      lambda spec: jax.sharding.NamedSharding(mesh, spec),
      specs,
      is_leaf=lambda x: isinstance(x, jax.P),
    )
    passed = jax.jit(lambda x: x, out_shardings=shardings)(passed)
    assert passed.num_heads == 4
    np.testing.assert_array_equal(passed.own, heads.own)
  sharding = jax.sharding.NamedSharding(mesh, jax.P(None, "axis"))
  assert HeadOutputs(sharding, sharding).axis.spec == jax.P(None)


def test_head_fn_must_be_callable():
  with pytest.raises(TypeError, match=r"multi_head\(head_fn=...\) .* got dict"):
    multi_head({}, jnp.ones((2, 3)), jnp.ones(3))


@pytest.mark.parametrize(
  ("params", "aux", "found"),
  [
    ({"a": jnp.ones((2, 3)), "b": jnp.ones((4,))}, None, r"\[2, 4\]"),
    (jnp.ones((2, 3)), jnp.ones(5), r"\[2, 5\]"),
    ({"a": jnp.ones((2, 3)), "b": jnp.ones(())}, None, r"\[2, None\]"),
    (jnp.ones((0, 3)), None, r"\[0\]"),
    ({}, None, r"\[\]"),
  ],
)
def test_leading_axes_must_agree(params, aux, found):
  with pytest.raises(ValueError, match=f"num_heads >= 1, got leading axes {found}"):
    multi_head(lambda params, x: x, params, jnp.ones(3), aux=aux)
