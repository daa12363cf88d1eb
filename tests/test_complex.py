"""Complex parameters: one rate a unit scales a complex update as a real one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import alrao_jax as alrao
from alrao_jax._unit_map import unit_map

KEY = jax.random.key(0)
NUM_HEADS = 3
LOG_LIKELIHOODS = jnp.array([-3.0, -1.0, -2.0])

OPTIMIZERS = {
  "sgd": lambda **kw: alrao.alrao(KEY, **kw),
  "guarded": lambda **kw: alrao.alrao(
    KEY, optax.trace(0.9), guard=alrao.guard(0.1), weight_decay=0.1, schedule=0.5, **kw
  ),
  "adam": lambda **kw: alrao.alrao(KEY, optax.scale_by_adam(), 1e-6, 1.0, **kw),
  "clipped": lambda **kw: alrao.alrao(
    KEY, alrao.per_head(optax.clip_by_global_norm(1.0)), **kw
  ),
  "schedule_free": lambda **kw: alrao.schedule_free_alrao(
    KEY, guard=alrao.guard(), **kw
  ),
}

each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def make_tree(seed):
  """A complex layer and complex heads, real numbers so far."""
  return {
    "layer": {"kernel": normal(seed, 5, 4), "bias": normal(seed + 1, 4)},
    "out": {"alrao_heads": {"kernel": normal(seed + 2, NUM_HEADS, 4, 2)}},
  }


def run(optimizer, params, grads, steps=4):
  """Parameters and optimizer's state after a few steps."""

  @jax.jit
  def step(params, state, scale):
    updates = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
    updates, state = optimizer.update(
      updates, state, params, head_log_likelihoods=LOG_LIKELIHOODS
    )
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  for i in range(steps):
    params, state = step(params, state, jnp.float32(0.5**i))
  assert step._cache_size() == 1  # state dtypes never change
  return params, state


@each_optimizer
@pytest.mark.parametrize("phase", [1, 1j])
def test_a_complex_parameter_trains_like_a_real_one_turned_by_its_phase(name, phase):
  # With real numbers, or imaginary ones alone, nothing is rounded in another way.
  turned = [
    jax.tree.map(lambda x: jnp.asarray(phase * x, jnp.complex64), make_tree(seed))
    for seed in (0, 10)
  ]
  plain = [
    jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), make_tree(seed))
    for seed in (0, 10)
  ]
  found, state = run(OPTIMIZERS[name](), *turned)
  # Adam's bias correction of real parameters promotes, strict or not.
  with jax.numpy_dtype_promotion("standard" if name == "adam" else "strict"):
    expected, plain_state = run(OPTIMIZERS[name](), *plain)
  if name == "schedule_free":
    found = alrao.eval_params(state, found)
    expected = alrao.eval_params(plain_state, expected)
  for a, b, start in zip(
    *map(jax.tree.leaves, (found, expected, plain[0])), strict=True
  ):
    assert a.dtype == jnp.complex64
    along, across = (a / phase).real, (a / phase).imag
    np.testing.assert_allclose(along, b, rtol=1e-6, atol=1e-7)
    assert not across.any() and (b != start).any()
  np.testing.assert_array_equal(
    alrao.log_weights(state), alrao.log_weights(plain_state)
  )


@pytest.mark.parametrize("name", ["sgd", "guarded"])
def test_a_complex_layer_trains_as_its_parts_that_share_units(name):
  x, targets = normal(0, 16, 5), normal(1, 16, 4) + 1j * normal(2, 16, 4)
  kernel, bias = normal(3, 5, 4) + 1j * normal(4, 5, 4), np.zeros(4) + 0j
  complex_params = {"layer": {"kernel": kernel, "bias": bias}}
  parts = {
    "layer": {
      f"{leaf}_{part}": getattr(value, part)
      for leaf, value in complex_params["layer"].items()
      for part in ("real", "imag")
    }
  }
  shared = alrao.UnitOptions([("", alrao.Units((-1,), "layer"))])

  def loss(params):
    layer = params["layer"]
    if "kernel" not in layer:
      kernel, bias = (
        jax.lax.complex(layer[f"{leaf}_real"], layer[f"{leaf}_imag"])
        for leaf in ("kernel", "bias")
      )
    else:
      kernel, bias = layer["kernel"], layer["bias"]
    error = x.astype(kernel.dtype) @ kernel + bias[None] - targets
    return jnp.mean(error.real**2 + error.imag**2)

  def train(params, units):
    params = jax.tree.map(jnp.asarray, params)
    optimizer = OPTIMIZERS[name](heads=False, units=units)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
      # What jax.grad returns of a complex parameter is the conjugate of the ascent.
      grads = jax.tree.map(jnp.conj, jax.grad(loss)(params))
      updates, state = optimizer.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    for _ in range(20):
      params, state = step(params, state)
    return params["layer"]

  with jax.enable_x64(True):
    found = train(complex_params, alrao.UnitOptions())
    expected = train(parts, shared)
    assert loss({"layer": found}) < 0.9 * loss(complex_params)
  assert found["kernel"].dtype == np.complex128
  for leaf in ("kernel", "bias"):
    real, imag = (np.asarray(expected[f"{leaf}_{part}"]) for part in ("real", "imag"))
    np.testing.assert_allclose(found[leaf], real + 1j * imag, rtol=1e-11)


