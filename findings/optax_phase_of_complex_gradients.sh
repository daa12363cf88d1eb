#!/usr/bin/env bash
# optax's adadelta, prodigy and dadapt_adamw lose the phase of complex gradients.
#
# Versions: optax 0.2.8, jax 0.10.2 (also seen with jax 0.12.0.1), Python 3.11 and newer.
# optax documents complex parameters for many of its transformations, and adam, adagrad,
# rmsprop, dog and dowg move a complex parameter against its (conjugated) gradient. These
# three square a gradient as g * g where |g|^2 is meant: the square root of a complex
# average divides the phase away. A gradient that points along the imaginary axis moves
# the parameter along the real one, with no error and no warning.
#
# Output seen (the update for a gradient of 1j, three steps):
#   adam          along the imaginary axis
#   adadelta      along the real axis
#   prodigy       along the real axis
#   dadapt_adamw  along the real axis
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


def direction(optimizer):
  params = jnp.array([1 + 1j, 2 - 1j], jnp.complex64)
  grads = jnp.array([1j, 1j], jnp.complex64)
  state = optimizer.init(params)
  for _ in range(3):
    updates, state = optimizer.update(grads, state, params)
  real, imaginary = abs(updates.real).max(), abs(updates.imag).max()
  return "real" if real > 100 * imaginary else (
    "imaginary" if imaginary > 100 * real else "neither"
  )


expected = {
  "adam": (optax.adam(0.1), "imaginary"),
  "adadelta": (optax.adadelta(1.0), "real"),
  "prodigy": (optax.contrib.prodigy(), "real"),
  "dadapt_adamw": (optax.contrib.dadapt_adamw(), "real"),
}
for name, (optimizer, axis) in expected.items():
  seen = direction(optimizer)
  print(f"{name:13} along the {seen} axis")
  assert seen == axis, f"{name}: the behaviour has changed, expected {axis}"
PYTHON
