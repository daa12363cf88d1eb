"""The optimizer where Flax users meet it: TrainState, nnx.Optimizer, sharded params."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import alrao_jax as alrao
import alrao_jax.linen
import alrao_jax.nnx
from alrao_jax._tree import find_state

NUM_HEADS, NUM_CLASSES = 4, 3


@pytest.fixture(scope="module")
def mesh():
  if len(jax.devices()) < 4:
    pytest.skip("needs 4 devices")
  return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))


@pytest.fixture(scope="module")
def batch():
  images = jax.random.normal(jax.random.key(1), (16, 6))
  labels = jnp.argmax(images @ jax.random.normal(jax.random.key(2), (6, 3)), axis=-1)
  return images, labels


class Classifier(nn.Module):
  boxed: bool = False

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.lecun_normal()
    if self.boxed:
      init = nn.with_partitioning(init, (None, "model"))
    x = nn.relu(nn.LayerNorm()(nn.Dense(8, kernel_init=init)(x)))
    return alrao.linen.MultiHead(nn.Dense(NUM_CLASSES), num_heads=NUM_HEADS)(x)


class NnxClassifier(nnx.Module):
  def __init__(self, rngs, sharding=None):
    init = nnx.initializers.lecun_normal()
    if sharding is not None:
      init = nnx.with_partitioning(init, sharding)
    self.dense = nnx.Linear(6, 8, kernel_init=init, rngs=rngs)
    self.norm = nnx.LayerNorm(8, rngs=rngs)
    self.out = alrao.nnx.MultiHead(
      lambda rngs: nnx.Linear(8, NUM_CLASSES, rngs=rngs),
      num_heads=NUM_HEADS,
      rngs=rngs,
    )

  def __call__(self, x):
    return self.out(nnx.relu(self.norm(self.dense(x))))


def train_linen(model, params, batch, steps=20, jit=jax.jit):
  optimizer = alrao.alrao(jax.random.key(0))
  state = alrao.linen.TrainState.create(
    apply_fn=model.apply, params=params, tx=optimizer
  )

  @jit
  def step(state, images, labels):
    def loss_fn(params):
      heads = state.apply_fn({"params": params}, images)
      weights = alrao.log_weights(state.opt_state)
      return alrao.classification_loss(heads, labels, weights)

    (loss, info), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(
      grads=grads, head_log_likelihoods=info.head_log_likelihoods
    )
    return state, loss

  losses = []
  for _ in range(steps):
    state, loss = step(state, *batch)
    losses.append(float(loss))
  return state, losses


def train_nnx(model, batch, steps=20):
  optimizer = nnx.Optimizer(model, alrao.alrao(jax.random.key(0)), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, images, labels):
    def loss_fn(model):
      weights = alrao.log_weights(optimizer.opt_state)
      return alrao.classification_loss(model(images), labels, weights)

    (loss, info), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads, head_log_likelihoods=info.head_log_likelihoods)
    return loss

  losses = [float(step(model, optimizer, *batch)) for _ in range(steps)]
  return optimizer, losses


class OwnOptimizer:
  """What takes extra arguments and is of no class of optax."""

  def __init__(self, key):
    self.inner = alrao.alrao(key)

  def init(self, params):
    return self.inner.init(params)

  def update(self, updates, state, params=None, *, head_log_likelihoods):
    return self.inner.update(
      updates, state, params, head_log_likelihoods=head_log_likelihoods
    )


# Everything around alrao that hands over extra arguments.
WRAPPERS = {
  "plain": alrao.alrao,
  "multi_steps": lambda key: optax.MultiSteps(alrao.alrao(key), 1),
  "multi_steps_transformation": lambda key: optax.MultiSteps(
    alrao.alrao(key), 1
  ).gradient_transformation(),
  "masked": lambda key: optax.masked(alrao.alrao(key), lambda _: True),
  "partition": lambda key: optax.partition({"all": alrao.alrao(key)}, lambda _: "all"),
  "inject_hyperparams": lambda key: optax.inject_hyperparams(
    alrao.alrao, static_args="key"
  )(key),
  "chain": lambda key: optax.chain(optax.identity(), alrao.alrao(key)),
  "apply_if_finite": lambda key: optax.apply_if_finite(alrao.alrao(key), 3),
  "own": OwnOptimizer,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_train_state_takes_every_wrapper_that_hands_over_arguments(name, batch):
  with jax.numpy_dtype_promotion("standard"):  # MultiSteps' mean needs it
    check_train_state(WRAPPERS[name](jax.random.key(0)), batch)


def check_train_state(tx, batch):
  model = Classifier()
  params = model.init(jax.random.key(3), batch[0])["params"]
  state = alrao.linen.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
  state = state.apply_gradients(
    grads=jax.tree.map(jnp.ones_like, params),
    head_log_likelihoods=jnp.array([-1.0, -2.0, -3.0, -4.0]),
  )
  weights = alrao.log_weights(state.opt_state)
  assert float(weights[0]) > float(weights[1]) > float(weights[3])
  for new, old in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True
  ):
    assert (new != old).any()


@pytest.mark.parametrize("name", WRAPPERS)
def test_nnx_optimizer_takes_every_wrapper_that_hands_over_arguments(name):
  with jax.numpy_dtype_promotion("standard"):
    check_nnx_optimizer(WRAPPERS[name](jax.random.key(0)))


def check_nnx_optimizer(tx):
  model = NnxClassifier(nnx.Rngs(0))
  before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
  optimizer.update(
    model, grads, head_log_likelihoods=jnp.array([-1.0, -2.0, -3.0, -4.0])
  )
  weights = alrao.log_weights(optimizer.opt_state)
  assert float(weights[0]) > float(weights[1]) > float(weights[3])
  after = nnx.state(model, nnx.Param)
  for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
    assert (new != old).any()


def test_train_state_refuses_a_wrapper_that_takes_no_arguments():
  tx = optax.lookahead(alrao.alrao(jax.random.key(0)), 5, 0.5)
  heads = {"out": {"alrao_heads": {"bias": jnp.ones((2, 3))}}}
  params: dict = {"params": optax.LookaheadParams.init_synced(heads)}
  state = alrao.linen.TrainState.create(apply_fn=None, params=params["params"], tx=tx)
  with pytest.raises(TypeError, match="such as optax.lookahead, go inside"):
    state.apply_gradients(grads=heads, head_log_likelihoods=jnp.zeros(2))


def test_train_state_trains_and_keeps_everything_in_opt_state(batch):
  model = Classifier()
  params = model.init(jax.random.key(3), batch[0])["params"]
  state, losses = train_linen(model, params, batch)
  assert losses[-1] < 0.7 * losses[0]
  assert int(state.step) == 20
  assert alrao.log_weights(state.opt_state).shape == (NUM_HEADS,)


def test_flax_train_state_drops_the_argument_and_the_error_names_ours(batch):
  from flax.training import train_state

  model = Classifier()
  params = model.init(jax.random.key(3), batch[0])["params"]
  state = train_state.TrainState.create(
    apply_fn=model.apply, params=params, tx=alrao.alrao(jax.random.key(0))
  )
  with pytest.raises(TypeError, match="alrao_jax.linen.TrainState"):
    state.apply_gradients(grads=params)


def test_nnx_optimizer_trains_and_equals_linen(batch):
  model = NnxClassifier(nnx.Rngs(0))
  linen_params = {
    "Dense_0": {"kernel": model.dense.kernel[...], "bias": model.dense.bias[...]},
    "LayerNorm_0": {"scale": model.norm.scale[...], "bias": model.norm.bias[...]},
    "MultiHead_0": {
      "alrao_heads": {
        "kernel": model.out.alrao_heads.kernel[...],
        "bias": model.out.alrao_heads.bias[...],
      }
    },
  }
  names = {"Dense_0": "dense", "LayerNorm_0": "norm", "MultiHead_0": "out"}
  linen_params = jax.tree.map(jnp.copy, linen_params)
  optimizer, losses = train_nnx(model, batch)
  assert losses[-1] < 0.7 * losses[0]
  # The same network under the same names draws the same rates and takes the same steps.
  renamed = {names[name]: value for name, value in linen_params.items()}

  class Renamed:
    @staticmethod
    def apply(variables, x):
      params = variables["params"]
      back = {name: params[names[name]] for name in names}
      return Classifier().apply({"params": back}, x)

  state, linen_losses = train_linen(Renamed, renamed, batch)
  np.testing.assert_allclose(losses, linen_losses, rtol=1e-4)
  np.testing.assert_allclose(
    alrao.log_weights(optimizer.opt_state),
    alrao.log_weights(state.opt_state),
    atol=1e-3,
  )


def test_rates_of_an_nnx_optimizer_can_be_read_and_written(batch):
  model = NnxClassifier(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, alrao.alrao(jax.random.key(0)), wrt=nnx.Param)
  params = nnx.state(model, nnx.Param)
  rates = alrao.unit_rates(optimizer.opt_state, params)
  halved = jax.tree.map(lambda r: r / 2, rates)
  optimizer.opt_state = nnx.data(
    alrao.with_unit_rates(optimizer.opt_state, params, halved)
  )
  new = alrao.unit_rates(optimizer.opt_state, params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), new, halved)
  assert np.isfinite(train_nnx(model, batch, steps=1)[1]).all()


def test_boxed_linen_parameters_train_like_plain_ones(batch):
  boxed = Classifier(boxed=True)
  params = boxed.init(jax.random.key(3), batch[0])["params"]
  assert isinstance(params["Dense_0"]["kernel"], nn.Partitioned)
  plain = nn.meta.unbox(params)
  one, losses = train_linen(boxed, params, batch, steps=5)
  other, plain_losses = train_linen(Classifier(), plain, batch, steps=5)
  np.testing.assert_allclose(losses, plain_losses, rtol=1e-6)
  one = alrao.unit_rates(one.opt_state, params)
  other = alrao.unit_rates(other.opt_state, plain)
  jax.tree.map(np.testing.assert_array_equal, nn.meta.unbox(one), other)


@pytest.mark.slow
def test_sharded_linen_parameters_keep_rates_of_one_float_a_unit(mesh, batch):
  model = Classifier(boxed=True)
  params = model.init(jax.random.key(3), batch[0])["params"]
  shardings = nn.get_sharding(params, mesh)
  sharded = jax.device_put(nn.meta.unbox(params), nn.meta.unbox(shardings))
  data = tuple(jax.device_put(x, NamedSharding(mesh, P("data"))) for x in batch)
  plain, losses = train_linen(Classifier(), nn.meta.unbox(params), batch, steps=5)
  state, sharded_losses = train_linen(Classifier(), sharded, data, steps=5)
  np.testing.assert_allclose(losses, sharded_losses, rtol=1e-5)
  for one, other in zip(
    jax.tree.leaves(plain.params), jax.tree.leaves(state.params), strict=True
  ):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
  rates = optax.tree.get(state.opt_state, "quantiles")
  assert rates.shape == (8 + 8,)
  fresh = optax.tree.get(state.tx.init(sharded), "quantiles")
  assert fresh.sharding.is_fully_replicated


def test_sharded_nnx_parameters_train_under_nnx_optimizer(mesh, batch):
  _, losses = train_nnx(NnxClassifier(nnx.Rngs(0)), batch, steps=5)
  with jax.set_mesh(mesh):
    model = NnxClassifier(nnx.Rngs(0), sharding=(None, "model"))
    assert not model.dense.kernel.get_value().sharding.is_fully_replicated
    data = tuple(jax.device_put(x, NamedSharding(mesh, P("data"))) for x in batch)
    optimizer, sharded_losses = train_nnx(model, data, steps=5)
  np.testing.assert_allclose(losses, sharded_losses, rtol=1e-5)
  rates = find_state(optimizer.opt_state, alrao.ScaleByUnitRatesState, "").quantiles
  assert rates.shape == (8 + 8,)