def test_norms_are_those_of_magnitudes():
  params = {"layer": {"kernel": jnp.array([[3 + 4j, 1j]]), "bias": jnp.zeros(2)}}
  norms, _ = unit_map(params).norms(params, jnp.float32)
  assert norms.dtype == jnp.float32 and norms.tolist() == [5.0, 1.0]


def test_the_guard_stops_a_unit_whose_magnitude_is_too_large():
  params = {"layer": {"kernel": jnp.array([[0.6 + 0.8j, 1j]])}}
  updates = {"layer": {"kernel": jnp.array([[0.9 + 0.9j, 0.9j]])}}
  guarded = alrao.guard_units()
  kept, state = guarded.update(updates, guarded.init(params), params)
  assert state.trips.tolist() == [1, 0]
  assert kept["layer"]["kernel"].tolist() == [[0, updates["layer"]["kernel"][0, 1]]]


BROKEN = [complex(np.nan, 1), complex(1, np.inf), complex(1e19, 0), complex(0, -1e19)]


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_parts_are_dropped(broken):
  grads = {"kernel": jnp.array([[1 + 1j, broken]], jnp.complex64)}
  dropping = alrao.drop_diverged()
  kept, state = dropping.update(grads, dropping.init(grads))
  assert kept["kernel"].tolist() == [[1 + 1j, 0]]
  assert bool(state.nonfinite_body_steps) == (not np.isfinite(broken))


@pytest.mark.parametrize("broken", BROKEN[:2])
def test_statistics_updates_and_batches_that_are_not_finite_are_left_out(broken):
  old = {"mean": jnp.ones(2, jnp.complex64)}
  new = {"mean": jnp.array([2j, broken], jnp.complex64)}
  assert alrao.keep_finite(new, old)["mean"].tolist() == [2j, 1]
  params = {"out": {"alrao_heads": {"kernel": jnp.ones((2, 3, 1), jnp.complex64)}}}
  updates = jax.tree.map(lambda p: p.at[0].set(broken), params)
  tracker = alrao.track_heads()
  kept, _ = tracker.update(
    updates, tracker.init(params), params, head_log_likelihoods=jnp.zeros(2)
  )
  leaf = kept["out"]["alrao_heads"]["kernel"]
  assert not leaf[0].any() and (leaf[1] == 1).all()
  skipping = alrao.skip_broken_batches(optax.identity())
  state = skipping.init(old)
  _, state = skipping.update(old, state, old)
  kept, state = skipping.update({"mean": jnp.full(2, broken)}, state, old)
  assert not kept["mean"].any() and state.skipped_steps == 1


def routed(kernels, features, labels):
  """Gradients of kernels and features, and the same written out by stop_gradient."""
  constant = jax.lax.stop_gradient
  log_a = jnp.log(jnp.array([0.2, 0.5, 0.3], features.real.dtype))

  def head(kernel, features):
    return jnp.abs(features @ kernel)

  def ours(kernels, features):
    heads = alrao.multi_head(head, kernels, features)
    return alrao.classification_loss(heads, labels, log_a)[0]

  def log_likelihoods(kernels, features):
    outputs = jax.vmap(head, (0, None))(kernels, features)
    return -optax.losses.softmax_cross_entropy_with_integer_labels(
      outputs, jnp.broadcast_to(labels[None], outputs.shape[:-1])
    )

  def reference(kernels, features):
    mixed = log_likelihoods(constant(kernels), features)
    own = log_likelihoods(kernels, constant(features))
    mixture = jax.nn.logsumexp(log_a[:, None] + mixed, axis=0)
    return -mixture.mean() - own.mean(axis=1).sum()

  both = jax.jit(lambda *args: [jax.grad(f, (0, 1))(*args) for f in (ours, reference)])
  return both(kernels, features)


@pytest.mark.parametrize("outputs", [2, 9], ids=["joint", "apart"])
def test_complex_heads_have_both_gradients(outputs):
  with jax.enable_x64(True):
    kernels = jnp.asarray(normal(0, 3, 4, outputs) + 1j * normal(1, 3, 4, outputs))
    features = jnp.asarray(normal(2, 6, 4) + 1j * normal(3, 6, 4))
    found, expected = routed(kernels, features, jnp.arange(6) % 2)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-12)


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4, dtype=jnp.complex64, param_dtype=jnp.complex64, name="body")(x)
    output = nn.Dense(2, dtype=jnp.complex64, param_dtype=jnp.complex64)
    return alrao.linen.MultiHead(output, num_heads=3, name="out")(x).map(jnp.abs)


