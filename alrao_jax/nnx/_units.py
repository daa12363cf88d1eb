"""Units that the types of flax.nnx's modules tell, and the shapes alone do not."""

from flax import nnx

from .._overrides import Known, einsum_kernel, overrides_from
from .._units import Override


def unit_overrides(model: nnx.Module) -> tuple[Override, ...]:
  """Overrides for units that the types of a model's modules tell, and shapes don't.

  They name the parameters of: ``nnx.LinearGeneral`` with several features and
  ``nnx.Einsum``, without bias or with permuted axes; ``nnx.ConvTranspose`` with
  ``transpose_kernel``, square or without bias; layers without bias and embeddings that
  are stacked by ``nnx.vmap`` or ``nnx.scan``. All else is left to the rules.

  Args:
    model: A module; ``nnx.eval_shape(lambda: Model(rngs=nnx.Rngs(0)))`` will do.

  Returns:
    The ``overrides`` of ``alrao_jax.alrao`` and of ``alrao_jax.describe_units``, to
    which others may be added: the first that matches wins.

  Example:
    >>> import alrao_jax.nnx
    >>> from flax import nnx
    >>> model = nnx.LinearGeneral(5, (2, 3), use_bias=False, rngs=nnx.Rngs(0))
    >>> alrao_jax.nnx.unit_overrides(model)
    (('^kernel$', Units(axes=(1, 2), group=None, tiles=1)),)
  """
  known: dict[str, Known] = {}
  for names, module in nnx.iter_modules(model):
    for name, parameter in _own_parameters(module).items():
      known["/".join(map(str, (*names, name)))] = parameter
  return overrides_from(nnx.state(model, nnx.Param), known)


def _own_parameters(module: nnx.Module) -> dict[str, Known]:
  """What a module of Flax knows of the parameters that are its own."""
  match module:
    case nnx.Linear():
      features = module.out_features
      kernel, bias = Known((module.in_features, features)), (features,)
    case nnx.LinearGeneral():
      batch, features = tuple(module.batch_axis.values()), tuple(module.out_features)
      shape, bias = (*batch, *module.in_features, *features), (*batch, *features)
      axes = tuple(range(len(shape)))
      kernel = Known(shape, axes[: len(batch)] + axes[-len(features) :])
    case nnx.Einsum():
      kernel = einsum_kernel(tuple(module.kernel_shape), module.einsum_str)
      bias = tuple(module.bias_shape or ())
    case nnx.Conv() | nnx.ConvTranspose():
      transposed = isinstance(module, nnx.ConvTranspose) and module.transpose_kernel
      rank, bias = len(module.kernel_shape), (module.out_features,)
      kernel = Known(module.kernel_shape, (rank - 2,) if transposed else None)
    case nnx.Embed():
      return {"embedding": Known((module.num_embeddings, module.features))}
    case nnx.LoRA():
      rank = module.lora_a.shape[-1]
      a, b = (module.in_features, rank), (rank, module.out_features)
      return {"lora_a": Known(a), "lora_b": Known(b)}
    case nnx.PReLU():
      return {"negative_slope": Known(())}
    case _:
      return {}
  return {"kernel": kernel, "bias": Known(bias)}
