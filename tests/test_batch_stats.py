"""The statistics of batch normalisation, recomputed: exact means over the batches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import alrao_jax.linen
import alrao_jax.nnx

SIZES = (4, 4, 2)
BATCHES = [
  {"image": np.random.default_rng(i).normal(3, 2, size=(n, 5)).astype(np.float32)}
  for i, n in enumerate(SIZES)
]
MOMENTA = (0.999, 0.5)


class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.BatchNorm(use_running_average=not train, momentum=MOMENTA[0])(x)
    x = nn.Dense(3)(x)
    head = nn.BatchNorm(use_running_average=not train, momentum=MOMENTA[1])
    return alrao_jax.linen.MultiHead(head, num_heads=2, name="out")(x)


def train(variables, batch):
  return Net().apply(variables, batch["image"], train=True, mutable=["batch_stats"])


@pytest.fixture(scope="module")
def variables():
  return jax.jit(Net().init, static_argnames="train")(
    jax.random.key(0), BATCHES[0]["image"], train=False
  )


def expected(values):
  """Means over batches, of their means and of their variances, weighted by size."""
  share = np.array(SIZES) / sum(SIZES)
  return {
    "mean": np.tensordot(share, [x.mean(axis=0) for x in values], 1),
    "var": np.tensordot(share, [x.var(axis=0) for x in values], 1),
  }


def test_statistics_are_the_means_of_those_of_the_batches(variables):
  found = alrao_jax.linen.recompute_batch_stats(train, variables, iter(BATCHES))
  images = [batch["image"] for batch in BATCHES]
  hidden = [
    (x - x.mean(axis=0))
    / np.sqrt(x.var(axis=0) + 1e-5)
    @ np.diag(np.asarray(variables["params"]["BatchNorm_0"]["scale"]))
    @ np.asarray(variables["params"]["Dense_0"]["kernel"])
    for x in images
  ]
  for path, values in ((("BatchNorm_0",), images), (("out", "alrao_heads"), hidden)):
    stats = found["batch_stats"]
    for name in path:
      stats = stats[name]
    for name, value in expected(values).items():
      each = np.broadcast_to(value, stats[name].shape)  # both heads see the same
      np.testing.assert_allclose(stats[name], each, rtol=2e-5, atol=1e-5)
  assert found["params"] is variables["params"]


def test_what_was_there_before_has_no_part(variables):
  stats = jax.tree.map(lambda x: x + 7, variables["batch_stats"])
  before = {**variables, "batch_stats": stats}
  one, other = (
    alrao_jax.linen.recompute_batch_stats(train, each, BATCHES[:1])
    for each in (variables, before)
  )
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_what_is_no_running_average_stays():
  class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.SpectralNorm(nn.Dense(4))(x, update_stats=True)
      return nn.BatchNorm(use_running_average=False)(x)

  model, x = Spectral(), BATCHES[0]["image"]
  variables = jax.jit(model.init)(jax.random.key(0), x)
  found = alrao_jax.linen.recompute_batch_stats(
    lambda variables, x: model.apply(variables, x, mutable=["batch_stats"]),
    variables,
    [x],
  )
  before, after = (each["batch_stats"] for each in (variables, found))
  name = "Dense_0/kernel/u"
  np.testing.assert_array_equal(
    after["SpectralNorm_0"][name], before["SpectralNorm_0"][name]
  )
  assert jnp.isfinite(after["SpectralNorm_0"]["Dense_0/kernel/sigma"])
  outputs = model.apply(found, x, mutable=["batch_stats"])
  np.testing.assert_allclose(  # as one step after the same statistics
    after["BatchNorm_0"]["mean"],
    100 * (outputs[1]["batch_stats"]["BatchNorm_0"]["mean"]
           - 0.99 * after["BatchNorm_0"]["mean"]),
    atol=1e-4,
  )  # fmt: skip


class Model(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.BatchNorm(5, momentum=MOMENTA[0], rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.dropout(self.norm(x))


def test_nnx_recomputes_in_a_copy_and_in_training_mode():
  model = Model(nnx.Rngs(0))
  model.eval()
  found = alrao_jax.nnx.recompute_batch_stats(
    lambda model, batch: model(batch["image"]), model, BATCHES
  )
  assert isinstance(found, Model) and found.norm.use_running_average
  for name, value in expected([batch["image"] for batch in BATCHES]).items():
    np.testing.assert_allclose(getattr(found.norm, name)[...], value, rtol=2e-5)
  assert not model.norm.mean[...].any()


def test_refuses_no_batch_no_statistics_and_no_training(variables):
  recompute = alrao_jax.linen.recompute_batch_stats
  with pytest.raises(ValueError, match="at least one batch"):
    recompute(train, variables, [])
  with pytest.raises(ValueError, match="'batch_stats'"):
    recompute(train, {"params": variables["params"]}, BATCHES)
  with pytest.raises(ValueError, match="training mode"):
    recompute(lambda variables, batch: (None, variables), variables, BATCHES)
  with pytest.raises(ValueError, match=r"nnx\.BatchStat"):
    alrao_jax.nnx.recompute_batch_stats(
      lambda model, x: None, nnx.Linear(2, 2, rngs=nnx.Rngs(0)), BATCHES
    )


def test_a_channel_that_is_not_finite_or_huge_leaves_the_others_theirs():
  norm = nn.BatchNorm(use_running_average=False, momentum=0.9)
  batch = jnp.array([[1.0, jnp.nan, 0.0], [3.0, jnp.nan, 1e5]])
  batch = jnp.concatenate([batch, batch[:, :1], batch[:, :1] + 1], axis=1)
  variables = norm.init(jax.random.key(0), batch)
  found = alrao_jax.linen.recompute_batch_stats(
    lambda variables, x: norm.apply(variables, x, mutable=["batch_stats"]),
    variables,
    [batch],
  )["batch_stats"]
  mean, var = found["mean"], found["var"]
  np.testing.assert_allclose(mean, [2.0, jnp.nan, 5e4, 2.0, 3.0], rtol=1e-5)
  np.testing.assert_allclose(var, [1.0, jnp.nan, 2.5e9, 1.0, 1.0], rtol=1e-4)
