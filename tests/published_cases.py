"""Layers and models of published packages, with the units that they have.

A line of a case is a parameter: its path, its shape, ``->``, the axes that index its
units (``-`` for one rate), then ``of GROUP`` where its units are not those of the node
above it, and ``xN`` where N gates or parts repeat the units along the last axis.
Parameters of one group have one vector of units. Nothing here needs the packages: the
shapes are those of their constructors, small.

``how`` says where the units come from: "jacobian" (which outputs each entry changes,
measured) or "read" (the layer's forward pass).
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Leaf:
  """A parameter and its units: see the lines of the module's docstring."""

  path: str
  shape: tuple[int, ...]
  axes: tuple[int, ...]
  group: str
  tiles: int = 1


@dataclass(frozen=True)
class PublishedCase:
  """A layer or a model of a package.

  Attributes:
    package: The package, as pip names it.
    version: The version that was looked at.
    layer: The class or function, and what is special about it.
    leaves: Its parameters and their units.
    how: "jacobian" or "read".
    unit_axis: That of the options with which a user of the package calls Alrao.
  """

  package: str
  version: str
  layer: str
  leaves: tuple[Leaf, ...]
  how: str = "read"
  unit_axis: str = "last"

  @property
  def id(self) -> str:
    return f"{self.package}-{self.layer}".replace(" ", "-").replace("/", ".")

  @property
  def shapes(self) -> dict[str, Any]:
    """A nested dict of shapes."""
    tree: dict[str, Any] = {}
    for leaf in self.leaves:
      *nodes, name = leaf.path.split("/")
      node = tree
      for key in nodes:
        node = node.setdefault(key, {})
      node[name] = jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
    return tree


CASES: list[PublishedCase] = []


# Packages that played no part in the rules: they were looked at afterwards, once.
FURTHER: list[PublishedCase] = []


@dataclass
class Package:
  """Adds the cases of one package."""

  name: str
  version: str
  unit_axis: str = "last"
  further: bool = False

  def __call__(self, layer: str, text: str, how: str = "read") -> None:
    leaves = tuple(map(_parse, text.strip().splitlines()))
    case = PublishedCase(self.name, self.version, layer, leaves, how, self.unit_axis)
    (FURTHER if self.further else CASES).append(case)


def _parse(line: str) -> Leaf:
  left, right = line.strip().split("->")
  path, sizes = left.rsplit(maxsplit=1)
  words = right.split()
  axes, group, tiles = words.pop(0), path.rpartition("/")[0] or "(root)", 1
  while words:
    word = words.pop(0)
    if word == "of":
      group = words.pop(0)
    else:
      tiles = int(word.removeprefix("x"))
  return Leaf(path, _numbers(sizes), _numbers(axes), group, tiles)


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(map(int, text.split(","))) if text != "-" else ()


def count_units(leaf: Leaf) -> int:
  """The number of units of a parameter."""
  return math.prod(leaf.shape[axis] for axis in leaf.axes) // leaf.tiles


# --- Flax. Modules of one's own, and ports of torch layers

flax = Package("flax", "0.12.12")
flax(
  "linen.Dense and LayerNorm in an MLP",
  """
  Dense_0/kernel 5,8 -> 1
  Dense_0/bias 8 -> 0
  LayerNorm_0/scale 8 -> 0
  LayerNorm_0/bias 8 -> 0
  Dense_1/kernel 8,8 -> 1
  Dense_1/bias 8 -> 0
  Dense_2/kernel 8,3 -> 1
  Dense_2/bias 3 -> 0
  """,
  how="jacobian",
)
flax(
  "linen convolutions and BatchNorm",
  """
  Conv_0/kernel 3,3,3,8 -> 3
  BatchNorm_0/scale 8 -> 0
  BatchNorm_0/bias 8 -> 0
  Conv_1/kernel 3,3,8,8 -> 3
  Conv_1/bias 8 -> 0
  Dense_0/kernel 8,4 -> 1
  Dense_0/bias 4 -> 0
  """,
  how="jacobian",
)
flax(
  "linen.MultiHeadDotProductAttention",
  """
  query/kernel 8,2,4 -> 1,2
  query/bias 2,4 -> 0,1
  key/kernel 8,2,4 -> 1,2
  key/bias 2,4 -> 0,1
  value/kernel 8,2,4 -> 1,2
  value/bias 2,4 -> 0,1
  out/kernel 2,4,8 -> 2
  out/bias 8 -> 0
  """,
  how="jacobian",
)
flax(
  "linen.WeightNorm within a compact parent",
  """
  Dense_0/kernel 5,8 -> 1
  Dense_0/bias 8 -> 0
  WeightNorm_0/Dense_0/kernel/scale 8 -> 0 of Dense_0
  """,
  how="jacobian",
)
flax(
  "nnx port of torch.nn.Linear, among unequal widths",
  """
  fc1/weight 8,4 -> 0
  fc1/bias 8 -> 0
  fc2/weight 8,8 -> 0
  fc2/bias 8 -> 0
  fc3/weight 3,8 -> 0
  fc3/bias 3 -> 0
  """,
)
flax(
  "LSTM and Embed in a language model",
  """
  emb/embedding 11,8 -> 1
  OptimizedLSTMCell_0/ii/kernel 8,6 -> 1 of lstm
  OptimizedLSTMCell_0/if/kernel 8,6 -> 1 of lstm
  OptimizedLSTMCell_0/ig/kernel 8,6 -> 1 of lstm
  OptimizedLSTMCell_0/io/kernel 8,6 -> 1 of lstm
  OptimizedLSTMCell_0/hi/kernel 6,6 -> 1 of lstm
  OptimizedLSTMCell_0/hi/bias 6 -> 0 of lstm
  OptimizedLSTMCell_0/hf/kernel 6,6 -> 1 of lstm
  OptimizedLSTMCell_0/hf/bias 6 -> 0 of lstm
  OptimizedLSTMCell_0/hg/kernel 6,6 -> 1 of lstm
  OptimizedLSTMCell_0/hg/bias 6 -> 0 of lstm
  OptimizedLSTMCell_0/ho/kernel 6,6 -> 1 of lstm
  OptimizedLSTMCell_0/ho/bias 6 -> 0 of lstm
  """,
  how="jacobian",
)

# --- NetKet. Symmetric layers are output first, masked ones flattened

netket = Package("netket", "3.23.0")
netket(
  "models.RBM",
  """
  Dense/kernel 6,12 -> 1
  Dense/bias 12 -> 0
  visible_bias 6 -> 0
  """,
)
netket(
  "models.RBM (alpha=1)",
  """
  Dense/kernel 6,6 -> 1
  Dense/bias 6 -> 0
  visible_bias 6 -> 0
  """,
)
netket(
  "models.RBMModPhase",
  """
  Dense_0/kernel 6,12 -> 1
  Dense_0/bias 12 -> 0
  Dense_1/kernel 6,12 -> 1
  Dense_1/bias 12 -> 0
  """,
)
netket(
  "models.RBMSymm",
  """
  Dense/kernel 2,1,4 -> 0
  Dense/bias 2 -> 0
  visible_bias 1 -> 0
  """,
)
netket(
  "models.GCNN (fft, equal widths)",
  """
  dense_symm/kernel 4,1,4 -> 0
  dense_symm/bias 4 -> 0
  equivariant_layers_0/kernel 4,4,8 -> 0
  equivariant_layers_0/bias 4 -> 0
  """,
)
netket(
  "models.GCNN (irreps, unequal widths)",
  """
  dense_symm/kernel 3,1,4 -> 0
  dense_symm/bias 3 -> 0
  equivariant_layers_0/kernel 8,3,8 -> 0
  equivariant_layers_0/bias 8 -> 0
  equivariant_layers_1/kernel 8,8,8 -> 0
  equivariant_layers_1/bias 8 -> 0
  """,
)
netket(
  "models.GCNN (parity)",
  """
  dense_symm/kernel 4,1,4 -> 0
  dense_symm/bias 4 -> 0
  equivariant_layers_0/kernel 4,4,8 -> 0
  equivariant_layers_0/bias 4 -> 0
  equivariant_layers_flip_0/kernel 4,4,8 -> 0
  equivariant_layers_flip_0/bias 4 -> 0
  """,
)
netket(
  "nn.DenseEquivariant alone",
  """
  conv/kernel 4,4,8 -> 0
  conv/bias 4 -> 0
  """,
)
netket(
  "models.ARNNDense",
  """
  _layers_0/kernel 6,30 -> 1
  _layers_0/bias 6,5 -> 0,1
  _layers_1/kernel 30,12 -> 1
  _layers_1/bias 6,2 -> 0,1
  """,
)
netket(
  "models.ARNNConv2D",
  """
  _layers_0/kernel 3,3,1,5 -> 3
  _layers_0/bias 5 -> 0
  _layers_1/kernel 3,3,5,2 -> 3
  _layers_1/bias 2 -> 0
  """,
)
netket(
  "models.DeepSetMLP",
  """
  DeepSetMLP_0/ds_phi/Dense_0/kernel 2,5 -> 1
  DeepSetMLP_0/ds_phi/Dense_0/bias 5 -> 0
  DeepSetMLP_0/ds_rho/Dense_0/kernel 5,7 -> 1
  DeepSetMLP_0/ds_rho/Dense_0/bias 7 -> 0
  DeepSetMLP_0/ds_rho/Dense_1/kernel 7,1 -> 1
  DeepSetMLP_0/ds_rho/Dense_1/bias 1 -> 0
  """,
)
netket(
  "models.MLP",
  """
  MLP_0/Dense_0/kernel 6,5 -> 1
  MLP_0/Dense_0/bias 5 -> 0
  MLP_0/Dense_1/kernel 5,4 -> 1
  MLP_0/Dense_1/bias 4 -> 0
  MLP_0/Dense_2/kernel 4,1 -> 1
  """,
)
netket(
  "models.NDM",
  """
  Mixed/ASymm/kernel 4,12 -> 1
  Mixed/Symm/kernel 4,12 -> 1
  Mixed/bias 12 -> 0 of mixed
  PureASymm/Dense/kernel 4,8 -> 1
  PureASymm/Dense/bias 8 -> 0
  PureASymm/visible_bias 4 -> 0 of visible
  PureSymm/Dense/kernel 4,8 -> 1
  PureSymm/Dense/bias 8 -> 0
  PureSymm/visible_bias 4 -> 0
  """,
)
netket(
  "experimental.models.LSTMNet",
  """
  _layers_0/cell/kernel 5,16 -> 1 x4
  _layers_0/cell/bias 16 -> 0 x4
  _layers_1/cell/kernel 6,8 -> 1 x4
  _layers_1/cell/bias 8 -> 0 x4
  """,
)
netket(
  "experimental.models.GRUNet1D",
  """
  _layers_0/cell/rz_kernel 5,8 -> 1 x2
  _layers_0/cell/rz_bias 8 -> 0 x2
  _layers_0/cell/n_kernel 5,4 -> 1
  _layers_0/cell/n_bias 4 -> 0
  _layers_1/cell/rz_kernel 6,4 -> 1 x2
  _layers_1/cell/rz_bias 4 -> 0 x2
  _layers_1/cell/n_kernel 6,2 -> 1
  _layers_1/cell/n_bias 2 -> 0
  """,
)
netket(
  "models.tensor_networks.MPSPeriodic",
  """
  tensors 6,2,4,4 -> 3
  """,
)

