#!/usr/bin/env bash
# Importing NetKet turns on 64-bit mode for the whole process, and some of its models
# have complex parameters by default.
#
# A script that imports netket after its own arrays were made in float32 makes all later
# ones in float64, also those that have nothing to do with NetKet. models.Jastrow and
# models.LogStateVector have complex128 parameters unless param_dtype says otherwise,
# where models.RBM has float64: gradients must be conjugated before an optimizer of optax
# gets them.
#
# Versions: netket 3.23.0, jax 0.12.0.1, Python 3.12.
#
# Output seen:
#   before: float32, after: float64
#   RBM: float64, Jastrow: complex128
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "jax==0.12.0.1" "netket==3.23.0"
"$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp

before = jnp.zeros(3).dtype
import netket

after = jnp.zeros(3).dtype
print(f"before: {before}, after: {after}")


def dtype(model):
  params = model.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
  return jax.tree.leaves(params)[0].dtype


rbm, jastrow = dtype(netket.models.RBM()), dtype(netket.models.Jastrow())
print(f"RBM: {rbm}, Jastrow: {jastrow}")
found = tuple(map(str, (before, after, rbm, jastrow)))
expected = ("float32", "float64", "float64", "complex128")
assert found == expected, "the behaviour has changed"
PYTHON
