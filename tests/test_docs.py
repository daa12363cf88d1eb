"""The code in docs/ runs as it stands there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import alrao_jax as alrao

UNITS = Path(__file__).resolve().parent.parent / "docs" / "units.md"
NUM_HEADS = 3


def code_blocks(section):
  text = UNITS.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
  return re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)


def make_params():
  kernels = jax.random.normal(jax.random.key(1), (NUM_HEADS, 4, 2))
  return {
    "backbone": {"kernel": jax.random.normal(jax.random.key(0), (3, 4))},
    "output": {"alrao_heads": {"kernel": kernels}},
  }


def make_train(trained):
  """A `train` that notes its optimizer, and parameters and state after each phase."""
  inputs = jax.random.normal(jax.random.key(2), (8, 3))
  labels = jnp.arange(8) % 2

  def train(optimizer, params, opt_state):
    trained.append((optimizer, params, opt_state))

    @jax.jit
    def step(params, opt_state):
      def loss_fn(params):
        heads = alrao.multi_head(
          lambda head, x: x @ head["kernel"],
          params["output"]["alrao_heads"],
          jnp.tanh(inputs @ params["backbone"]["kernel"]),
        )
        weights = alrao.log_weights(opt_state)
        return alrao.classification_loss(heads, labels, weights)

      grads, info = jax.grad(loss_fn, has_aux=True)(params)
      updates, new = optimizer.update(
        grads, opt_state, params, head_log_likelihoods=info.head_log_likelihoods
      )
      return optax.apply_updates(params, updates), new

    for _ in range(5):
      params, opt_state = step(params, opt_state)
    trained.append((optimizer, params, opt_state))
    return params, opt_state

  return train


@pytest.mark.parametrize("way", [0, 1], ids=["mask", "posterior"])
def test_unfreezing_goes_on_with_posterior_and_rates(way):
  block = code_blocks("Unfreezing in mid-training")[way]
  start, phases = make_params(), []
  names = {
    "alrao": alrao,
    "jax": jax,
    "optax": optax,
    "key": jax.random.key(0),
    "params": start,
    "train": make_train(phases),
  }
  exec(compile(block, str(UNITS), "exec"), names)
  (_, _, _), (_, frozen, before), (_, unfrozen, after), (_, end, _) = phases
  np.testing.assert_array_equal(
    frozen["backbone"]["kernel"], start["backbone"]["kernel"]
  )
  heads = "output", "alrao_heads", "kernel"
  assert (at(frozen, *heads) != at(start, *heads)).any()
  # The posterior goes on; it was uniform at the start.
  weights = alrao.log_weights(before)
  assert np.ptp(weights) > 0
  np.testing.assert_array_equal(alrao.log_weights(after), weights)
  # The rates are those of an optimizer that never froze anything.
  whole = names["optimizer"].init(start)
  jax.tree.map(
    np.testing.assert_array_equal,
    alrao.unit_rates(after, unfrozen),
    alrao.unit_rates(whole, start),
  )
  assert (end["backbone"]["kernel"] != start["backbone"]["kernel"]).any(axis=0).all()


def test_complex_parameters_train():
  (block,) = code_blocks("Complex parameters")

  def normal(seed, *shape):
    real, imaginary = jax.random.normal(jax.random.key(seed), (2, *shape))
    return jax.lax.complex(real, imaginary)

  names = {"alrao": alrao, "jax": jax, "jnp": jnp, "optax": optax}
  names |= {"key": jax.random.key(0), "inputs": normal(0, 8, 3)}
  names |= {"labels": jnp.arange(8) % 2, "kernel": normal(1, 3, 4)}
  names |= {"bias": jnp.zeros(4, jnp.complex64), "heads": normal(2, NUM_HEADS, 4, 2)}
  with jax.numpy_rank_promotion("allow"):
    exec(compile(block, str(UNITS), "exec"), names)
    params, opt_state = names["params"], names["opt_state"]
    losses = []
    for _ in range(30):
      params, opt_state, loss = names["step"](params, opt_state)
      losses.append(float(loss))
  assert losses[-1] < 0.5 * losses[0]


def at(tree, *names):
  for name in names:
    tree = tree[name]
  return tree