# --- Keras, by the paths of its variables

keras = Package("keras", "3.15.1")
keras(
  "layers.GRU (reset_after)",
  """
  gru/gru_cell/kernel 3,12 -> 1 x3
  gru/gru_cell/recurrent_kernel 4,12 -> 1 x3
  gru/gru_cell/bias 2,12 -> 1 x3
  """,
  how="jacobian",
)
keras(
  "layers.GRU (reset_after, two inputs)",
  """
  gru/gru_cell/kernel 2,12 -> 1 x3
  gru/gru_cell/recurrent_kernel 4,12 -> 1 x3
  gru/gru_cell/bias 2,12 -> 1 x3
  """,
  how="jacobian",
)
keras(
  "layers.GRU (reset_after=False)",
  """
  gru/gru_cell/kernel 3,12 -> 1 x3
  gru/gru_cell/recurrent_kernel 4,12 -> 1 x3
  gru/gru_cell/bias 12 -> 0 x3
  """,
)
keras(
  "layers.LSTM",
  """
  lstm/lstm_cell/kernel 3,16 -> 1 x4
  lstm/lstm_cell/recurrent_kernel 4,16 -> 1 x4
  lstm/lstm_cell/bias 16 -> 0 x4
  """,
  how="jacobian",
)
keras(
  "layers.SimpleRNN",
  """
  simple_rnn/simple_rnn_cell/kernel 3,4 -> 1
  simple_rnn/simple_rnn_cell/recurrent_kernel 4,4 -> 1
  simple_rnn/simple_rnn_cell/bias 4 -> 0
  """,
  how="jacobian",
)
keras(
  "layers.Bidirectional(LSTM)",
  """
  bidirectional/forward_lstm/lstm_cell/kernel 3,12 -> 1 x4
  bidirectional/forward_lstm/lstm_cell/recurrent_kernel 3,12 -> 1 x4
  bidirectional/forward_lstm/lstm_cell/bias 12 -> 0 x4
  bidirectional/backward_lstm/lstm_cell/kernel 3,12 -> 1 x4
  bidirectional/backward_lstm/lstm_cell/recurrent_kernel 3,12 -> 1 x4
  bidirectional/backward_lstm/lstm_cell/bias 12 -> 0 x4
  """,
)
keras(
  "layers.RNN([LSTMCell, GRUCell])",
  """
  rnn/stacked_rnn_cells/lstm_cell/kernel 3,16 -> 1 x4
  rnn/stacked_rnn_cells/lstm_cell/recurrent_kernel 4,16 -> 1 x4
  rnn/stacked_rnn_cells/lstm_cell/bias 16 -> 0 x4
  rnn/stacked_rnn_cells/gru_cell/kernel 4,15 -> 1 x3
  rnn/stacked_rnn_cells/gru_cell/recurrent_kernel 5,15 -> 1 x3
  rnn/stacked_rnn_cells/gru_cell/bias 2,15 -> 1 x3
  """,
)
keras(
  "layers.ConvLSTM2D",
  """
  conv_lstm2d/conv_lstm_cell/kernel 3,3,2,16 -> 3 x4
  conv_lstm2d/conv_lstm_cell/recurrent_kernel 3,3,4,16 -> 3 x4
  conv_lstm2d/conv_lstm_cell/bias 16 -> 0 x4
  """,
)
keras(
  "layers.Conv2D, BatchNormalization, Dense",
  """
  conv2d/kernel 3,3,3,8 -> 3
  conv2d/bias 8 -> 0
  batch_normalization/gamma 8 -> 0
  batch_normalization/beta 8 -> 0
  dense/kernel 8,8 -> 1
  dense/bias 8 -> 0
  dense_1/kernel 8,3 -> 1
  dense_1/bias 3 -> 0
  """,
)
keras(
  "layers.Conv2DTranspose (equal channels)",
  """
  conv2d_transpose/kernel 3,3,4,4 -> 2
  conv2d_transpose/bias 4 -> 0
  """,
  how="jacobian",
)
keras(
  "layers.Conv2DTranspose (no bias)",
  """
  conv2d_transpose/kernel 3,3,5,4 -> 2
  """,
  how="jacobian",
)
keras(
  "layers.Conv1DTranspose",
  """
  conv1d_transpose/kernel 3,5,4 -> 1
  conv1d_transpose/bias 5 -> 0
  """,
  how="jacobian",
)
keras(
  "layers.DepthwiseConv2D",
  """
  depthwise_conv2d/kernel 2,2,4,1 -> 2,3
  depthwise_conv2d/bias 4 -> 0
  """,
  how="jacobian",
)
keras(
  "layers.DepthwiseConv2D (depth_multiplier=2)",
  """
  depthwise_conv2d/kernel 2,2,4,2 -> 2,3
  depthwise_conv2d/bias 8 -> 0
  """,
  how="jacobian",
)
keras(
  "layers.DepthwiseConv2D (no bias)",
  """
  depthwise_conv2d/kernel 2,2,4,1 -> 2
  """,
)
keras(
  "layers.SeparableConv2D",
  """
  separable_conv2d/depthwise_kernel 2,2,4,1 -> 2 of depthwise
  separable_conv2d/pointwise_kernel 1,1,4,5 -> 3
  separable_conv2d/bias 5 -> 0
  """,
)
keras(
  "layers.MultiHeadAttention",
  """
  multi_head_attention/query/kernel 8,2,4 -> 1,2
  multi_head_attention/query/bias 2,4 -> 0,1
  multi_head_attention/key/kernel 8,2,4 -> 1,2
  multi_head_attention/key/bias 2,4 -> 0,1
  multi_head_attention/value/kernel 8,2,4 -> 1,2
  multi_head_attention/value/bias 2,4 -> 0,1
  multi_head_attention/attention_output/kernel 2,4,8 -> 2
  multi_head_attention/attention_output/bias 8 -> 0
  """,
)
keras(
  "layers.GroupQueryAttention (four heads of width four)",
  """
  grouped_query_attention/query/kernel 8,4,4 -> 1,2
  grouped_query_attention/query/bias 4,4 -> 0,1
  grouped_query_attention/key/kernel 8,2,4 -> 1,2
  grouped_query_attention/key/bias 2,4 -> 0,1
  grouped_query_attention/value/kernel 8,2,4 -> 1,2
  grouped_query_attention/value/bias 2,4 -> 0,1
  grouped_query_attention/attention_output/kernel 4,4,8 -> 2
  grouped_query_attention/attention_output/bias 8 -> 0
  """,
)
keras(
  "layers.EinsumDense and Embedding",
  """
  embedding/embeddings 9,8 -> 1
  einsum_dense/kernel 8,2,4 -> 1,2
  einsum_dense/bias 2,4 -> 0,1
  layer_normalization/gamma 8 -> 0
  layer_normalization/beta 8 -> 0
  rms_normalization/scale 8 -> 0
  """,
)
keras(
  "layers.PReLU (shared_axes)",
  """
  p_re_lu/alpha 1,1,4 -> 2
  """,
  how="jacobian",
)

# --- Haiku

