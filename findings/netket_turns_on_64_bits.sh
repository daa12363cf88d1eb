#!/usr/bin/env bash
# Importing NetKet turns on 64-bit mode for the whole process.
#
# A script that imports netket after its own arrays were made in float32 makes all later
# ones in float64, also those that have nothing to do with NetKet. Nothing is printed.
#
# Versions: netket 3.23.0, jax 0.12.0.1, Python 3.12.
#
# Output seen:
#   before: float32, after: float64
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

found = (str(before), str(after))
assert found == ("float32", "float64"), f"the behaviour has changed: {found}"
PYTHON
