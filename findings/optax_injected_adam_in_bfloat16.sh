#!/usr/bin/env bash
# optax.inject_hyperparams(optax.scale_by_adam) makes NaN of bfloat16 parameters at step 1.
#
# Versions: optax 0.2.8, jax 0.10.2 (also seen with jax 0.12.0.1), Python 3.11 and newer.
# inject_hyperparams casts every float hyperparameter to the dtype of the parameters. In
# bfloat16 the default b2 = 0.999 is rounded to 1, so that the correction of the second
# moment's bias divides 0 by 1 - 1 = 0. Without inject_hyperparams the same
# transformation gives an update of 1: there b2 stays a Python float.
#
# Output seen:
#   injected b2: 1
#   update with inject_hyperparams: [nan nan]
#   update without: [1 1]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "jax==0.10.2" "optax==0.2.8"
"$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import optax

assert (jax.__version__, optax.__version__) == ("0.10.2", "0.2.8")
params = jnp.ones(2, jnp.bfloat16)
grads = jnp.full(2, 0.1, jnp.bfloat16)


def first_update(transformation):
  state = transformation.init(params)
  updates, _ = transformation.update(grads, state, params)
  return updates, state


injected, state = first_update(optax.inject_hyperparams(optax.scale_by_adam)())
plain, _ = first_update(optax.scale_by_adam())
print("injected b2:", state.hyperparams["b2"])
print("update with inject_hyperparams:", injected)
print("update without:", plain)
changed = "the behaviour has changed"
assert state.hyperparams["b2"] == 1, changed
assert jnp.isnan(injected).all(), changed
assert (plain == 1).all(), changed
PYTHON