haiku = Package("dm-haiku", "0.0.17")
haiku(
  "LSTM (name=core)",
  """
  core/linear/w 7,16 -> 1 x4
  core/linear/b 16 -> 0 x4
  """,
  how="jacobian",
)
haiku(
  "GRU (name=core)",
  """
  core/w_i 3,12 -> 1 x3
  core/w_h 4,12 -> 1 x3
  core/b 12 -> 0 x3
  """,
  how="jacobian",
)
haiku(
  "VanillaRNN (name=core)",
  """
  core/linear/w 3,4 -> 1 of core
  core/linear/b 4 -> 0 of core
  core/linear_1/w 4,4 -> 1 of core
  core/linear_1/b 4 -> 0 of core
  """,
  how="jacobian",
)
haiku(
  "Conv2DLSTM (name=core)",
  """
  core/hidden_to_hidden/w 3,3,4,16 -> 3 of core x4
  core/hidden_to_hidden/b 16 -> 0 of core x4
  core/input_to_hidden/w 3,3,2,16 -> 3 of core x4
  core/input_to_hidden/b 16 -> 0 of core x4
  """,
)
haiku(
  "Conv2DTranspose (equal channels)",
  """
  conv2_d_transpose/w 3,3,4,4 -> 2
  conv2_d_transpose/b 4 -> 0
  """,
  how="jacobian",
)
haiku(
  "Conv2DTranspose (no bias)",
  """
  conv2_d_transpose/w 3,3,5,4 -> 2
  """,
  how="jacobian",
)
haiku(
  "SeparableDepthwiseConv2D",
  """
  separable_depthwise_conv2_d/~/depthwise_conv2_d/w 2,1,1,8 -> 3
  separable_depthwise_conv2_d/~/depthwise_conv2_d_1/w 1,2,1,8 -> 3
  separable_depthwise_conv2_d/~/depthwise_conv2_d_1/b 8 -> 0
  """,
)
haiku(
  "MultiHeadAttention",
  """
  multi_head_attention/key/w 8,8 -> 1
  multi_head_attention/key/b 8 -> 0
  multi_head_attention/query/w 8,8 -> 1
  multi_head_attention/query/b 8 -> 0
  multi_head_attention/value/w 8,8 -> 1
  multi_head_attention/value/b 8 -> 0
  multi_head_attention/linear/w 8,8 -> 1
  multi_head_attention/linear/b 8 -> 0
  """,
)
haiku(
  "nets.MobileNetV1",
  """
  mobile_net_v1/conv2_d/w 3,3,3,32 -> 3
  mobile_net_v1/batch_norm/scale 1,1,1,32 -> 3
  mobile_net_v1/batch_norm/offset 1,1,1,32 -> 3
  mobile_net_v1/mobile_net_v1_block/depthwise_conv/w 3,3,1,32 -> 3
  mobile_net_v1/mobile_net_v1_block/batch_norm/scale 1,1,1,32 -> 3
  mobile_net_v1/mobile_net_v1_block/batch_norm/offset 1,1,1,32 -> 3
  mobile_net_v1/mobile_net_v1_block/pointwise_conv/w 1,1,32,6 -> 3
  mobile_net_v1/mobile_net_v1_block/batch_norm_1/scale 1,1,1,6 -> 3
  mobile_net_v1/mobile_net_v1_block/batch_norm_1/offset 1,1,1,6 -> 3
  mobile_net_v1/logits/w 6,3 -> 1
  mobile_net_v1/logits/b 3 -> 0
  """,
)
haiku(
  "experimental.layer_stack",
  """
  __layer_stack_no_per_layer/linear/w 6,8,8 -> 0,2
  __layer_stack_no_per_layer/linear/b 6,8 -> 0,1
  """,
)
haiku(
  "nets.VectorQuantizer and Embed",
  """
  embed/embeddings 9,4 -> 1
  encoder/linear/w 4,4 -> 1
  encoder/linear/b 4 -> 0
  """,
)

# --- Equinox: units first

equinox = Package("equinox", "0.13.8", "first")
equinox(
  "nn.MLP",
  """
  layers/0/weight 8,3 -> 0
  layers/0/bias 8 -> 0
  layers/1/weight 8,8 -> 0
  layers/1/bias 8 -> 0
  layers/2/weight 2,8 -> 0
  layers/2/bias 2 -> 0
  """,
  how="jacobian",
)
equinox(
  "nn.Conv2d, GroupNorm, ConvTranspose2d",
  """
  conv/weight 4,4,3,3 -> 0
  conv/bias 4,1,1 -> 0,1,2
  norm/weight 4 -> 0
  norm/bias 4 -> 0
  up/weight 5,4,3,3 -> 0
  """,
  how="jacobian",
)
equinox(
  "nn.MultiheadAttention",
  """
  query_proj/weight 8,8 -> 0
  query_proj/bias 8 -> 0
  key_proj/weight 8,8 -> 0
  value_proj/weight 8,8 -> 0
  output_proj/weight 8,8 -> 0
  output_proj/bias 8 -> 0
  """,
  how="jacobian",
)
equinox(
  "nn.GRUCell and Embedding",
  """
  embedding/weight 9,3 -> 1
  cell/weight_ih 12,3 -> 0 x3
  cell/weight_hh 12,4 -> 0 x3
  cell/bias 12 -> 0 x3
  cell/bias_n 4 -> 0
  """,
  how="jacobian",
)
equinox(
  "nn.WeightNorm(Linear)",
  """
  layer/weight 4,3 -> 0 of layer
  layer/bias 4 -> 0 of layer
  g 4,1 -> 0 of layer
  """,
  how="jacobian",
)
equinox(
  "filter_vmap of nn.Linear without bias",
  """
  weight 6,8,8 -> 0,1
  """,
  how="jacobian",
)
equinox(
  "filter_vmap of nn.LayerNorm",
  """
  weight 6,8 -> 0,1
  bias 6,8 -> 0,1
  """,
  how="jacobian",
)
equinox(
  "filter_vmap of a transformer block",
  """
  blocks/norm/weight 6,8 -> 0,1
  blocks/norm/bias 6,8 -> 0,1
  blocks/attn/query_proj/weight 6,8,8 -> 0,1
  blocks/attn/key_proj/weight 6,8,8 -> 0,1
  blocks/attn/value_proj/weight 6,8,8 -> 0,1
  blocks/attn/output_proj/weight 6,8,8 -> 0,1
  blocks/mlp/layers/0/weight 6,16,8 -> 0,1
  blocks/mlp/layers/0/bias 6,16 -> 0,1
  blocks/mlp/layers/1/weight 6,8,16 -> 0,1
  blocks/mlp/layers/1/bias 6,8 -> 0,1
  """,
  how="jacobian",
)

# --- wrapped weights

paramax = Package("paramax", "0.0.5", "first")
paramax(
  "WeightNormalization of an Equinox Linear",
  """
  weight/weight 4,3 -> 0
  weight/scale/args/0 4,1 -> 0 of weight
  bias 4 -> 0 of weight
  """,
)
paramax(
  "Parameterize of an Equinox Linear",
  """
  weight/args/0 4,3 -> 0 of layer
  bias 4 -> 0 of layer
  """,
)
flowjax = Package("flowjax", "19.1.2", "first")
flowjax(
  "flows.masked_autoregressive_flow",
  """
  flow/masked_autoregressive_mlp/layers/0/weight/args/1 2,6,3 -> 0,1 of l0
  flow/masked_autoregressive_mlp/layers/0/bias 2,6 -> 0,1 of l0
  flow/masked_autoregressive_mlp/layers/1/weight/args/1 2,6,6 -> 0,1 of l1
  flow/masked_autoregressive_mlp/layers/1/bias 2,6 -> 0,1 of l1
  """,
)
flowjax(
  "flows.coupling_flow",
  """
  flow/conditioner/layers/0/weight 2,6,1 -> 0,1
  flow/conditioner/layers/0/bias 2,6 -> 0,1
  flow/conditioner/layers/1/weight 2,4,6 -> 0,1
  flow/conditioner/layers/1/bias 2,4 -> 0,1
  """,
)
flowjax(
  "flows.block_neural_autoregressive_flow",
  """
  flow/layers/0/0/weight/weight/args/0 2,24,3 -> 0,1 of l0
  flow/layers/0/0/weight/scale/args/0 2,24,1 -> 0,1 of l0
  flow/layers/0/0/bias 2,24 -> 0,1 of l0
  flow/layers/1/0/weight/weight/args/0 2,3,24 -> 0,1 of l1
  flow/layers/1/0/weight/scale/args/0 2,3,1 -> 0,1 of l1
  flow/layers/1/0/bias 2,3 -> 0,1 of l1
  """,
)
quax = Package("quax", "0.4.6", "first")
quax(
  "examples.lora.loraify(MLP)",
  """
  layers/0/weight/_w 8,3 -> 0 of l0
  layers/0/weight/a 8,2 -> 0 of l0
  layers/0/weight/b 2,3 -> 0
  layers/0/bias 8 -> 0 of l0
  layers/1/weight/_w 4,8 -> 0 of l1
  layers/1/weight/a 4,2 -> 0 of l1
  layers/1/weight/b 2,8 -> 0
  layers/1/bias 4 -> 0 of l1
  """,
)
penzai = Package("penzai", "0.2.5")
penzai(
  "pz.nn.Affine",
  """
  aff/Linear.weights/data_array 3,2,4 -> 1,2 of aff
  aff/AddBias.bias/data_array 2,4 -> 0,1 of aff
  """,
)
penzai(
  "models.transformer.variants.llamalike_common",
  """
  transformer/block_0/attention/key.weights/data_array 8,4 -> 1
  transformer/block_0/attention/output.weights/data_array 2,4,8 -> 2
  transformer/block_0/attention/query.weights/data_array 8,2,4 -> 1,2
  transformer/block_0/attention/value.weights/data_array 8,4 -> 1
  transformer/block_0/mlp/gating_linear.weights/data_array 8,16 -> 1
  transformer/block_0/mlp/out_linear.weights/data_array 16,8 -> 1
  transformer/block_0/mlp/value_linear.weights/data_array 8,16 -> 1
  transformer/block_0/pre_attention_norm/scale.weights/data_array 8 -> 0
  transformer/block_0/pre_ffw_norm/scale.weights/data_array 8 -> 0
  transformer/embedder.embeddings/data_array 11,8 -> 1
  transformer/final_norm/scale.weights/data_array 8 -> 0
  transformer/lm_head.weights/data_array 8,11 -> 1
  """,
)

# --- vision models of Equinox

