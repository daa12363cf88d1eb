import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alrao_jax import HeadOutputs
from benchmarks.models import BODIES, build_model, fast_init
from benchmarks.models.init import TRUNCATED_STD
from benchmarks.models.layers import Classifier, ConvBlock, scale_channels
from benchmarks.models.mobilenet_v2 import InvertedResidual

IMAGES = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
KEY = jax.random.key(0)


def init_shapes(model, images=IMAGES):
  return jax.eval_shape(functools.partial(model.init, train=False), KEY, images)


def output_shapes(model, images=IMAGES, train=False):
  def apply(variables, images):
    return model.apply(variables, images, train=train, mutable=["batch_stats"])[0]

  return jax.eval_shape(apply, init_shapes(model, images), images)


@functools.cache
def network_shapes(name, **options):
  """Shapes of a network's variables; tracing a deep one takes half a second."""
  return init_shapes(build_model(name, **options))


def num_parameters(variables):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


def leaves(tree):
  return {
    "/".join(entry.key for entry in path): leaf
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


@pytest.mark.parametrize(
  "name, plain, with_heads",
  [
    pytest.param("googlenet", 6_166_250, 6_258_500, marks=pytest.mark.slow),
    ("vgg19", 20_040_522, 20_086_692),
    ("mobilenet_v2", 2_296_922, 2_412_212),
  ],
)
def test_parameter_counts_are_the_papers(name, plain, with_heads):
  assert num_parameters(network_shapes(name)) == plain
  assert num_parameters(network_shapes(name, num_heads=10)) == with_heads


@pytest.mark.parametrize(
  "name, shape",
  [
    ("googlenet", (8, 8, 1024)),
    ("vgg19", (1, 1, 512)),
    ("mobilenet_v2", (4, 4, 1280)),
    ("small_cnn", (4, 4, 64)),
  ],
)
def test_bodies_shrink_images_as_described(name, shape):
  assert output_shapes(BODIES[name]()).shape == (2, *shape)


@pytest.mark.parametrize("name", BODIES)
def test_heads_change_only_the_output_layer(name):
  plain = network_shapes(name)
  heads = network_shapes(name, num_heads=10)
  assert plain["params"]["body"] == heads["params"]["body"]
  assert plain["batch_stats"] == heads["batch_stats"]
  (features, classes) = plain["params"]["output"]["kernel"].shape
  stacked = heads["params"]["output"]["alrao_heads"]
  assert stacked["kernel"].shape == (10, features, classes)
  assert stacked["bias"].shape == (10, classes)


def test_outputs_are_logits_or_head_outputs():
  plain = output_shapes(build_model("small_cnn", num_classes=7))
  assert (plain.shape, plain.dtype) == ((2, 7), jnp.float32)
  heads = output_shapes(build_model("small_cnn", num_classes=7, num_heads=4))
  assert isinstance(heads, HeadOutputs)
  assert heads.shared.shape == (4, 2, 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", BODIES)
def test_width_scales_every_layer_of_the_body(name):
  def channels(width):
    options = {} if width == 1 else {"width": width}
    body = network_shapes(name, **options)["params"]["body"]
    return {path: leaf.shape[-1] for path, leaf in leaves(body).items()}

  base = channels(1)
  eighth = channels(1 / 8)
  assert {path: 8 * count for path, count in eighth.items()} == base
  assert min(channels(1e-3).values()) == 1


@pytest.mark.parametrize(
  "channels, width, expected", [(20, 1 / 8, 3), (19, 1 / 8, 2), (1, 0.5, 1), (7, 2, 14)]
)
def test_channels_are_rounded_half_up(channels, width, expected):
  assert scale_channels(channels, width) == expected


@pytest.mark.parametrize("name", BODIES)
def test_bfloat16_is_for_computation_only(name):
  body = build_model(name, width=1 / 8, dtype=jnp.bfloat16).body
  init = functools.partial(body.init_with_output, train=True)
  outputs, variables = jax.eval_shape(init, KEY, IMAGES)
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(variables)}
  assert dtypes == {np.dtype("float32")}
  assert outputs.dtype == jnp.bfloat16


def test_the_output_layer_is_float32_even_so():
  model = build_model("small_cnn", num_heads=3, dtype=jnp.bfloat16)
  assert output_shapes(model).shared.dtype == jnp.float32


def test_bfloat16_stays_near_float32():
  images = jax.random.normal(jax.random.key(1), (8, 32, 32, 3))
  model = build_model("small_cnn")
  variables = fast_init(model, KEY, images)

  @functools.partial(jax.jit, static_argnums=0)
  def logits(dtype):
    return build_model("small_cnn", dtype=dtype).apply(
      variables, images, train=True, mutable=["batch_stats"]
    )[0]

  exact, rounded = logits(jnp.float32), logits(jnp.bfloat16)
  error = jnp.abs(exact - rounded).max()
  # Three layers of three roundings (input, kernel, output) of 2^-9 each, of order 1.
  assert 0 < error < 9 * 2**-9 * jnp.abs(exact).max()


def test_conv_block_is_convolution_batch_normalisation_relu():
  images = np.random.default_rng(0).normal(size=(4, 5, 5, 3)).astype(np.float32)
  block = ConvBlock(6, kernel_size=1)
  variables = block.init(KEY, jnp.asarray(images), train=False)
  outputs, changed = block.apply(
    variables, jnp.asarray(images), train=True, mutable=["batch_stats"]
  )
  kernel = np.asarray(variables["params"]["Conv_0"]["kernel"])[0, 0]
  linear = images @ kernel
  mean, var = linear.mean((0, 1, 2)), linear.var((0, 1, 2))
  expected = np.maximum(0, (linear - mean) / np.sqrt(var + 1e-5))
  np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
  statistics = changed["batch_stats"]["BatchNorm_0"]
  np.testing.assert_allclose(statistics["mean"], 0.1 * mean, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(statistics["var"], 0.9 + 0.1 * var, rtol=1e-5)


def test_strided_convolutions_pad_symmetrically():
  # With a kernel of ones, the first output of a strided 3x3 convolution sums the two by
  # two pixels of the corner: one row and one column of padding before the image.
  block = ConvBlock(1, strides=2, use_bias=False, norm="none")
  images = jnp.ones((1, 4, 4, 1))
  variables = {"params": {"Conv_0": {"kernel": jnp.ones((3, 3, 1, 1))}}}
  variables["params"]["Conv_0"]["bias"] = jnp.zeros(1)
  outputs = block.apply(variables, images, train=False)
  np.testing.assert_array_equal(outputs[0, :, :, 0], [[4, 6], [6, 9]])


@pytest.mark.parametrize("name", BODIES)
def test_without_normalisation_every_convolution_has_a_bias(name):
  variables = network_shapes(name, width=1 / 8, norm="none")
  assert list(variables) == ["params"]
  paths = set(leaves(variables["params"]))
  kernels = {path for path in paths if path.endswith("/kernel")}
  assert paths == kernels | {path.replace("/kernel", "/bias") for path in kernels}


@pytest.mark.parametrize(
  "strides, features, shortcut", [(1, 8, "identity"), (1, 12, "conv"), (2, 8, "none")]
)
def test_inverted_residual_has_the_right_shortcut(strides, features, shortcut):
  block = InvertedResidual(features, 6, strides, norm="none")
  images = jax.random.normal(jax.random.key(1), (1, 4, 4, 8))
  variables = init_shapes(block, images)
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), variables)
  outputs = block.apply(zeros, images, train=False)
  # With all parameters zero only the identity shortcut passes anything.
  expected = images if shortcut == "identity" else jnp.zeros(outputs.shape)
  np.testing.assert_array_equal(outputs, expected)
  assert len(variables["params"]) == (4 if shortcut == "conv" else 3)


