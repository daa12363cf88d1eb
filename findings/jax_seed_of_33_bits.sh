#!/usr/bin/env bash
# jax.random.key(2**32) is jax.random.key(0): without 64-bit mode a seed loses its high bits.
#
# Versions: jax 0.10.2 (also seen with jax 0.12.0.1), Python 3.11 and newer.
# A threefry key has 64 bits, and key(2**63) raises OverflowError, so that one takes every
# smaller seed to count. With jax_enable_x64 off (the default) only the low 32 bits do:
# seeds made from a clock in nanoseconds or a hash collide, with no error and no warning.
# A negative seed loses its sign in the same way: key(-1) is key(2**32 - 1).
#
# Output seen:
#   32-bit mode: key(2**32 + 7) == key(7): True, key(-1) == key(2**32 - 1): True
#   64-bit mode: key(2**32 + 7) == key(7): False, key(-1) == key(2**32 - 1): False
#   key(2**63): OverflowError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "jax==0.10.2"
"$folder/venv/bin/python" - <<'PYTHON'
import jax

assert jax.__version__ == "0.10.2"


def equal(one, other):
  one, other = (jax.random.key_data(jax.random.key(seed)) for seed in (one, other))
  return bool((one == other).all())


for wide, expected in ((False, True), (True, False)):
  jax.config.update("jax_enable_x64", wide)
  high, negative = equal(2**32 + 7, 7), equal(-1, 2**32 - 1)
  bits = 64 if wide else 32
  print(f"{bits}-bit mode: key(2**32 + 7) == key(7): {high},", end=" ")
  print(f"key(-1) == key(2**32 - 1): {negative}")
  assert (high, negative) == (expected, expected), "the behaviour has changed"
try:
  jax.random.key(2**63)
except OverflowError:
  print("key(2**63): OverflowError")
else:
  raise SystemExit("the behaviour has changed: key(2**63) raises nothing")
PYTHON