equimo = Package("equimo", "2.7.0", "first")
equimo(
  "vision.models.vit.VisionTransformer",
  """
  patch_embed/proj/weight 8,3,8,8 -> 0
  patch_embed/proj/bias 8,1,1 -> 0,1,2
  global_pos_embed/weight 5,8 -> 1
  cls_token 1,8 -> 1 of cls
  reg_tokens 4,8 -> 1 of reg
  blocks/0/blocks/0/prenorm/weight 8 -> 0
  blocks/0/blocks/0/prenorm/bias 8 -> 0
  blocks/0/blocks/0/norm/weight 8 -> 0
  blocks/0/blocks/0/norm/bias 8 -> 0
  blocks/0/blocks/0/attn/qkv/weight 24,8 -> 0
  blocks/0/blocks/0/attn/qkv/bias 24 -> 0
  blocks/0/blocks/0/attn/proj/weight 8,8 -> 0
  blocks/0/blocks/0/attn/proj/bias 8 -> 0
  blocks/0/blocks/0/mlp/fc1/weight 32,8 -> 0
  blocks/0/blocks/0/mlp/fc1/bias 32 -> 0
  blocks/0/blocks/0/mlp/fc2/weight 8,32 -> 0
  blocks/0/blocks/0/mlp/fc2/bias 8 -> 0
  norm/weight 8 -> 0
  norm/bias 8 -> 0
  head/weight 3,8 -> 0
  head/bias 3 -> 0
  """,
)
equimo(
  "vision.models.mobilenet.mobilenetv3_small",
  """
  conv1/conv/weight 16,3,3,3 -> 0
  conv1/conv/bias 16,1,1 -> 0,1,2
  conv1/norm/weight 16 -> 0
  conv1/norm/bias 16 -> 0
  layers/0/inverted_conv/conv/weight 16,16,1,1 -> 0
  layers/0/inverted_conv/norm/weight 16 -> 0
  layers/0/inverted_conv/norm/bias 16 -> 0
  layers/0/depth_conv/conv/weight 16,1,3,3 -> 0
  layers/0/depth_conv/norm/weight 16 -> 0
  layers/0/depth_conv/norm/bias 16 -> 0
  layers/0/se_conv/fc1/weight 16,16,1,1 -> 0
  layers/0/se_conv/fc1/bias 16,1,1 -> 0,1,2
  """,
)
eqxvision = Package("eqxvision", "0.2.8", "first")
eqxvision(
  "models.SwinTransformer (V1, one block)",
  """
  layers/1/0/norm1/weight 8 -> 0
  layers/1/0/norm1/bias 8 -> 0
  layers/1/0/attn/relative_position_bias_table 169,3 -> 1
  layers/1/0/attn/qkv/weight 24,8 -> 0
  layers/1/0/attn/qkv/bias 24 -> 0
  layers/1/0/attn/proj/weight 8,8 -> 0
  layers/1/0/attn/proj/bias 8 -> 0
  layers/1/0/mlp/fc1/weight 32,8 -> 0
  layers/1/0/mlp/fc1/bias 32 -> 0
  layers/1/0/mlp/fc2/weight 8,32 -> 0
  layers/1/0/mlp/fc2/bias 8 -> 0
  """,
)
eqxvision(
  "models.SwinTransformer (V2, attention)",
  """
  attn/logit_scale 4,1,1 -> 0 of scale
  attn/cpb_mlp/layers/0/weight 512,2 -> 0
  attn/cpb_mlp/layers/0/bias 512 -> 0
  attn/cpb_mlp/layers/2/weight 4,512 -> 0
  attn/qkv/weight 24,8 -> 0
  attn/qkv/bias 24 -> 0
  """,
)
eqxvision(
  "models.ConvNeXt (one block)",
  """
  layer_scale 8,1,1 -> 0 of scale
  block/layers/0/weight 8,1,7,7 -> 0
  block/layers/0/bias 8,1,1 -> 0,1,2
  block/layers/1/weight 8 -> 0
  block/layers/1/bias 8 -> 0
  block/layers/2/weight 32,8 -> 0
  block/layers/2/bias 32 -> 0
  block/layers/3/weight 8,32 -> 0
  block/layers/3/bias 8 -> 0
  """,
)

# --- recurrent and state-space layers

rnn_jax = Package("rnn-jax", "0.0.2", "first")
rnn_jax(
  "cells.ElmanRNNCell",
  """
  w_hh 4,4 -> 0
  w_ih 4,3 -> 0
  b 4 -> 0
  """,
)
rnn_jax(
  "cells.LongShortTermMemoryCell",
  """
  w_ih 4,4 -> 0
  w_ii 4,3 -> 0
  b_i 4 -> 0
  w_fh 4,4 -> 0
  w_fi 4,3 -> 0
  b_f 4 -> 0
  w_oh 4,4 -> 0
  w_oi 4,3 -> 0
  b_o 4 -> 0
  w_ci 4,3 -> 0
  w_ch 4,4 -> 0
  b_c 4 -> 0
  """,
)
rnn_jax(
  "cells.gated.GatedRecurrentUnitCell",
  """
  w_ih 4,4 -> 0
  w_fh 4,4 -> 0
  b_i 4 -> 0
  b_f 4 -> 0
  w_ii 4,3 -> 0
  w_fi 4,3 -> 0
  """,
)
rnn_jax(
  "cells.LongShortTermMemory",
  """
  lstm/weight_ih 16,3 -> 0 x4
  lstm/weight_hh 16,4 -> 0 x4
  lstm/bias 16 -> 0 x4
  """,
)
rnn_jax(
  "cells.IndRNNCell",
  """
  w_hh 4 -> 0
  w_ih 4,3 -> 0
  b 4 -> 0
  """,
)
rnn_jax(
  "cells.AntiSymmetricRNNCell",
  """
  w_hh 4,4 -> 0
  w_in 4,3 -> 0
  b 4 -> 0
  """,
)
rnn_jax(
  "cells.CoupledOscillatoryRNNCell",
  """
  w_in 4,3 -> 0
  w_h 4,4 -> 0
  w_z 4,4 -> 0
  b 4 -> 0
  """,
)
rnn_jax(
  "ssm.LinearRecurrentUnit",
  """
  nu_log 4 -> 0 of state
  theta_log 4 -> 0 of state
  gamma_log 4 -> 0 of state
  W_in 4,3 -> 0 of state
  W_out 5,4 -> 0 of out
  W_skip 5,3 -> 0 of out
  """,
)
rnn_jax(
  "ssm.GLUMixer and FFNMixer",
  """
  0/gate_projection/weight 5,4 -> 0
  0/gate_projection/bias 5 -> 0
  0/main_projection/weight 5,4 -> 0
  0/main_projection/bias 5 -> 0
  1/pre_projection/weight 6,4 -> 0
  1/pre_projection/bias 6 -> 0
  1/post_projection/weight 5,6 -> 0
  1/post_projection/bias 5 -> 0
  """,
)
discretax = Package("discretax", "0.3.0", "first")
discretax(
  "sequence_mixers.S5SequenceMixer",
  """
  Lambda_re 6 -> 0 of state
  Lambda_im 6 -> 0 of state
  B 6,4,2 -> 0 of state
  log_step 6,1 -> 0 of state
  C 4,6,2 -> 0 of out
  D 4 -> 0 of out
  """,
)
discretax(
  "sequence_mixers.LRUSequenceMixer",
  """
  nu_log 6 -> 0 of state
  theta_log 6 -> 0 of state
  gamma_log 6 -> 0 of state
  B_re 6,4 -> 0 of state
  B_im 6,4 -> 0 of state
  C_re 4,6 -> 0 of out
  C_im 4,6 -> 0 of out
  D 4 -> 0 of out
  """,
)
discretax(
  "sequence_mixers.LinOSSSequenceMixer",
  """
  A_diag 6 -> 0 of state
  G_diag 6 -> 0 of state
  steps 6 -> 0 of state
  B 6,4,2 -> 0 of state
  C 4,6,2 -> 0 of out
  D 4 -> 0 of out
  """,
)
discretax(
  "channel_mixers.GLU and SwiGLU",
  """
  w1/weight 4,4 -> 0
  w1/bias 4 -> 0
  w2/weight 4,4 -> 0
  w2/bias 4 -> 0
  gate_proj/weight 12,4 -> 0
  up_proj/weight 12,4 -> 0
  down_proj/weight 4,12 -> 0
  """,
)
memorax = Package("memorax", "1.0.1")
memorax(
  "networks.sequence_models.S5Cell",
  """
  lambda_real 4 -> 0 of state
  lambda_imag 4 -> 0 of state
  log_step 4,1 -> 0 of state
  b 4,3,2 -> 0 of state
  c 3,4,2 -> 0 of out
  d 3 -> 0 of out
  """,
)
memorax(
  "networks.sequence_models.LRUCell",
  """
  nu_log 4 -> 0 of state
  theta_log 4 -> 0 of state
  gamma_log 4 -> 0 of state
  B_real 4,3 -> 0 of state
  B_imag 4,3 -> 0 of state
  C_real 3,4 -> 0 of out
  C_imag 3,4 -> 0 of out
  D 3 -> 0 of out
  """,
)
memorax(
  "networks.sequence_models.MinGRUCell and mLSTMCell projections",
  """
  in_proj/kernel 8,8 -> 1
  q/kernel 8,8 -> 1
  k/kernel 8,8 -> 1
  v/kernel 8,8 -> 1
  wf/kernel 24,2 -> 1
  wf/bias 2 -> 0
  wi/kernel 24,2 -> 1
  wi/bias 2 -> 0
  """,
)
mamba2 = Package("mamba2-jax", "1.1.2")
mamba2(
  "Mamba2ForCausalLM",
  """
  backbone/embedder/embedding 11,8 -> 1
  backbone/final_norm/weight 8 -> 0
  backbone/layers/0/mixer/A_log 4 -> 0 of A
  backbone/layers/0/mixer/D 4 -> 0 of D
  backbone/layers/0/mixer/dt_bias 4 -> 0 of dt
  backbone/layers/0/mixer/conv1d/conv/kernel 4,1,24 -> 2
  backbone/layers/0/mixer/conv1d/conv/bias 24 -> 0
  backbone/layers/0/mixer/in_proj/kernel 8,44 -> 1
  backbone/layers/0/mixer/norm/weight 16 -> 0
  backbone/layers/0/mixer/out_proj/kernel 16,8 -> 1
  backbone/layers/0/norm/weight 8 -> 0
  """,
)
mamba3 = Package("mamba3-jax", "1.0.1")
mamba3(
  "Mamba3Mixer",
  """
  B_bias 4,1,4 -> 0,2 of B
  C_bias 4,1,4 -> 0,2 of C
  B_norm/weight 4 -> 0
  C_norm/weight 4 -> 0
  D 4 -> 0 of D
  dt_bias 4 -> 0 of dt
  in_proj/kernel 8,53 -> 1
  out_proj/kernel 16,8 -> 1
  """,
)
recurrentgemma = Package("recurrentgemma", "1.0.1")
recurrentgemma(
  "jax.layers.BlockDiagonalLinear (cube)",
  """
  w 4,4,4 -> 0,2
  b 4,4 -> 0,1
  """,
)
recurrentgemma(
  "jax.modules.RecurrentBlock",
  """
  conv_1d/w 4,12 -> 1
  conv_1d/b 12 -> 0
  linear_x/kernel 8,12 -> 1
  linear_x/bias 12 -> 0
  linear_y/kernel 8,12 -> 1
  linear_y/bias 12 -> 0
  linear_out/kernel 12,8 -> 1
  linear_out/bias 8 -> 0
  rg_lru/a_param 12 -> 0 of a
  rg_lru/a_gate/w 4,3,3 -> 0,2
  rg_lru/a_gate/b 4,3 -> 0,1
  rg_lru/input_gate/w 4,3,3 -> 0,2
  rg_lru/input_gate/b 4,3 -> 0,1
  """,
)
recurrentgemma(
  "jax.modules.MLPBlock and Embedder",
  """
  embedder/input_embedding 16,8 -> 1
  ffw_up/w 2,8,12 -> 0,2
  ffw_up/b 2,1,1,12 -> 0,3
  ffw_down/kernel 12,8 -> 1
  ffw_down/bias 8 -> 0
  """,
)
recurrentgemma(
  "jax.modules.LocalAttentionBlock",
  """
  proj_q/kernel 8,8 -> 1
  proj_k/kernel 8,4 -> 1
  proj_v/kernel 8,4 -> 1
  proj_final/kernel 8,8 -> 1
  proj_final/bias 8 -> 0
  """,
)

