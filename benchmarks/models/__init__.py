"""The benchmark networks, by name, each a body and an output layer.

Example:
  >>> import jax, jax.numpy as jnp
  >>> model = build_model("small_cnn", width=1 / 4)
  >>> images = jnp.zeros((2, 32, 32, 3))
  >>> variables = fast_init(model, jax.random.key(0), images)
  >>> model.apply(variables, images, train=False).shape
  (2, 10)
"""

import jax.numpy as jnp
from jax.typing import DTypeLike

from benchmarks.models.alexnet import AlexNet
from benchmarks.models.densenet import DenseNet121
from benchmarks.models.googlenet import GoogLeNet
from benchmarks.models.init import fast_init as fast_init
from benchmarks.models.layers import Classifier, Norm
from benchmarks.models.mlp import MLP
from benchmarks.models.mobilenet_v2 import MobileNetV2
from benchmarks.models.resnet import ResNet50
from benchmarks.models.small_cnn import SmallCNN
from benchmarks.models.vgg import VGG19

BODIES = {
  "googlenet": GoogLeNet,
  "mlp": MLP,
  "mobilenet_v2": MobileNetV2,
  "small_cnn": SmallCNN,
  "vgg19": VGG19,
}

# Those for images of 64x64 pixels and more, and how each normalises by default.
IMAGENET_BODIES = {
  "alexnet": (AlexNet, "none"),
  "densenet121": (DenseNet121, "batch"),
  "resnet50": (ResNet50, "batch"),
}


def build_model(
  name: str,
  num_classes: int = 10,
  num_heads: int | None = None,
  width: float = 1.0,
  dtype: DTypeLike = jnp.float32,
  norm: Norm | None = None,
) -> Classifier:
  """Builds a network by name.

  The network is called as ``model.apply(variables, images, train=...)`` with normalised
  images (batch, height, width, channels); with ``train=True`` and batch normalisation,
  also with ``mutable=["batch_stats"]``.

  Args:
    name: ``"googlenet"``, ``"vgg19"``, ``"mobilenet_v2"`` (the papers' three, in their
      forms for 32x32 images), ``"small_cnn"`` or ``"mlp"``; for images of 64x64 pixels
      and more ``"alexnet"``, ``"densenet121"`` or ``"resnet50"``.
    num_classes: Number of classes.
    num_heads: Number of copies of the output layer, for Alrao; None for an ordinary
      output layer. Either is called ``output``, and the rest of the network ``body``.
    width: Factor on every number of channels, any positive number, rounded as
      `benchmarks.models.layers.scale_channels` says.
    dtype: Of the body's computation, such as ``jnp.bfloat16``. Parameters, batch
      normalisation and output layer are float32 always.
    norm: ``"batch"`` or ``"none"``; by default ``"none"`` for AlexNet, which was made
      without, and ``"batch"`` for all others.

  Returns:
    A linen module that returns logits (batch, num_classes), or `HeadOutputs` of them.

  Raises:
    ValueError: Unknown `name` or `norm`, or `width` not positive.

  Example:
    >>> build_model("vgg19", num_heads=10, width=3).num_heads
    10
  """
  bodies = {key: (body, "batch") for key, body in BODIES.items()} | IMAGENET_BODIES
  if name not in bodies:
    raise ValueError(
      f"build_model(name=...) must be one of {sorted(bodies)}, got {name!r}."
    )
  if norm not in ("batch", "none", None):
    raise ValueError(f"build_model(norm=...) must be 'batch' or 'none', got {norm!r}.")
  if not 0 < width < float("inf"):
    raise ValueError(f"build_model(width=...) must be positive, got {width}.")
  body, own_norm = bodies[name]
  return Classifier(body(width, dtype, norm or own_norm), num_classes, num_heads)