@pytest.mark.parametrize(
  ("name", "num_heads"), [*((name, 3) for name in BODIES), ("small_cnn", None)]
)
def test_fast_init_has_the_tree_of_init(name, num_heads):
  model = build_model(name, num_heads=num_heads, width=1 / 8)
  variables = fast_init(model, KEY, IMAGES)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
  assert shapes == network_shapes(name, width=1 / 8, num_heads=num_heads)


class SomeLayers(nn.Module):
  """One of each kind of layer that the benchmark networks have."""

  @nn.compact
  def __call__(self, images, *, train):
    images = InvertedResidual(48, 6, 1)(images, train=train)
    return ConvBlock(64)(images, train=train)


@pytest.mark.parametrize("init", ["linen", "fast"])
def test_fast_init_and_init_have_the_same_distributions(init):
  model = Classifier(SomeLayers(), num_classes=100, num_heads=3)
  images = jnp.zeros((1, 8, 8, 32))
  if init == "fast":
    variables = fast_init(model, KEY, images)
  else:
    variables = jax.jit(functools.partial(model.init, train=False))(KEY, images)
  kernels = 0
  for path, leaf in leaves(variables).items():
    values = np.asarray(leaf)
    if not path.endswith("kernel"):
      constant = 1 if path.endswith(("scale", "var")) else 0
      np.testing.assert_array_equal(values, np.full_like(values, constant))
      continue
    kernels += 1
    for kernel in values if "alrao_heads" in path else [values]:
      std = 1 / math.sqrt(math.prod(kernel.shape[:-1]))
      # 5 sigma; a truncated normal's standard deviation is estimated to within less
      # than the factor 1 / sqrt(2 n) of a normal's.
      assert abs(kernel.mean()) < 5 * std / math.sqrt(kernel.size), path
      assert abs(kernel.std() / std - 1) < 5 / math.sqrt(2 * kernel.size), path
      limit = 2 * std / TRUNCATED_STD
      assert 0.95 * limit < np.abs(kernel).max() <= limit * (1 + 1e-6), path
  assert kernels == 6