# --- transformers

gemma = Package("gemma", "4.0.1")
gemma(
  "gm.nn.Block",
  """
  embedder/input_embedding 11,8 -> 1
  layer_0/attn/q_einsum/w 2,8,4 -> 0,2
  layer_0/attn/kv_einsum/w 2,1,8,4 -> 0,1,3
  layer_0/attn/attn_vec_einsum/w 2,4,8 -> 2
  layer_0/attn/_query_norm/scale 4 -> 0
  layer_0/attn/_key_norm/scale 4 -> 0
  layer_0/mlp/gating_einsum 2,8,12 -> 0,2 of gating
  layer_0/mlp/linear 12,8 -> 1 of linear
  layer_0/pre_attention_norm/scale 8 -> 0
  layer_0/post_attention_norm/scale 8 -> 0
  layer_0/pre_ffw_norm/scale 8 -> 0
  final_norm/scale 8 -> 0
  """,
)
attnax = Package("attnax", "0.2.0")
attnax(
  "MixtureOfExperts",
  """
  router 4,3 -> 1 of router
  gate_proj 3,4,6 -> 0,2 of gate
  up_proj 3,4,6 -> 0,2 of up
  down_proj 3,6,4 -> 0,2 of down
  """,
)
attnax(
  "VisionTransformer",
  """
  cls_token 1,1,8 -> 2
  patch_embed/proj/kernel 4,4,3,8 -> 3
  patch_embed/proj/bias 8 -> 0
  pos_embed/embedding 5,8 -> 1
  layers/0/ffn/dense1/kernel 8,16 -> 1
  layers/0/ffn/dense1/bias 16 -> 0
  layers/0/ffn/dense2/kernel 16,8 -> 1
  layers/0/ffn/dense2/bias 8 -> 0
  layers/0/ln1/scale 8 -> 0
  layers/0/ln1/bias 8 -> 0
  layers/0/self_attn/query_proj/kernel 8,8 -> 1
  layers/0/self_attn/query_proj/bias 8 -> 0
  layers/0/self_attn/key_proj/kernel 8,4 -> 1
  layers/0/self_attn/key_proj/bias 4 -> 0
  layers/0/self_attn/value_proj/kernel 8,4 -> 1
  layers/0/self_attn/value_proj/bias 4 -> 0
  layers/0/self_attn/output_proj/kernel 8,8 -> 1
  layers/0/self_attn/output_proj/bias 8 -> 0
  final_norm/scale 8 -> 0
  final_norm/bias 8 -> 0
  head/kernel 8,3 -> 1
  head/bias 3 -> 0
  """,
)
attnax(
  "EncoderBlock (swiglu)",
  """
  ffn/gate_proj/kernel 8,16 -> 1
  ffn/gate_proj/bias 16 -> 0
  ffn/up_proj/kernel 8,16 -> 1
  ffn/up_proj/bias 16 -> 0
  ffn/down_proj/kernel 16,8 -> 1
  ffn/down_proj/bias 8 -> 0
  ln1/scale 8 -> 0
  ln1/bias 8 -> 0
  """,
)
surjectors = Package("surjectors", "0.4.0")
surjectors(
  "nn.MADE",
  """
  made/~/masked_linear/w 4,8 -> 1
  made/~/masked_linear/b 8 -> 0
  made/~/masked_linear_1/w 8,8 -> 1
  made/~/masked_linear_1/b 8 -> 0
  made/~/masked_linear_2/w 8,8 -> 1
  made/~/masked_linear_2/b 8 -> 0
  """,
)
surjectors(
  "nn.make_transformer",
  """
  linear/w 8,8 -> 1
  linear/b 8 -> 0
  __encoder_layer/layer_norm/scale 8 -> 0
  __encoder_layer/layer_norm/offset 8 -> 0
  __encoder_layer/mlp/~/linear_0/w 8,16 -> 1
  __encoder_layer/mlp/~/linear_0/b 16 -> 0
  __encoder_layer/mlp/~/linear_1/w 16,8 -> 1
  __encoder_layer/mlp/~/linear_1/b 8 -> 0
  __encoder_layer/multi_head_attention/key/w 8,8 -> 1
  __encoder_layer/multi_head_attention/key/b 8 -> 0
  __encoder_layer/multi_head_attention/linear/w 8,8 -> 1
  __encoder_layer/multi_head_attention/linear/b 8 -> 0
  __encoder_layer/multi_head_attention/query/w 8,8 -> 1
  __encoder_layer/multi_head_attention/query/b 8 -> 0
  __encoder_layer/multi_head_attention/value/w 8,8 -> 1
  __encoder_layer/multi_head_attention/value/b 8 -> 0
  __autoregressive_transformer_encoder/linear/w 8,6 -> 1
  __autoregressive_transformer_encoder/linear/b 6 -> 0
  """,
)
clip_jax = Package("clip-jax", "0.0.6")
clip_jax(
  "modeling.CLIPModel (projections and scale)",
  """
  text_projection/kernel 8,6 -> 1
  visual_projection/kernel 8,6 -> 1
  logit_scale 1 -> 0 of scale
  """,
)

# --- Kolmogorov-Arnold layers, potentials, operators

jaxkan = Package("jaxkan", "0.3.7")
jaxkan(
  "layers.ChebyshevLayer",
  """
  c_basis 4,3,5 -> 0
  bias 4 -> 0
  """,
)
jaxkan(
  "layers.SplineLayer",
  """
  c_basis 4,3,6 -> 0
  c_res 4,3 -> 0
  c_spl 4,3 -> 0
  bias 4 -> 0
  """,
)
jaxkan(
  "layers.FourierLayer",
  """
  c_cos 4,3,5 -> 0
  c_sin 4,3,5 -> 0
  bias 4 -> 0
  """,
)
jaxkan(
  "layers.SineLayer",
  """
  c_basis 4,3,5 -> 0
  bias 4 -> 0
  omega 5,1 -> 0 of omega
  phase 5,1 -> 0 of phase
  """,
)
jaxkan(
  "layers.Dense.DenseLayer (weight normalisation)",
  """
  v 3,4 -> 1
  g 4 -> 0
  b 4 -> 0
  """,
)
jaxkan(
  "models.KAN (spline)",
  """
  layers/0/c_basis 5,2,6 -> 0
  layers/0/c_res 5,2 -> 0
  layers/0/c_spl 5,2 -> 0
  layers/0/bias 5 -> 0
  layers/1/c_basis 1,5,6 -> 0
  layers/1/c_res 1,5 -> 0
  layers/1/c_spl 1,5 -> 0
  layers/1/bias 1 -> 0
  """,
)
jaxkan(
  "models.RGAKAN (equal widths)",
  """
  U/c_basis 5,5,4 -> 0
  U/bias 5 -> 0
  OutLayer/c_basis 1,5,5 -> 0
  OutLayer/bias 1 -> 0
  blocks/0/InputLayer/c_basis 5,5,4 -> 0
  blocks/0/InputLayer/bias 5 -> 0
  blocks/0/alpha - -> - of alpha
  """,
)
ott = Package("ott-jax", "0.6.0")
ott(
  "neural.networks.layers.posdef.PositiveDense",
  """
  kernel 3,4 -> 1
  bias 4 -> 0
  """,
)
ott(
  "neural.networks.layers.posdef.PosDefPotentials",
  """
  diag_kernel 4,3 -> 1
  lin_kernel 4,3 -> 1
  quad_kernel 3,4,2 -> 0
  bias 3 -> 0
  """,
)
ott(
  "neural.networks.icnn.ICNN",
  """
  w_xs_0/diag_kernel 4,8 -> 1
  w_xs_0/lin_kernel 4,8 -> 1
  w_xs_0/quad_kernel 8,4,1 -> 0
  w_xs_0/bias 8 -> 0
  w_xs_1/diag_kernel 4,8 -> 1
  w_xs_1/lin_kernel 4,8 -> 1
  w_xs_1/quad_kernel 8,4,1 -> 0
  w_xs_1/bias 8 -> 0
  w_zs_0/kernel 8,8 -> 1
  """,
)
pdequinox = Package("pdequinox", "0.1.2", "first")
pdequinox(
  "arch.ClassicFNO",
  """
  lifting/weight 4,2,1 -> 0
  lifting/bias 4,1 -> 0,1
  blocks/0/spectral_conv/weights_real 1,4,4,5 -> 1
  blocks/0/spectral_conv/weights_imag 1,4,4,5 -> 1
  blocks/0/by_pass_conv/weight 4,4,1 -> 0
  blocks/0/by_pass_conv/bias 4,1 -> 0,1
  projection/weight 3,4,1 -> 0
  projection/bias 3,1 -> 0,1
  """,
)
pdequinox(
  "arch.ClassicUNet",
  """
  lifting/conv_1/weight 4,2,3 -> 0
  lifting/conv_1/bias 4,1 -> 0,1
  lifting/norm_1/weight 4 -> 0
  lifting/norm_1/bias 4 -> 0
  down_sampling_blocks/0/weight 4,4,3 -> 0
  down_sampling_blocks/0/bias 4,1 -> 0,1
  left_arc_blocks/0/0/conv_1/weight 8,4,3 -> 0
  left_arc_blocks/0/0/conv_1/bias 8,1 -> 0,1
  up_sampling_blocks/0/weight 4,8,3 -> 0
  up_sampling_blocks/0/bias 4,1 -> 0,1
  projection/weight 3,4,1 -> 0
  projection/bias 3,1 -> 0,1
  """,
)
opifex = Package("opifex", "0.2.10")
opifex(
  "neural.operators.fno.FourierLayer",
  """
  weights_real 4,4,5,5 -> 1
  weights_imag 4,4,5,5 -> 1
  """,
)
clifford = Package("cliffordlayers", "0.1.1")
clifford(
  "nn.CliffordLinear, as an nnx module",
  """
  weight 4,4,4 -> 0,1
  bias 4,4 -> 0,1
  """,
)
clifford(
  "nn.CliffordLinear, unequal widths",
  """
  l1/weight 4,6,3 -> 0,1
  l1/bias 4,6 -> 0,1
  l2/weight 4,5,5 -> 0,1
  l2/bias 4,5 -> 0,1
  """,
)