def test_a_complex_linen_model_trains_collapses_and_is_exported():
  model, x = Linen(), jnp.asarray(normal(0, 6, 5), jnp.complex64)
  optimizer = alrao.schedule_free_alrao(KEY)

  def loss_fn(params, state):
    heads = model.apply({"params": params}, x)
    return alrao.classification_loss(heads, jnp.arange(6) % 2, alrao.log_weights(state))

  @jax.jit
  def first_step():
    params = model.init(jax.random.key(1), x)["params"]
    state = optimizer.init(params)
    grads, info = jax.grad(loss_fn, has_aux=True)(params, state)
    grads = jax.tree.map(jnp.conj, grads)
    updates, state = optimizer.update(
      grads, state, params, head_log_likelihoods=info.head_log_likelihoods
    )
    return optax.apply_updates(params, updates), state, updates

  params, state, updates = first_step()
  assert alrao.report(state, params, updates).units_moving == 4
  assert alrao.scalars(state, params, updates)["alrao/units_moving"] == 1
  rates = alrao.unit_rates(state, params)
  assert {leaf.dtype for leaf in jax.tree.leaves(rates)} == {jnp.dtype("float32")}
  alrao.with_unit_rates(state, params, rates)
  wrong = jax.tree.map(lambda r: r.astype(jnp.complex64), rates)
  with pytest.raises(TypeError, match="needs real rates, also for complex parameters"):
    alrao.with_unit_rates(state, params, wrong)
  state, params = alrao.collapse(optimizer, state, params, keep=1)
  exported = alrao.export(state, alrao.eval_params(state, params))
  assert exported["out"]["kernel"].shape == (4, 2)
  loaded = alrao.load_pretrained(params, exported)
  assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype("complex64")}


def test_a_complex_nnx_model_trains():
  model = alrao.nnx.MultiHead(
    lambda rngs: nnx.Linear(4, 2, param_dtype=jnp.complex64, rngs=rngs),
    num_heads=3,
    rngs=nnx.Rngs(0),
  )
  optimizer = nnx.Optimizer(model, alrao.alrao(KEY), wrt=nnx.Param)
  x = jnp.asarray(normal(0, 6, 4), jnp.complex64)

  def loss_fn(model):
    weights = alrao.log_weights(optimizer.opt_state)
    return alrao.classification_loss(model(x).map(jnp.abs), jnp.arange(6) % 2, weights)

  grads, info = nnx.grad(loss_fn, has_aux=True)(model)
  before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
  optimizer.update(
    model,
    jax.tree.map(jnp.conj, grads),
    head_log_likelihoods=info.head_log_likelihoods,
  )
  moved = jax.tree.map(lambda a, b: (a != b).any(), nnx.state(model, nnx.Param), before)
  assert all(jax.tree.leaves(moved))


def losses_of(dtype):
  heads = alrao.HeadOutputs(*[jnp.ones((2, 6, 2), dtype)] * 2)
  log_a, y, ones = jnp.log(jnp.full(2, 0.5)), jnp.arange(6) % 2, jnp.ones((6, 2))
  return {
    "classification_loss": lambda: alrao.classification_loss(heads, y, log_a),
    "binary_loss": lambda: alrao.binary_loss(heads, ones, log_a),
    "regression_loss": lambda: alrao.regression_loss(heads, ones, log_a),
    "mixture_loss": lambda: alrao.mixture_loss(heads, lambda x: x.sum(-1), log_a),
    "mixture_log_probs": lambda: alrao.mixture_log_probs(heads, log_a),
    "mixture_mean": lambda: alrao.mixture_mean(heads, log_a),
  }


@pytest.mark.parametrize("name", losses_of(jnp.float32))
def test_complex_outputs_have_no_probability(name):
  losses_of(jnp.float32)[name]()
  with pytest.raises(TypeError, match=rf"{name}\(\) needs real .* got complex64"):
    losses_of(jnp.complex64)[name]()


def test_complex_targets_are_refused():
  heads = alrao.HeadOutputs(*[jnp.ones((2, 6, 1))] * 2)
  targets = jnp.ones((6, 1), jnp.complex64)
  with pytest.raises(TypeError, match=r"\(targets=...\) must be real, got complex64"):
    alrao.regression_loss(heads, targets, jnp.log(jnp.full(2, 0.5)))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_base_that_loses_the_phase_is_refused(compiled):
  optimizer = alrao.alrao(KEY, optax.scale_by_adadelta(), heads=False)
  init = jax.jit(optimizer.init) if compiled else optimizer.init
  init({"kernel": jnp.ones((2, 3))})
  with pytest.raises(ValueError, match="must keep the phase of complex gradients"):
    init({"kernel": jnp.ones((2, 3), jnp.complex64)})
