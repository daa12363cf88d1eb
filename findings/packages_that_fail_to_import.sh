#!/usr/bin/env bash
# Four packages can't be imported beside the JAX or Equinox that pip gives them.
#
# Each was installed by pip alone, which found no conflict, since each asks for "at
# least" a version. What they import has gone since:
#   bijx 1.3.2 (asks for jax>=0.5): jax.experimental.ode no longer has api_util.
#   neural-tangents 0.6.5 (jax>=0.4.16): jax.core no longer has Jaxpr.
#   eqxvision 0.2.8 (equinox>=0.7.0): equinox.experimental is gone.
#   deepvit-flax 0.0.3: its __init__ imports DeepVIT, which is spelled DeepViT; this one
#   fails with every version of what it needs.
# An upper bound, or a test of the newest versions, would have shown the first three.
#
# Versions: jax 0.12.0.1, equinox 0.13.8, flax 0.12.12, Python 3.12.
#
# Output seen:
#   bijx: ImportError: cannot import name 'api_util' from 'jax.experimental.ode'
#   neural_tangents: ImportError: cannot import name 'Jaxpr' from 'jax.core'
#   eqxvision: ModuleNotFoundError: No module named 'equinox.experimental'
#   deepvit_flax: ImportError: cannot import name 'DeepVIT' from 'deepvit_flax.deepvit'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "jax==0.12.0.1" "equinox==0.13.8" \
  "flax==0.12.12" "bijx==1.3.2" "neural-tangents==0.6.5" "eqxvision==0.2.8" \
  "deepvit-flax==0.0.3"
"$folder/venv/bin/python" - <<'PYTHON'
import importlib

for name, gone in (
  ("bijx", "api_util"),
  ("neural_tangents", "Jaxpr"),
  ("eqxvision", "equinox.experimental"),
  ("deepvit_flax", "DeepVIT"),
):
  try:
    importlib.import_module(name)
  except ImportError as error:
    print(f"{name}: {type(error).__name__}: {str(error).split(' (')[0]}")
    assert gone in str(error), "the behaviour has changed"
  else:
    raise AssertionError(f"{name} can be imported again")
PYTHON