# --- graphs, physics, reinforcement learning

jraph = Package("jraph", "0.0.6.dev0")
jraph(
  "GAT",
  """
  linear/w 3,8 -> 1
  linear/b 8 -> 0
  linear_1/w 16,1 -> 1
  linear_1/b 1 -> 0
  """,
)
jraph(
  "GraphNetwork of MLPs",
  """
  edge/~/linear_0/w 10,8 -> 1
  edge/~/linear_0/b 8 -> 0
  edge/~/linear_1/w 8,4 -> 1
  edge/~/linear_1/b 4 -> 0
  node/~/linear_0/w 13,8 -> 1
  node/~/linear_0/b 8 -> 0
  node/~/linear_1/w 8,4 -> 1
  node/~/linear_1/b 4 -> 0
  """,
)
gat = Package("torch-geometric", "2.6")
gat(
  "nn.GATConv, as a linen module (two heads of width four)",
  """
  lin/kernel 3,8 -> 1
  att_src 2,4 -> 0 of src
  att_dst 2,4 -> 0 of dst
  bias 8 -> 0 of lin
  """,
)
gatv2 = Package("gatv2_eqx", "0.1.1", "first")
gatv2(
  "GATv2",
  """
  send_recieve/W_tgt/weight 3,3 -> 0
  send_recieve/W_tgt/bias 3 -> 0
  send_recieve/W_src/weight 3,3 -> 0
  send_recieve/W_src/bias 3 -> 0
  send_recieve/to_score/weight 1,3 -> 0
  """,
)
e3nn = Package("e3nn-jax", "0.21.0")
e3nn(
  "haiku.Linear",
  """
  linear/w[0,0]_6x0e,8x0e 6,8 -> 1 of scalar
  linear/b[0]_8x0e 8 -> 0 of bias
  linear/w[1,1]_5x1o,4x1o 5,4 -> 1 of vector
  """,
)
e3nn(
  "flax.MultiLayerPerceptron",
  """
  Dense_0/kernel 3,8 -> 1
  Dense_1/kernel 8,4 -> 1
  """,
)
e3x = Package("e3x", "1.0.2")
e3x(
  "nn.Dense and Embed",
  """
  embed/embedding 9,1,1,4 -> 3
  dense/0+/kernel 3,4 -> 1
  dense/0+/bias 4 -> 0
  dense/1-/kernel 3,4 -> 1
  """,
)
e3x(
  "nn.TensorDense",
  """
  dense/0+/kernel 3,10 -> 1
  dense/0+/bias 10 -> 0
  dense/1-/kernel 3,10 -> 1
  tensor/kernel 1,2,1,2,2,2,5 -> 6
  """,
)
apax = Package("apax", "0.14.0")
apax(
  "layers.readout.AtomisticReadout",
  """
  dense_0/w 5,8 -> 1
  dense_0/b 8 -> 0
  dense_1/w 8,6 -> 1
  dense_1/b 6 -> 0
  dense_2/w 6,1 -> 1
  dense_2/b 1 -> 0
  """,
)
apax(
  "layers.scaling.PerElementScaleShift",
  """
  scale_per_element 9,1 -> 0 of scale
  shift_per_element 9,1 -> 0 of shift
  """,
)
brax = Package("brax", "0.14.2")
brax(
  "training.networks.make_policy_network",
  """
  params/hidden_0/kernel 6,8 -> 1
  params/hidden_0/bias 8 -> 0
  params/LayerNorm_0/scale 8 -> 0
  params/LayerNorm_0/bias 8 -> 0
  params/hidden_1/kernel 8,8 -> 1
  params/hidden_1/bias 8 -> 0
  params/hidden_2/kernel 8,4 -> 1
  params/hidden_2/bias 4 -> 0
  """,
)
cax = Package("cax", "0.4.4")
cax(
  "core.perceive.ConvPerceive and NCAUpdate",
  """
  perceive/conv/kernel 3,3,1,12 -> 3
  update/layers/0/kernel 1,1,12,8 -> 3
  update/layers/0/bias 8 -> 0
  update/layers/1/kernel 1,1,8,4 -> 3
  update/layers/1/bias 4 -> 0
  """,
)
cax(
  "nn.vae.VAE",
  """
  encoder/convs/0/kernel 3,3,1,4 -> 3
  encoder/convs/0/bias 4 -> 0
  encoder/linear/kernel 24,24 -> 1
  encoder/linear/bias 24 -> 0
  encoder/mean/kernel 24,3 -> 1
  encoder/mean/bias 3 -> 0
  decoder/convs/0/kernel 3,3,6,4 -> 3
  decoder/convs/0/bias 4 -> 0
  decoder/linear/kernel 3,24 -> 1
  decoder/linear/bias 24 -> 0
  """,
)

# --- tuples and lists

stax = Package("jax", "0.12.0.1")
stax(
  "example_libraries.stax.serial(Dense, Dense)",
  """
  0/0 4,5 -> 1
  0/1 5 -> 0
  2/0 5,3 -> 1
  2/1 3 -> 0
  """,
)
stax(
  "example_libraries.stax.Conv and BatchNorm",
  """
  0/0 3,3,1,5 -> 3
  0/1 1,1,1,5 -> 3
  1/0 5 -> 0 of beta
  1/1 5 -> 0 of beta
  2/0 180,3 -> 1
  2/1 3 -> 0
  """,
)
numpyro = Package("numpyro", "0.22.0")
numpyro(
  "nn.AutoregressiveNN",
  """
  0/0 3,8 -> 1
  0/1 8 -> 0
  2/0 8,8 -> 1
  2/1 8 -> 0
  4/0 8,6 -> 1
  4/1 6 -> 0
  """,
)
dynamax = Package("dynamax", "1.0.3", "first")
dynamax(
  "linear_gaussian_ssm.LinearGaussianSSM (weights and biases)",
  """
  dynamics/weights 3,3 -> 0
  dynamics/bias 3 -> 0
  emissions/weights 4,3 -> 0
  emissions/bias 4 -> 0
  """,
)


# --- ten further packages, after the rules

