"""The switch against traces of the authors' implementation, run in float64.

A small cut of the traces lies in `golden/traces.npz`, so that these tests run anywhere;
those on the full traces need the folder ALRAO_GOLDEN_DIR (see `golden/cut.py`).

One documented difference: with a single head, the authors' switch stands still, while
here its state moves on (mass settles). The head's weight is 1 in both.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import cut

from alrao_jax import _averaging, _multi_head, _predict

FULL_REGIMES = (
  "allequal",
  "catchup",
  "large_spread",
  "n1",
  "n2",
  "nearzero",
  "neginf",
  "positive",
  "rotating",
  "stationary",
  "verylow_1e4",
)

# Made once, so that each is compiled once.
SWITCHES = {theta: _averaging.switch(theta) for theta in (0.999, 0.9999)}
THETA = pytest.mark.parametrize("theta", SWITCHES)


@pytest.fixture(scope="module")
def small():
  with np.load(cut.HERE / "traces.npz") as traces:
    return dict(traces)


@pytest.fixture(scope="module")
def full():
  path = cut.full_folder() / "public_switch.npz"
  if not path.is_file():
    pytest.skip(f"no full traces at {path} (set ALRAO_GOLDEN_DIR)")
  with np.load(path) as traces:
    return dict(traces)


@functools.partial(jax.jit, static_argnums=0)
def _scan(method, start, log_likelihoods):
  def body(state, row):
    state = method.update(state, row)
    return state, (state, method.log_weights(state))

  return jax.lax.scan(body, start, log_likelihoods)[1]


def _run(log_likelihoods, theta, dtype):
  """States and log-weights before and after each observation."""
  method = SWITCHES[theta]
  start = method.init(log_likelihoods.shape[1], dtype)
  rest = _scan(method, start, jnp.asarray(log_likelihoods, dtype))
  first = (start, method.log_weights(start))
  return jax.tree.map(lambda one, more: np.concatenate([[one], more]), first, rest)


def _check_float64(traces, regime, theta, rows=slice(None)):
  log_likelihoods = traces[f"{regime}/logpx"]
  with jax.enable_x64(True):
    state, log_weights = _run(log_likelihoods, theta, jnp.float64)
  expected = traces[f"{regime}/theta{theta}/f64/logposterior"]
  np.testing.assert_allclose(log_weights[rows], expected, rtol=0, atol=1e-10)
  if log_likelihoods.shape[1] > 1:
    alpha, beta = np.moveaxis(traces[f"{regime}/theta{theta}/f64/logw"], 1, 0)
    np.testing.assert_allclose(state.alpha[rows], alpha, rtol=0, atol=1e-10)
    np.testing.assert_allclose(state.beta[rows], beta, rtol=0, atol=1e-10)


@THETA
@pytest.mark.parametrize("regime", cut.REGIMES)
def test_switch_equals_the_reference(small, regime, theta):
  name = "public_switch/"
  traces = {k.removeprefix(name): v for k, v in small.items() if k.startswith(name)}
  _check_float64(traces, regime, theta, traces["rows"])


@THETA
@pytest.mark.parametrize("regime", FULL_REGIMES)
def test_switch_equals_the_full_reference(full, regime, theta):
  _check_float64(full, regime, theta)
  if regime != "n1":
    np.testing.assert_array_equal(full[f"{regime}/t"], np.arange(1, 502))


@THETA
@pytest.mark.parametrize("regime", FULL_REGIMES)
def test_float32_follows_the_full_reference_in_float32(full, regime, theta):
  _, log_weights = _run(full[f"{regime}/logpx"], theta, jnp.float32)
  expected = full[f"{regime}/theta{theta}/f32/logposterior"]
  # Errors add up at worst, for an update never spreads two sets of log-weights apart:
  # about six roundings a step, of numbers as large as the largest log-weight, in each
  # of the two runs.
  largest = np.abs(full[f"{regime}/theta{theta}/f32/logw"]).max()
  steps = np.arange(1, 502)[:, None]
  bound = 2 * 6 * steps * largest * np.finfo(np.float32).eps / 2
  difference = np.abs(log_weights.astype(np.float64) - expected)
  assert (difference <= bound).all(), (difference / bound).max()


def test_all_regimes_of_the_full_reference_are_tested(full):
  found = {key.split("/")[0] for key in full if key.endswith("/logpx")}
  assert found == set(FULL_REGIMES)


def test_mixture_probabilities_equal_the_reference(small):
  with jax.enable_x64(True):
    # Log-probabilities are logits that a softmax leaves as they are.
    logits = jnp.asarray(small["public_switch/mix/head_logp"])
    heads = _multi_head.HeadOutputs(logits, logits)
    log_weights = jnp.asarray(small["public_switch/mix/logposterior"])
    got = _predict.mixture_log_probs(heads, log_weights)
  expected = small["public_switch/mix/avg_logp"]
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_the_small_traces_are_a_cut_of_the_full_ones(full, small):
  del full  # skips without the folder
  expected = cut.cut(cut.full_folder())
  assert set(expected) == set(small)
  for key, value in expected.items():
    np.testing.assert_array_equal(small[key], value, err_msg=key)
