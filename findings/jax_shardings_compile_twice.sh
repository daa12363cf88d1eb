#!/usr/bin/env bash
# jax.jit(f, in_shardings=s, out_shardings=s) compiles twice: for new arrays, and for its own results.
#
# Versions: jax 0.10.2 (also seen with jax 0.12.0.1), Python 3.11 and newer.
# in_shardings and out_shardings say where arguments and results are, and out_shardings
# equal in_shardings so that a training step takes its own results. Yet the first call, with
# arrays that are on no mesh, and the second, with the results of the first, are traced and
# compiled apart: the type of a placed array names its mesh, also where in_shardings say it.
# A step that takes minutes to compile takes them twice. Arrays that are placed before the
# first call (jax.device_put(x, s)) compile once.
#
# Output seen:
#   new arrays: compiled 1 at the first call, 1 at the second, 0 at the third
#   placed arrays: compiled 1 at the first call, 0 at the second, 0 at the third
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "jax==0.10.2"
"$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

assert jax.__version__ == "0.10.2"
jax.config.update("jax_num_cpu_devices", 4)
mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("data"))
compiled = []
jax.monitoring.register_event_duration_secs_listener(
  lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
)


def counts(state):
  """How often each of three steps compiles."""
  step = jax.jit(lambda x: jnp.sin(x) + 1, in_shardings=sharding, out_shardings=sharding)
  found = []
  for _ in range(3):
    compiled.clear()
    state = jax.block_until_ready(step(state))
    found.append(len(compiled))
  return found


for name, state, expected in (
  ("new", jnp.ones(8), [1, 1, 0]),
  ("placed", jax.device_put(jnp.ones(8), sharding), [1, 0, 0]),
):
  found = counts(state)
  print(
    f"{name} arrays: compiled {found[0]} at the first call, {found[1]} at the second, "
    f"{found[2]} at the third"
  )
  assert found == expected, "the behaviour has changed"
PYTHON