flowmc = Package("flowMC", "0.6.5", "first", further=True)
flowmc(
  "resource.model.nf_model.realNVP.RealNVP",
  """
  affine_coupling/bijector/scale_MLP/layers/0/weight 2,6,3 -> 0,1
  affine_coupling/bijector/scale_MLP/layers/0/bias 2,6 -> 0,1
  affine_coupling/bijector/scale_MLP/layers/2/weight 2,3,6 -> 0,1
  affine_coupling/bijector/scale_MLP/layers/2/bias 2,3 -> 0,1
  affine_coupling/bijector/shift_MLP/layers/0/weight 2,6,3 -> 0,1
  affine_coupling/bijector/shift_MLP/layers/0/bias 2,6 -> 0,1
  affine_coupling/bijector/shift_MLP/layers/2/weight 2,3,6 -> 0,1
  affine_coupling/bijector/shift_MLP/layers/2/bias 2,3 -> 0,1
  """,
)
flowmc(
  "resource.model.nf_model.rqSpline.MaskedCouplingRQSpline",
  """
  layers/layers/0/bijector/scale 2 -> 0
  layers/layers/0/bijector/shift 2 -> 0
  layers/layers/1/bijector/conditioner/layers/0/weight 2,6,3 -> 0,1
  layers/layers/1/bijector/conditioner/layers/0/bias 2,6 -> 0,1
  layers/layers/1/bijector/conditioner/layers/2/weight 2,39,6 -> 0,1
  layers/layers/1/bijector/conditioner/layers/2/bias 2,39 -> 0,1
  """,
)
esm2quinox = Package("esm2quinox", "0.2.0", "first", further=True)
esm2quinox(
  "ESM2",
  """
  embedding/weight 33,8 -> 1
  layers/attn/query_proj/weight 2,8,8 -> 0,1
  layers/attn/query_proj/bias 2,8 -> 0,1
  layers/attn/key_proj/weight 2,8,8 -> 0,1
  layers/attn/key_proj/bias 2,8 -> 0,1
  layers/attn/value_proj/weight 2,8,8 -> 0,1
  layers/attn/value_proj/bias 2,8 -> 0,1
  layers/attn/output_proj/weight 2,8,8 -> 0,1
  layers/attn/output_proj/bias 2,8 -> 0,1
  layers/layer_norm1/weight 2,8 -> 0,1
  layers/layer_norm1/bias 2,8 -> 0,1
  layers/linear1/weight 2,32,8 -> 0,1
  layers/linear1/bias 2,32 -> 0,1
  layers/linear2/weight 2,8,32 -> 0,1
  layers/linear2/bias 2,8 -> 0,1
  layer_norm/weight 8 -> 0
  layer_norm/bias 8 -> 0
  logit_head/linear1/weight 8,8 -> 0
  logit_head/linear1/bias 8 -> 0
  logit_head/linear2/weight 33,8 -> 0
  logit_head/linear2/bias 33 -> 0
  """,
)
deepvit = Package("deepvit-flax", "0.0.3", further=True)
deepvit(
  "deepvit.DeepViT",
  """
  Dense_0/kernel 48,8 -> 1
  Dense_0/bias 8 -> 0
  Dense_1/kernel 8,3 -> 1
  Dense_1/bias 3 -> 0
  LayerNorm_0/scale 8 -> 0
  LayerNorm_0/bias 8 -> 0
  Transformer_0/Attention_0/Dense_0/kernel 8,24 -> 1
  Transformer_0/Attention_0/Dense_1/kernel 8,8 -> 1
  Transformer_0/Attention_0/Dense_1/bias 8 -> 0
  Transformer_0/Attention_0/LayerNorm_0/scale 2 -> 0
  Transformer_0/Attention_0/LayerNorm_0/bias 2 -> 0
  Transformer_0/Attention_0/reattn_weights 2,2 -> 1 of heads
  Transformer_0/FeedForward_0/Dense_0/kernel 8,16 -> 1
  Transformer_0/FeedForward_0/Dense_0/bias 16 -> 0
  Transformer_0/FeedForward_0/Dense_1/kernel 16,8 -> 1
  Transformer_0/FeedForward_0/Dense_1/bias 8 -> 0
  cls 1,1,8 -> 2 of cls
  pos_embedding 1,5,8 -> 2 of position
  """,
)
botnet = Package("bottleneck-transformer-flax", "0.0.1", further=True)
botnet(
  "botnet.BoTMHSA",
  """
  RelativeLogits_0/rel_pos_emb_h 7,4 -> 1 of height
  RelativeLogits_0/rel_pos_emb_w 7,4 -> 1 of width
  key/kernel 1,1,8,8 -> 3
  query/kernel 1,1,8,8 -> 3
  value/kernel 1,1,8,8 -> 3
  """,
)
flaxdiff = Package("flaxdiff", "0.2.11", further=True)
flaxdiff(
  "models.attention.BasicTransformerBlock",
  """
  Attention1/to_q/kernel 8,2,4 -> 1,2
  Attention1/to_q/bias 2,4 -> 0,1
  Attention1/to_k/kernel 8,2,4 -> 1,2
  Attention1/to_k/bias 2,4 -> 0,1
  Attention1/to_v/kernel 8,2,4 -> 1,2
  Attention1/to_v/bias 2,4 -> 0,1
  Attention1/to_out_0/kernel 2,4,8 -> 2
  Attention1/to_out_0/bias 8 -> 0
  ff/net_0/proj/kernel 8,64 -> 1
  ff/net_0/proj/bias 64 -> 0
  ff/net_2/kernel 32,8 -> 1
  ff/net_2/bias 8 -> 0
  norm1/scale 8 -> 0
  norm2/scale 8 -> 0
  norm3/scale 8 -> 0
  """,
)
flaxdiff(
  "models.ssm_dit.S5Layer (a time step for each feature)",
  """
  A_imag 4 -> 0 of state
  log_A_real 4 -> 0 of state
  B_re 4,3 -> 0 of state
  B_im 4,3 -> 0 of state
  C_re 3,4 -> 0 of out
  C_im 3,4 -> 0 of out
  D 3 -> 0 of out
  log_dt 3 -> 0 of time
  """,
)
glru = Package("flax-gated-linear-rnn", "1.0.3", further=True)
glru(
  "gated_linear_rnn.GatedLinearRNN",
  """
  proj/kernel 6,24 -> 1
  proj/bias 24 -> 0
  out_proj/kernel 8,6 -> 1
  out_proj/bias 6 -> 0
  """,
)
eqx_zoo = Package("eqx-zoo", "0.3.5", "first", further=True)
eqx_zoo(
  "layers.SparseMoE",
  """
  gate/weight 3,4 -> 0
  experts/gate_proj/weight 3,6,4 -> 0,1
  experts/up_proj/weight 3,6,4 -> 0,1
  experts/down_proj/weight 3,4,6 -> 0,1
  """,
)
dantinox = Package("dantinox", "0.4.14", further=True)
dantinox(
  "core.attention.GQAAttention (differential)",
  """
  qkv/kernel 8,16 -> 1
  q2k2/kernel 8,12 -> 1
  o_proj/kernel 8,8 -> 1
  o_proj/bias 8 -> 0
  lambda_q1 2,4 -> 0 of q1
  lambda_k1 2,4 -> 0 of k1
  lambda_q2 2,4 -> 0 of q2
  lambda_k2 2,4 -> 0 of k2
  diff_norm/scale 4 -> 0
  """,
)
healswin = Package("heal-swin-nnx", "0.2.0", further=True)
healswin(
  "models.swin.WindowAttention",
  """
  logit_scale 2,1,1 -> 0 of scale
  relative_position_bias_table 9,2 -> 1 of table
  qkv/kernel 8,24 -> 1
  qkv/bias 24 -> 0
  proj/kernel 8,8 -> 1
  proj/bias 8 -> 0
  """,
)
unirep = Package("jax_unirep", "3.0.0", further=True)
unirep(
  "models.MLSTM (one cell, with its head)",
  """
  embedding 24,3 -> 1
  cells/0/wmx 3,5 -> 1 of multiplied
  cells/0/wmh 5,5 -> 1 of multiplied
  cells/0/gmx 5 -> 0 of multiplied
  cells/0/gmh 5 -> 0 of multiplied
  cells/0/wx 3,20 -> 1 x4
  cells/0/wh 5,20 -> 1 x4
  cells/0/gx 20 -> 0 x4
  cells/0/gh 20 -> 0 x4
  cells/0/b 20 -> 0 x4
  dense_w 5,25 -> 1 of dense
  dense_b 25 -> 0 of dense
  """,
)


# --- ten more, after the rules had learned from those above

