#!/usr/bin/env bash
# optax.contrib.scale_by_muon() fails on any tree of matrices, unless it is told dimensions.
#
# Versions: optax 0.2.8 with jax 0.10.2, Python 3.11.
# Its documentation says that weight_dimension_numbers=None, the default, "implies that all
# parameters are 2D matrices". The update maps over the momenta and this None together, and
# None is no tree like a dict of two matrices. A single array passes. A function that returns
# MuonDimensionNumbers() for every leaf is the way around.
#
# Output seen:
#   one array: updated
#   dict of two, default: ValueError
#   dict of two, MuonDimensionNumbers() for each: updated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "optax==0.2.8" "jax==0.10.2"
"$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import optax

assert (optax.__version__, jax.__version__) == ("0.2.8", "0.10.2")
matrix = jnp.ones((3, 2))
two = {"a": matrix, "b": matrix}


def told(tree):
  return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), tree)


def outcome(tree, **options):
  muon = optax.contrib.scale_by_muon(**options)
  try:
    muon.update(tree, muon.init(tree), tree)
  except ValueError:
    return "ValueError"
  return "updated"


cases = (
  ("one array", outcome(matrix), "updated"),
  ("dict of two, default", outcome(two), "ValueError"),
  (
    "dict of two, MuonDimensionNumbers() for each",
    outcome(two, weight_dimension_numbers=told),
    "updated",
  ),
)
for name, found, expected in cases:
  print(f"{name}: {found}")
  assert found == expected, "the behaviour has changed"
PYTHON
