"""float16 under dynamic loss scaling: what overflows is told, and training goes on."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale

import alrao_jax as alrao
import alrao_jax.linen
import alrao_jax.nnx

HALF = jnp.float16
FEATURES, HIDDEN, BATCH = 5, 8, 32
OUTPUTS = {"small": 3, "large": 40}  # large heads are handled apart
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(BATCH, FEATURES)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(3, size=BATCH))
MIX = jnp.asarray(RNG.normal(size=(FEATURES, OUTPUTS["large"])), jnp.float32)


class Linen(nn.Module):
  outputs: int
  num_heads: int
  body: type = HALF
  head: type = HALF

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(HIDDEN, dtype=self.body, name="body")(x.astype(self.body)))
    head = nn.Dense(self.outputs, dtype=self.head)
    return alrao_jax.linen.MultiHead(head, self.num_heads, name="out")(x)


class NNX(nnx.Module):
  def __init__(self, outputs, num_heads, body):
    rngs = nnx.Rngs(0)
    self.body = nnx.Linear(FEATURES, HIDDEN, dtype=body, rngs=rngs)
    self.out = alrao_jax.nnx.MultiHead(
      lambda rngs: nnx.Linear(HIDDEN, outputs, dtype=HALF, rngs=rngs),
      num_heads,
      rngs=rngs,
    )
    self.dtype = body

  def __call__(self, x):
    return self.out(nnx.tanh(self.body(x.astype(self.dtype))))


def build(api, outputs, num_heads, body=HALF, head=HALF):
  """The parameters, and the model as a function of them."""
  if api == "linen":
    model = Linen(outputs, num_heads, body, head)
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    return params, lambda params, x: model.apply({"params": params}, x)
  graph, params = nnx.split(NNX(outputs, num_heads, body))
  return nnx.to_pure_dict(params), lambda params, x: nnx.merge(
    graph, nnx.State(params)
  )(x)


def norm(tree):
  return float(jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree))))


def scaled_gradients(loss_fn):
  """A function from parameters and a scale to whether all is finite, and gradients."""

  @jax.jit
  def gradients(params, scale):
    scaler = DynamicScale(scale=scale)
    _, finite, _, grads = scaler.value_and_grad(loss_fn)(params)
    return finite, grads

  return gradients


def assert_told_or_right(gradients, params):
  """At every scale: not finite, or the gradients at scale 1, of body and heads."""
  finite, right = gradients(params, jnp.float32(1))
  assert finite
  told = []
  for exponent in range(41):
    finite, grads = gradients(params, jnp.float32(2.0**exponent))
    told.append(not finite)
    for name in ("body", "out") if finite else ():
      error = jax.tree.map(jnp.subtract, grads[name], right[name])
      assert norm(error) <= 0.01 * norm(right[name]), (exponent, name)
  assert told == sorted(told)  # from one scale on
  assert not told[8]
  assert told[-1]


@pytest.mark.parametrize("size", OUTPUTS)
@pytest.mark.parametrize("body", [HALF, jnp.float32], ids=["float16", "float32 body"])
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_at_every_scale_gradients_are_right_or_not_finite(api, body, size):
  params, apply = build(api, OUTPUTS[size], 4, body)

  def loss_fn(params):
    log_weights = jnp.log(jnp.full(4, 0.25))
    return alrao.classification_loss(apply(params, X), LABELS, log_weights)[0]

  gradients = scaled_gradients(loss_fn)
  assert_told_or_right(gradients, params)
  # A head that has diverged neither hides the others nor stops them.
  with_nan = {
    **params,
    "out": jax.tree.map(lambda x: x.at[1].set(jnp.nan), params["out"]),
  }
  assert_told_or_right(gradients, with_nan)


def test_at_every_scale_the_gradients_of_chunks_are_right_or_not_finite():
  params, _ = build("linen", OUTPUTS["large"], 4)

  def loss_fn(params):
    features = nn.tanh(
      nn.Dense(HIDDEN, dtype=HALF).apply({"params": params["body"]}, X)
    )

    def evaluate(features):
      layer = alrao_jax.linen.MultiHead(nn.Dense(OUTPUTS["large"], dtype=HALF), 4)
      return layer.apply({"params": params["out"]}, features)

    def log_prob(outputs, labels):
      loss = optax.losses.softmax_cross_entropy_with_integer_labels
      return -loss(outputs.astype(jnp.float32), labels)

    log_weights = jnp.log(jnp.full(4, 0.25))
    return alrao.chunked_mixture_loss(
      evaluate, features, log_prob, LABELS, log_weights, chunk_size=12
    )[0]

  assert_told_or_right(scaled_gradients(loss_fn), params)


STEPS = 400


def train(api, outputs, make_optimizer, dtypes, scaled):
  """The scales, which steps were taken, and the last loss, of a regression."""
  params, apply = build(api, outputs, 10, *dtypes)
  optimizer = make_optimizer(jax.random.key(1))
  targets = jnp.sin(X @ MIX[:, :outputs])

  def step(carry, _):
    params, opt_state, scaler = carry

    def loss_fn(params):
      log_weights = alrao.log_weights(opt_state)
      return alrao.regression_loss(apply(params, X), targets, log_weights)

    if scaled:
      scaler, finite, (loss, info), grads = scaler.value_and_grad(
        loss_fn, has_aux=True
      )(params)
    else:
      (loss, info), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
      finite = jnp.array(True)
    updates, new_state = optimizer.update(
      grads, opt_state, params, head_log_likelihoods=info.head_log_likelihoods
    )
    new = optax.apply_updates(params, updates), new_state
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), new, (params, opt_state)
    )
    return (params, opt_state, scaler), (loss, finite, scaler.scale)

  start = params, optimizer.init(params), DynamicScale(scale=jnp.float32(2**16))
  run = jax.jit(lambda start: jax.lax.scan(step, start, length=STEPS)[1])
  loss, finite, scale = run(start)
  return map(np.asarray, (loss[-1], finite, scale))


def schedule_free(key):
  return alrao.schedule_free_alrao(key)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("api", "size", "make_optimizer", "body"),
  [
    ("linen", "small", alrao.alrao, HALF),
    ("linen", "large", alrao.alrao, HALF),
    ("linen", "small", alrao.alrao, jnp.float32),
    ("nnx", "large", alrao.alrao, jnp.float32),
    ("linen", "small", schedule_free, HALF),
  ],
)
def test_heads_that_diverge_do_not_stop_a_scaled_run(api, size, make_optimizer, body):
  """Ten heads on [1e-5, 10], of which several are far too fast."""
  with jax.numpy_dtype_promotion("standard"):  # Flax's DynamicScale mixes types
    loss, finite, scale = train(api, OUTPUTS[size], make_optimizer, (body, HALF), True)
    full = (jnp.float32, jnp.float32)
    expected, *_ = train("linen", OUTPUTS[size], make_optimizer, full, False)
  assert (~finite).sum() <= 0.05 * STEPS
  assert scale[-1] >= 2**6
  if api == "linen":
    np.testing.assert_allclose(loss, expected, rtol=0.02)