def test_fast_init_starts_plain_and_multi_head_networks_from_the_same_body():
  plain = fast_init(build_model("small_cnn"), KEY, IMAGES)["params"]
  heads = fast_init(build_model("small_cnn", num_heads=10), KEY, IMAGES)["params"]
  jax.tree.map(np.testing.assert_array_equal, plain["body"], heads["body"])
  kernels = heads["output"]["alrao_heads"]["kernel"]
  assert len(np.unique(kernels)) > 0.99 * kernels.size


def test_fast_init_follows_its_key():
  model = build_model("small_cnn")
  first, again = (fast_init(model, KEY, IMAGES)["params"] for _ in range(2))
  other = fast_init(model, jax.random.key(1), IMAGES)["params"]
  jax.tree.map(np.testing.assert_array_equal, first, again)
  kernels = [tree["body"]["ConvBlock_0"]["Conv_0"]["kernel"] for tree in (first, other)]
  assert not np.isclose(*kernels).any()


def test_fast_init_refuses_a_leaf_that_it_does_not_know():
  class Tokens(nn.Module):
    @nn.compact
    def __call__(self, tokens, *, train):
      return nn.Embed(4, 5)(tokens)

  with pytest.raises(ValueError, match="got params/Embed_0/embedding; use model.init"):
    fast_init(Tokens(), KEY, jax.ShapeDtypeStruct((2,), jnp.int32))


@pytest.mark.slow
@pytest.mark.parametrize("name", BODIES)
def test_a_gradient_reaches_every_parameter(name):
  model = build_model(name, num_heads=2, width=1 / 8)
  images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
  variables = fast_init(model, KEY, images)

  @jax.jit
  def gradient(variables):
    def loss(params):
      variables_ = {**variables, "params": params}
      heads, _ = model.apply(variables_, images, train=True, mutable=["batch_stats"])
      return jnp.mean(jnp.square(heads.shared - 1)) + jnp.mean(jnp.square(heads.own))

    return jax.grad(loss)(variables["params"])

  for path, leaf in leaves(gradient(variables)).items():
    assert np.isfinite(leaf).all(), path
    assert np.any(np.asarray(leaf)), path


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"name": "vgg"}, r"name=...\) must be one of .*'vgg19'.*, got 'vgg'"),
    ({"name": "vgg19", "width": 0}, r"width=...\) must be positive, got 0"),
    ({"name": "vgg19", "width": math.nan}, r"width=...\) must be positive, got nan"),
    ({"name": "vgg19", "norm": "layer"}, r"'batch' or 'none', got 'layer'"),
  ],
)
def test_build_model_refuses_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    build_model(**arguments)


def test_networks_refuse_images_that_they_cannot_take():
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8)
  with pytest.raises(TypeError, match="got uint8; apply"):
    init_shapes(build_model("small_cnn"), images)
  images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
  with pytest.raises(ValueError, match="16x16 pixels are too small for VGG19"):
    init_shapes(build_model("vgg19", width=1 / 8), images)