jraphx = Package("jraphx", "0.1.0", further=True)
jraphx(
  "nn.conv.GATConv (two heads, edge features)",
  """
  lin/kernel 3,10 -> 1
  bias 10 -> 0 of lin
  att_src 2,5 -> 0 of src
  att_dst 2,5 -> 0 of dst
  att_edge 2,5 -> 0 of edge
  lin_edge/kernel 7,10 -> 1
  """,
)
jraphx(
  "nn.conv.GATv2Conv (two heads, edge features)",
  """
  lin_l/kernel 3,10 -> 1
  lin_l/bias 10 -> 0
  lin_r/kernel 3,10 -> 1
  lin_r/bias 10 -> 0
  lin_edge/kernel 7,10 -> 1
  att 2,5 -> 0 of att
  bias 10 -> 0 of bias
  """,
)
jraphx(
  "nn.conv.GCNConv",
  """
  linear/kernel 3,5 -> 1
  bias 5 -> 0 of linear
  """,
)
jraphx(
  "nn.conv.GCNConv, square",
  """
  linear/kernel 5,5 -> 1
  bias 5 -> 0 of linear
  """,
)
jraphx(
  "nn.conv.TransformerConv",
  """
  lin_qkv/kernel 3,30 -> 1
  lin_qkv/bias 30 -> 0
  lin_edge/kernel 7,10 -> 1
  lin_skip/kernel 3,10 -> 1
  lin_skip/bias 10 -> 0
  lin_beta/kernel 30,1 -> 1
  """,
)
jraphx(
  "nn.conv.SAGEConv",
  """
  lin/kernel 3,5 -> 1
  lin_r/kernel 3,5 -> 1
  lin_r/bias 5 -> 0
  """,
)
jraphx(
  "nn.pool.TopKPooling",
  """
  pool/weight 1,5 -> 0
  """,
)
jraphx(
  "nn.norm.GraphNorm",
  """
  weight 5 -> 0
  bias 5 -> 0
  mean_scale 5 -> 0
  """,
)
ion = Package("ion-nn", "0.18.2", further=True)
ion(
  "nn.RNNCell",
  """
  cell/w_i/_value 3,4 -> 1 of cell
  cell/w_h/_value 4,4 -> 1 of cell
  cell/b/_value 4 -> 0 of cell
  """,
)
ion(
  "nn.LSTMCell",
  """
  cell/w_i/_value 3,16 -> 1 of cell x4
  cell/w_h/_value 4,16 -> 1 of cell x4
  cell/b/_value 16 -> 0 of cell x4
  """,
)
ion(
  "nn.GRUCell",
  """
  cell/w_i/_value 3,12 -> 1 of cell x3
  cell/w_h/_value 4,12 -> 1 of cell x3
  cell/b/_value 12 -> 0 of cell x3
  cell/b_h/_value 12 -> 0 of cell x3
  """,
)
ion(
  "nn.S4DCell",
  """
  cell/A_log_re/_value 3,4 -> 0 of cell
  cell/A_im/_value 3,4 -> 0 of cell
  cell/C/_value 3,4 -> 0 of cell
  cell/D/_value 3 -> 0 of cell
  cell/log_dt/_value 3 -> 0 of cell
  """,
)
ion(
  "nn.S5Cell",
  """
  cell/A_log_re/_value 4 -> 0 of states
  cell/A_im/_value 4 -> 0 of states
  cell/log_dt/_value 4 -> 0 of states
  cell/B/_value 3,4 -> 1 of states
  cell/C/_value 4,3 -> 1 of outputs
  cell/D/_value 3 -> 0 of outputs
  """,
)
ion(
  "nn.Linear, LayerNorm, Conv, Embedding",
  """
  layers/0/w/_value 3,3,3,5 -> 3 of conv
  layers/0/b/_value 5 -> 0 of conv
  layers/1/scale/_value 5 -> 0 of norm
  layers/1/b/_value 5 -> 0 of norm
  layers/2/w/_value 5,4 -> 1 of linear
  layers/2/b/_value 4 -> 0 of linear
  embed/w/_value 7,5 -> 1 of embed
  """,
)
ion(
  "nn.MultiHeadAttention",
  """
  w_q/_value 6,8 -> 1 of q
  w_k/_value 6,8 -> 1 of k
  w_v/_value 6,8 -> 1 of v
  w_out/_value 8,6 -> 1 of out
  b_out/_value 6 -> 0 of out
  """,
)
ion(
  "gnn.GATConv (two heads of width two)",
  """
  w_sender/_value 3,4 -> 1 of sender
  b_out/_value 4 -> 0 of sender
  att_sender/_value 2,2 -> 0 of att_sender
  att_receiver/_value 2,2 -> 0 of att_receiver
  w_edge/_value 7,4 -> 1 of edge
  att_edge/_value 2,2 -> 0 of att_edge
  """,
)
ion(
  "gnn.RGCNConv",
  """
  w_neigh/_value 2,3,5 -> 2 of out
  w_root/_value 3,5 -> 1 of out
  b/_value 5 -> 0 of out
  """,
)
ion(
  "gnn.GraphConv",
  """
  w_neigh/_value 3,5 -> 1 of out
  w_root/_value 3,5 -> 1 of out
  b/_value 5 -> 0 of out
  """,
)
ion(
  "gnn.GatedGCNConv",
  """
  w_root/_value 3,5 -> 1 of node
  w_neigh/_value 3,5 -> 1 of node
  b_node/_value 5 -> 0 of node
  w_edge/_value 7,5 -> 1 of edge
  w_sender/_value 3,5 -> 1 of edge
  w_receiver/_value 3,5 -> 1 of edge
  b_edge/_value 5 -> 0 of edge
  """,
)
ion(
  "gnn.MultiHeadAttentionPool",
  """
  seeds/_value 1,4 -> 1 of seeds
  w_k/_value 3,4 -> 1 of k
  w_v/_value 3,4 -> 1 of v
  w_out/_value 4,4 -> 1 of out
  b_out/_value 4 -> 0 of out
  """,
)
inox = Package("inox", "0.8.0", further=True)
inox(
  "nn.MLP of Linear",
  """
  layers/0/weight 3,5 -> 1
  layers/0/bias 5 -> 0
  layers/1/weight 5,5 -> 1
  layers/1/bias 5 -> 0
  """,
)
inox(
  "nn.Conv",
  """
  conv/kernel 3,3,3,5 -> 3
  conv/bias 5 -> 0
  """,
)
inox(
  "nn.GRUCell",
  """
  cell/lin_h/weight 4,12 -> 1 of cell x3
  cell/lin_h/bias 12 -> 0 of cell x3
  cell/lin_x/weight 3,12 -> 1 of cell x3
  cell/lin_x/bias 12 -> 0 of cell x3
  """,
)
inox(
  "nn.LSTMCell",
  """
  cell/lin_h/weight 4,16 -> 1 of cell x4
  cell/lin_h/bias 16 -> 0 of cell x4
  cell/lin_x/weight 3,16 -> 1 of cell x4
  cell/lin_x/bias 16 -> 0 of cell x4
  """,
)
inox(
  "nn.S4",
  """
  A/imag 4 -> 0 of states
  A/log_real 4 -> 0 of states
  B/imag 4 -> 0 of states
  B/real 4 -> 0 of states
  P/imag 4 -> 0 of states
  P/real 4 -> 0 of states
  C/imag 4 -> - of output
  C/real 4 -> - of output
  log_dt - -> - of dt
  """,
)
megalodon = Package("megalodon-jax", "0.2.2", "first", further=True)
megalodon(
  "MegalodonForCausalLM",
  """
  model/embed/weight 11,8 -> 1
  model/layers/0/attn/timenorm/weight 8 -> 0
  model/layers/0/attn/timenorm/bias 8 -> 0
  model/layers/0/attn/cema/alpha 8,3,1 -> 0
  model/layers/0/attn/cema/delta 8,3,1 -> 0
  model/layers/0/attn/cema/theta 8,1,1 -> 0
  model/layers/0/attn/cema/gamma_real 8,3 -> 0
  model/layers/0/attn/cema/gamma_imag 8,3 -> 0
  model/layers/0/attn/cema/omega 8 -> 0
  model/layers/0/attn/rmsnorm/gamma 8 -> 0
  model/layers/0/attn/wz/weight 4,8 -> 0
  model/layers/0/attn/wz/bias 4 -> 0
  model/layers/0/attn/wv/weight 12,8 -> 0
  model/layers/0/attn/wv/bias 12 -> 0
  model/layers/0/attn/wh1/weight 8,8 -> 0
  model/layers/0/attn/wh1/bias 8 -> 0
  model/layers/0/attn/wh2/weight 8,12 -> 0
  model/layers/0/attn/gamma 2,4 -> 0,1
  model/layers/0/attn/beta 2,4 -> 0,1
  model/layers/0/ffn/norm/weight 8 -> 0
  model/layers/0/ffn/norm/bias 8 -> 0
  model/layers/0/ffn/fc1/weight 10,8 -> 0
  model/layers/0/ffn/fc2/weight 8,10 -> 0
  model/norm/weight 8 -> 0
  model/norm/bias 8 -> 0
  lm_head/weight 11,8 -> 0
  """,
)
nano_moe = Package("nano-moe-jax", "0.1.0", further=True)
nano_moe(
  "NanoMoE",
  """
  Embed_0/embedding 11,8 -> 1
  pos_emb 1,6,8 -> 2 of pos_emb
  block_0/LayerNorm_0/scale 8 -> 0
  block_0/LayerNorm_0/bias 8 -> 0
  block_0/MoELayer_0/Router_0/Dense_0/kernel 8,3 -> 1
  block_0/MoELayer_0/expert_0/Dense_0/kernel 8,12 -> 1
  block_0/MoELayer_0/expert_0/Dense_0/bias 12 -> 0
  block_0/MoELayer_0/expert_0/Dense_1/kernel 12,8 -> 1
  block_0/MoELayer_0/expert_0/Dense_1/bias 8 -> 0
  block_0/MultiHeadAttention_0/Dense_0/kernel 8,24 -> 1
  block_0/MultiHeadAttention_0/Dense_0/bias 24 -> 0
  block_0/MultiHeadAttention_0/Dense_1/kernel 8,8 -> 1
  block_0/MultiHeadAttention_0/Dense_1/bias 8 -> 0
  Dense_0/kernel 8,11 -> 1
  Dense_0/bias 11 -> 0
  """,
)
long_range = Package("long-range-models", "0.0.1", further=True)
long_range(
  "LRULayer",
  """
  B_re 4,3 -> 0 of states
  B_im 4,3 -> 0 of states
  gamma_log 4 -> 0 of states
  nu_log 4 -> 0 of states
  theta_log 4 -> 0 of states
  C_re 3,4 -> 0 of outputs
  C_im 3,4 -> 0 of outputs
  D 3 -> 0 of outputs
  """,
)
long_range(
  "S5Layer",
  """
  B_comps 2,4,3 -> 1 of states
  Lambda_re 4 -> 0 of states
  Lambda_im 4 -> 0 of states
  log_dt 4 -> 0 of states
  C_comps 2,3,4 -> 1 of outputs
  D 3 -> 0 of outputs
  """,
)
nanodl = Package("nanodl", "0.0.0", further=True)
nanodl(
  "FourierKANLinear",
  """
  layer/cosine_coefficients 3,5,4 -> 1
  layer/sine_coefficients 3,5,4 -> 1
  """,
)
nanodl(
  "ChebyKANLinear",
  """
  layer/coefficients 3,5,5 -> 1
  """,
)
nanodl(
  "GraphAttentionLayer",
  """
  W 3,5 -> 1 of W
  a 10,1 -> 1 of a
  """,
)
nanodl(
  "SparseMixtureOfExperts",
  """
  experts_0/dense1/kernel 4,6 -> 1
  experts_0/dense1/bias 6 -> 0
  experts_0/dense2/kernel 6,5 -> 1
  experts_0/dense2/bias 5 -> 0
  gate/kernel 4,3 -> 1
  gate/bias 3 -> 0
  dense_final/kernel 5,5 -> 1
  dense_final/bias 5 -> 0
  """,
)
jimmy = Package("jimmy-vision", "0.0.7", further=True)
jimmy(
  "layers.mamba.MambaVisionMixer",
  """
  A_log 8,3 -> 0 of channels
  D 8 -> 0 of channels
  conv1d_x/kernel 4,1,8 -> 2
  conv1d_x/bias 8 -> 0
  dt_proj/kernel 1,8 -> 1
  dt_proj/bias 8 -> 0
  in_proj/kernel 8,16 -> 1
  x_proj/kernel 8,7 -> 1
  out_proj/kernel 16,8 -> 1
  out_proj/bias 8 -> 0
  """,
)
jimmy(
  "layers.mamba.Mamba2VisionMixer",
  """
  A_log 4 -> 0 of A
  D 4 -> 0 of D
  dt_bias 4 -> 0 of dt
  conv1d_x/kernel 4,1,16 -> 2
  conv1d_x/bias 16 -> 0
  norm/w 16 -> 0
  in_proj/kernel 8,32 -> 1
  x_proj/kernel 16,10 -> 1
  out_proj/kernel 16,8 -> 1
  """,
)
jimmy(
  "layers.attention.LinearAttention, layers.sharing.LoRA",
  """
  attn/lepe/kernel 3,3,1,8 -> 3
  attn/lepe/bias 8 -> 0
  attn/qk/kernel 8,16 -> 1
  attn/qk/bias 16 -> 0
  lora/A/kernel 6,2 -> 1
  lora/B/kernel 2,5 -> 1
  scale/gamma 5 -> 0
  """,
)
ginjax = Package("ginjax", "0.1.8", "first", further=True)
ginjax(
  "layers.ConvContract (without its constant filters)",
  """
  weights/()/0/()/0 5,3,3 -> 0 of scalars
  weights/(False,)/0/()/0 5,3,2 -> 0 of scalars
  bias/()/0 5 -> 0 of scalars
  weights/()/0/(False,)/0 5,3,2 -> 0 of vectors
  weights/(False,)/0/(False,)/0 5,3,5 -> 0 of vectors
  bias/(False,)/0 5 -> 0 of vectors
  """,
)
ginjax(
  "layers.GroupNorm, layers.VectorNeuronNonlinear",
  """
  norm/scale/(False,)/0 4 -> 0 of vectors
  norm/bias/(False,)/0 4 -> 0 of vectors
  norm/vanilla_norm/()/0/weight 4 -> 0 of scalars
  norm/vanilla_norm/()/0/bias 4 -> 0 of scalars
  act/weights/(False,)/0 4,4 -> 0 of act
  """,
)
hypernn = Package("hyper-nn", "0.2.2", further=True)
hypernn(
  "jax.JaxLinearHyperNetwork",
  """
  embedding_module/embedding 3,6 -> 1
  weight_generator/kernel 6,3 -> 1
  weight_generator/bias 3 -> 0
  """,
)
