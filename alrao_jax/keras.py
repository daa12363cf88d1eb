"""The units of a Keras model's variables, which have names where its tree has none."""

from typing import Any

import jax
import jax.numpy as jnp

from ._rules import Override, Units
from ._units import UnitOptions, unit_specs


def unit_overrides(model: Any) -> tuple[Override, ...]:
  """Overrides for the list of a Keras model's trainable variables.

  A loop of one's own in JAX trains ``[v.value for v in model.trainable_variables]``, a
  list without names. The variables' paths tell which are one layer's. For a dict by
  path, ``{v.path: v.value for v in model.trainable_variables}``, none are needed.

  Args:
    model: A built Keras model, or a layer.

  Returns:
    The overrides for ``alrao_jax.UnitOptions(overrides)``, one for each variable.

  Raises:
    ValueError: The model is not built; or as :func:`alrao_jax.unit_specs`.

  Example:
    >>> import alrao_jax.keras
    >>> from types import SimpleNamespace as Variable
    >>> kernel = Variable(path="dense/kernel", shape=(3, 5))
    >>> bias = Variable(path="dense/bias", shape=(5,))
    >>> model = Variable(trainable_variables=[kernel, bias])
    >>> alrao_jax.keras.unit_overrides(model)[0]
    ('^0$', Units(axes=(1,), group='dense', tiles=1))
  """
  variables = list(model.trainable_variables)
  if not variables:
    raise ValueError(
      "unit_overrides() needs a model with trainable variables, got none. Call the "
      "model once, or model.build(input_shape)."
    )
  tree = {v.path: jax.ShapeDtypeStruct(tuple(v.shape), jnp.float32) for v in variables}
  if len(tree) < len(variables):
    raise ValueError(
      "unit_overrides() needs variables with different paths, got two of the same. "
      "Give the model's layers different names."
    )
  specs = unit_specs(tree, UnitOptions())
  return tuple(
    (f"^{index}$", Units(specs[v.path].axes, specs[v.path].group, specs[v.path].tiles))
    for index, v in enumerate(variables)
  )
