"""Whole training steps against traces of the authors' implementation, in float64.

Same data, initial parameters and rates; the same losses, posteriors and parameters
must come out. The traces (`golden/traces.npz`, see `golden/cut.py`) end after 50 steps.
Up to step 10, agreement is to 1e-11 of the largest entry; after 50 steps, to ten times
what a relative change of 1e-13 at the start makes of itself by then, at least 1e-9.

Where the authors' code and the papers differ, this library follows the papers. These
differences are documented, and no targets here:

- momentum: the authors' internal layers have a rule of their own,
  ``buf <- buf (1 - m min(sqrt(eta), 1/m)) + g``; here it is optax's ordinary trace;
- Adam: the authors' two Adams place eps differently, so only traces with a vanishing
  eps can be compared; and AMSGrad is left to optax;
- catch-up, which resets heads below weight e^-20: there is none, for the prior never
  lets them reach it;
- several regression outputs: the authors' loss lacks the constant
  ``(D - 1)/2 log(2 pi sigma^2)`` a head, so losses differ by it, and nothing else does;
- a head whose loss is infinite is left out of the mixture as a whole, where the
  authors' average still counts the examples on which it is finite;
- rates: one vector a layer for all gates of an LSTM (the authors draw apart per gate,
  and for input and recurrent weights), and one for a norm layer's scale and bias (the
  authors draw them apart). Layers unknown to the authors' generator get a rate for
  every weight there, and one a unit here.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import cut

import alrao_jax as alrao
import alrao_jax.linen

STEPS = (1, 2, 10, 50)
ARRAYS = ("W1", "b1", "W2", "b2", "Wh", "bh")
WEIGHT_DECAY = 1e-3


class Variant(NamedTuple):
  """A training run of the reference.

  Attributes:
    file: Where its results are.
    name: Its name there.
    theta: Of the switch.
    base: What stands before the rates.
    num_heads: The first so many heads are used; None: all.
    noise_scale: Of a regression's heads; None: a classifier.
    data: Where data and initial parameters are; None: in `file`.
    rates: What its rates are called.
  """

  file: str
  name: str
  theta: float = 0.9999
  base: optax.GradientTransformation | None = None
  num_heads: int | None = None
  noise_scale: float | None = None
  data: str | None = None
  rates: str = "lr"


CLASS, ADAM = "public_mlp_class", "public_mlp_class_adam"
D1, D3, NOISY = (f"public_mlp_reg_{x}" for x in ("D1", "D3", "D3_s2_0.25"))
_ADAM = optax.scale_by_adam(eps=1e-30)
# Coupled weight decay: added to the gradient, ahead of everything.
_DECAY = optax.add_decayed_weights(WEIGHT_DECAY)
VARIANTS = [
  Variant(CLASS, "sgd"),
  Variant(CLASS, "sgd_theta0.999", theta=0.999),
  Variant(CLASS, "sgd_wd", base=_DECAY),
  Variant(CLASS, "sgd_n1", num_heads=1),
  Variant(CLASS, "sgd_n2", num_heads=2),
  Variant(ADAM, "adam_eps1e-30", base=_ADAM, data=CLASS, rates="lr_adam"),
  Variant(
    ADAM,
    "adam_eps1e-30_wd",
    base=optax.chain(_DECAY, _ADAM),
    data=CLASS,
    rates="lr_adam",
  ),
  Variant(D1, "sgd", noise_scale=1.0),
  Variant(D1, "sgd_n1", num_heads=1, noise_scale=1.0),
  Variant(D3, "sgd", noise_scale=1.0),
  Variant(D3, "sgd_n1", num_heads=1, noise_scale=1.0),
  Variant(NOISY, "sgd", noise_scale=0.5),
  Variant(NOISY, "sgd_n1", num_heads=1, noise_scale=0.5),
]


@pytest.fixture(scope="module")
def traces():
  with np.load(cut.HERE / "traces.npz") as kept:
    return dict(kept)


class MLP(nn.Module):
  widths: tuple[int, int]
  outputs: int
  num_heads: int

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(self.widths[0], param_dtype=x.dtype)(x))
    x = nn.relu(nn.Dense(self.widths[1], param_dtype=x.dtype)(x))
    head = nn.Dense(self.outputs, param_dtype=x.dtype)
    return alrao_jax.linen.MultiHead(head, num_heads=self.num_heads, name="out")(x)


def _tree(arrays, num_heads):
  """The reference's arrays as this model's parameters: kernels are transposed."""
  kernel, bias = arrays["Wh"][:num_heads], arrays["bh"][:num_heads]
  tree = {
    "Dense_0": {"kernel": arrays["W1"].T, "bias": arrays["b1"]},
    "Dense_1": {"kernel": arrays["W2"].T, "bias": arrays["b2"]},
    "out": {"alrao_heads": {"kernel": kernel.transpose(0, 2, 1), "bias": bias}},
  }
  return jax.tree.map(jnp.asarray, tree)


def _start(traces, variant):
  """Initial parameters and the rate of each entry."""
  where = variant.data or variant.file
  init = {k: traces[f"{where}/init/{k}"] for k in ARRAYS}
  rates = {k: traces[f"{variant.file}/{variant.rates}/{k}"] for k in ARRAYS[:4]}
  ladder = traces[f"{variant.file}/{variant.rates}/heads"]
  rates["Wh"] = np.ones_like(init["Wh"]) * ladder[:, None, None]
  rates["bh"] = np.ones_like(init["bh"]) * ladder[:, None]
  return _tree(init, variant.num_heads), _tree(rates, variant.num_heads)


class Run(NamedTuple):
  """What happened, one entry a step."""

  losses: np.ndarray
  head_log_likelihoods: np.ndarray
  log_weights: np.ndarray
  params: dict


def _train(traces, variant, params, rates, optimizer):
  """Trains as a user would."""
  where = variant.data or variant.file
  num_heads, features, outputs = params["out"]["alrao_heads"]["kernel"].shape
  model = MLP((params["Dense_0"]["bias"].size, features), outputs, num_heads)
  opt_state = optimizer.init(params)
  opt_state = alrao.with_unit_rates(opt_state, params, rates)

  def train_step(carry, batch):
    params, opt_state = carry
    x, y = batch

    def loss_fn(params):
      heads = model.apply({"params": params}, x)
      log_weights = alrao.log_weights(opt_state)
      if variant.noise_scale is None:
        return alrao.classification_loss(heads, y, log_weights)
      noise = variant.noise_scale
      return alrao.regression_loss(heads, y, log_weights, noise_scale=noise)

    (loss, info), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(
      grads, opt_state, params, head_log_likelihoods=info.head_log_likelihoods
    )
    params = optax.apply_updates(params, updates)
    log_weights = alrao.log_weights(opt_state)
    return (params, opt_state), Run(
      loss, info.head_log_likelihoods, log_weights, params
    )

  batches = jnp.asarray(traces[f"{where}/x"]), jnp.asarray(traces[f"{where}/y"])
  scan = jax.jit(lambda carry: jax.lax.scan(train_step, carry, batches)[1])
  return jax.tree.map(np.asarray, scan((params, opt_state)))


def _alrao(variant):
  # Drawn over an interval of its own; the reference's rates are written over it.
  averaging = alrao.switch(variant.theta)
  return alrao.alrao(jax.random.key(0), variant.base, averaging=averaging)


def _distance(got, expected):
  """Largest difference, relative to the largest entry."""
  got, expected = np.asarray(got), np.asarray(expected)
  assert got.dtype == expected.dtype == np.float64
  return np.abs(got - expected).max() / np.abs(expected).max()


def _check(traces, variant, run):
  name = f"{variant.file}/{variant.name}"
  per_1e13, moved_posterior = traces[f"{name}/sensitivity"]

  def tolerance(step, sensitivity=per_1e13):
    return 1e-11 if step <= 10 else max(1e-9, 10 * sensitivity)

  constant = 0.0
  if variant.noise_scale is not None:
    outputs = run.params["out"]["alrao_heads"]["bias"].shape[-1]
    constant = (outputs - 1) / 2 * math.log(2 * math.pi * variant.noise_scale**2)
  for i in range(50):
    loss, head_loss = traces[f"{name}/loss"][i], traces[f"{name}/head_loss"][i]
    assert _distance(run.losses[i] - constant, loss) <= tolerance(i + 1)
    own = -run.head_log_likelihoods[i] - constant
    assert _distance(own, head_loss) <= tolerance(i + 1)
    # Logarithms, so that the absolute difference is a relative one of the weights.
    difference = run.log_weights[i] - traces[f"{name}/logposterior"][i + 1]
    assert np.abs(difference).max() <= tolerance(i + 1, moved_posterior)
  for step in STEPS:
    expected = {k: traces[f"{name}/step{step}/{k}"] for k in ARRAYS}
    expected = _tree(expected, variant.num_heads)
    params = jax.tree.map(lambda leaf, i=step - 1: leaf[i], run.params)
    for distance in jax.tree.leaves(jax.tree.map(_distance, params, expected)):
      assert distance <= tolerance(step)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.file}-{v.name}")
def test_training_equals_the_reference(traces, variant):
  # Optax's Adam itself mixes types.
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    params, rates = _start(traces, variant)
    run = _train(traces, variant, params, rates, _alrao(variant))
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(run))
    _check(traces, variant, run)


def test_a_chain_of_the_parts_equals_the_reference(traces):
  variant = VARIANTS[2]
  optimizer = optax.chain(
    optax.add_decayed_weights(WEIGHT_DECAY),
    alrao.scale_by_unit_rates(jax.random.key(1), 0.1, 1.0),
    alrao.track_heads(alrao.switch(variant.theta)),
  )
  with jax.enable_x64(True):
    params, rates = _start(traces, variant)
    _check(traces, variant, _train(traces, variant, params, rates, optimizer))


@pytest.mark.parametrize(
  ("file", "interval"), [(CLASS, (1e-5, 10.0)), (D1, (1e-4, 0.1)), (D3, (1e-4, 0.1))]
)
def test_the_ladder_of_the_heads_equals_the_reference(traces, file, interval):
  with jax.enable_x64(True):
    params, _ = _start(traces, Variant(file, "sgd"))
    opt_state = alrao.alrao(jax.random.key(0), None, *interval).init(params)
    rates = alrao.unit_rates(opt_state, params)
    ladder = rates["out"]["alrao_heads"]["bias"][:, 0]
  np.testing.assert_allclose(ladder, traces[f"{file}/lr/heads"], rtol=1e-14)


def test_the_reference_shares_rates_as_here(traces):
  """Its rates can be written and read back, so no unit there is finer than here."""
  with jax.enable_x64(True):
    params, rates = _start(traces, VARIANTS[0])
    opt_state = alrao.alrao(jax.random.key(0)).init(params)
    drawn = alrao.unit_rates(opt_state, params)
    opt_state = alrao.with_unit_rates(opt_state, params, rates)
    got = alrao.unit_rates(opt_state, params)
  for leaf, expected in zip(*map(jax.tree.leaves, (got, rates)), strict=True):
    np.testing.assert_allclose(leaf, expected, rtol=1e-14)
  # Nor coarser: as many rates differ.
  for leaf, expected in zip(*map(jax.tree.leaves, (drawn, rates)), strict=True):
    assert np.unique(leaf).size == np.unique(expected).size
