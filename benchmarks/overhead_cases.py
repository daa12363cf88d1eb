"""The networks on which steps are timed, each on one batch of noise."""

from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from benchmarks.bare import BareMLPProgram
from benchmarks.data.dataset import Split, Splits
from benchmarks.data.text import Level, Text
from benchmarks.engine import Program
from benchmarks.images import ImageData, ImageProgram
from benchmarks.models import build_model
from benchmarks.models.language import OutputLayer, build_language_model
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.text import TextProgram


class Contender(NamedTuple):
  """One optimizer on one network.

  Attributes:
    label: Its name.
    optimizer: Its optimizer, of `benchmarks.optimizers`.
    num_heads: Number of heads; None for an ordinary output layer.
    keep: Number of heads that are left when the time is taken; None for all.
    bare: Whether the library is left out, on the MLP; see `benchmarks.bare`.
  """

  label: str
  optimizer: str
  num_heads: int | None = None
  keep: int | None = None
  bare: bool = False


SGD = Contender("SGD", "sgd")
AGAIN = Contender("SGD again", "sgd")  # how far two equal programs come out apart
PEERS = (
  Contender("Adam", "adam"),
  Contender("Prodigy", "prodigy"),
  Contender("schedule-free AdamW", "schedule_free_adamw"),
)


def alrao(*num_heads: int) -> tuple[Contender, ...]:
  """Returns Alrao with several numbers of heads.

  Args:
    *num_heads: The numbers.
  """
  return tuple(
    Contender(f"Alrao, {n} head{'s' * (n > 1)}", "alrao", n) for n in num_heads
  )


def collapsed(num_heads: int) -> Contender:
  """Returns Alrao after `alrao_jax.collapse` has left one head.

  Args:
    num_heads: How many there were.
  """
  return Contender(f"Alrao, 1 head left of {num_heads}", "alrao", num_heads, keep=1)


def bare(num_heads: int) -> Contender:
  """Returns the arithmetic of Alrao with none of the library around it.

  Args:
    num_heads: Number of heads.
  """
  return Contender(f"bare arithmetic, {num_heads} heads", "alrao", num_heads, bare=True)


class TimedProgram(Program, Protocol):
  """A program whose optimizer can be asked for, to take heads out of its state."""

  def make_optimizer(self, key: jax.Array, rate: Any) -> optax.GradientTransformation:
    """Returns its optimizer."""
    ...


class Trainable(Protocol):
  """A network at one size, and one batch for it."""

  def program(self, contender: Contender) -> TimedProgram:
    """Returns the program of its benchmark, on one batch of noise.

    Args:
      contender: What trains it.
    """
    ...


class Network(Trainable, Protocol):
  """One whose steps are compared."""

  @property
  def title(self) -> str:
    """What it is, for a table's heading."""
    ...

  def output_bytes(self, num_heads: int | None) -> int:
    """Returns the bytes of all outputs that a step holds at once.

    Args:
      num_heads: Number of heads; None for an ordinary output layer.
    """
    ...


class Images(NamedTuple):
  """A network that classifies images.

  Attributes:
    network: Its name in `benchmarks.models`.
    width: Factor on its channels.
    batch_size: Number of images in a step.
    side: Side of the images.
    channels: Channels of the images.
    num_classes: Number of classes.
    norm: Its normalisation.
    dtype: Of its computation.
  """

  network: str
  width: float = 1.0
  batch_size: int = 32
  side: int = 32
  channels: int = 3
  num_classes: int = 10
  norm: Any = "batch"
  dtype: DTypeLike = jnp.float32

  @property
  def title(self) -> str:
    """What it is, for a table's heading."""
    kind = "" if self.dtype == jnp.float32 else f", {np.dtype(self.dtype).name}"
    size = (
      "" if self.side <= 32 else f", {self.side} pixels, {self.num_classes:,} classes"
    )
    return f"{self.network}, width {self.width:g}, batch {self.batch_size}{size}{kind}"

  def output_bytes(self, num_heads: int | None) -> int:
    """Returns the bytes of all outputs that a step holds at once.

    Args:
      num_heads: Number of heads; None for an ordinary output layer.
    """
    # The output layer is float32 always.
    return 4 * (num_heads or 1) * self.batch_size * self.num_classes

  def program(self, contender: Contender) -> ImageProgram:
    """Returns the program of the image benchmarks, on one batch of noise.

    Args:
      contender: What trains it.

    Raises:
      ValueError: It is to be bare, on another network than `benchmarks.bare` knows.
    """
    if contender.bare and (self.network, self.norm) != ("mlp", "none"):
      raise ValueError(
        "Images.program(bare=True) knows the mlp without normalisation, got "
        f"{self.network} with norm={self.norm!r}."
      )
    generator = np.random.default_rng(0)
    shape = (self.batch_size, self.side, self.side, self.channels)
    batch = Split(
      generator.integers(0, 256, shape, dtype=np.uint8),
      generator.integers(0, self.num_classes, self.batch_size).astype(np.int32),
    )
    model = build_model(
      self.network,
      self.num_classes,
      contender.num_heads,
      self.width,
      self.dtype,
      self.norm,
    )
    kind = BareMLPProgram if contender.bare else ImageProgram
    return kind(
      model,
      OPTIMIZERS[contender.optimizer],
      ImageData(Splits(batch, batch, batch)),
      batch_size=self.batch_size,
      max_epochs=1000,
      flip=False,
      augmented=False,
      dtype=self.dtype,
    )


class Symbols(NamedTuple):
  """A network that predicts a text's next symbol.

  Attributes:
    network: ``"lstm"`` or ``"decoder"``.
    length: Symbols of each stream in a step.
    vocabulary_size: Number of symbols; Penn Treebank has 50 characters.
    level: What they are.
    output_layer: The output layer.
    chunks: Into how many parts the positions are divided for the heads' outputs.
    batch_size: Number of streams.
  """

  network: Literal["lstm", "decoder"]
  length: int
  vocabulary_size: int = 50
  level: Level = "characters"
  output_layer: OutputLayer = "softmax"
  chunks: int = 1
  batch_size: int = 20

  @property
  def title(self) -> str:
    """What it is, for a table's heading."""
    return (
      f"{self.network}, {self.vocabulary_size:,} {self.level}, {self.batch_size} "
      f"streams of {self.length}"
    )

  def output_bytes(self, num_heads: int | None) -> int:
    """Returns the bytes of all outputs that a step holds at once.

    Args:
      num_heads: Number of heads; None for an ordinary output layer.
    """
    whole = 4 * self.batch_size * self.length * self.vocabulary_size
    return whole if num_heads is None else num_heads * whole // self.chunks

  def program(self, contender: Contender) -> TextProgram:
    """Returns the program of the text benchmarks, on one batch of noise.

    Args:
      contender: What trains it.

    Raises:
      ValueError: It is to be bare, which only the MLP can be.
    """
    if contender.bare:
      raise ValueError(f"Symbols.program(bare=True) knows no {self.network}.")
    generator = np.random.default_rng(0)
    size = self.batch_size * self.length + 1
    symbols = generator.integers(0, self.vocabulary_size, size).astype(np.int32)
    vocabulary = tuple(str(i) for i in range(self.vocabulary_size))
    model = build_language_model(
      self.network,
      self.vocabulary_size,
      context=self.length,
      output_layer=self.output_layer,
      num_heads=contender.num_heads,
      dropout=0.2,
    )
    return TextProgram(
      model,
      OPTIMIZERS[contender.optimizer],
      Text("noise", self.level, vocabulary, symbols, symbols, symbols, "noise"),
      batch_size=self.batch_size,
      length=self.length,
      epoch_steps=1,
      max_epochs=1000,
      num_validation=size,
      num_test=size,
      chunks=self.chunks,
    )


class Case(NamedTuple):
  """A network and what trains it.

  Attributes:
    network: The network, and its batch.
    contenders: What trains it, beside SGD.
    steps: Number of steps in a contender's turn.
  """

  network: Network
  contenders: tuple[Contender, ...]
  steps: int = 1


_COLLAPSED = collapsed(10)
_ALRAO = (*alrao(10), _COLLAPSED)
_MLP = Images("mlp", 1.0, 128, 28, 1, norm="none")
_RESNET50 = Images("resnet50", 1.0, 64, 224, num_classes=1000)

CASES = {
  "mlp": Case(
    _MLP,
    (*alrao(1, 2, 5, 10, 20, 50), bare(10), bare(50), _COLLAPSED, *PEERS),
    steps=20,
  ),
  "small_cnn": Case(Images("small_cnn"), _ALRAO + PEERS, steps=10),
  "googlenet_narrow": Case(Images("googlenet", 1 / 8), _ALRAO + PEERS),
  "mobilenet_v2_narrow": Case(Images("mobilenet_v2", 1 / 8), _ALRAO + PEERS),
  "vgg19_narrow": Case(Images("vgg19", 1 / 4), _ALRAO + PEERS),
  "resnet50_narrow": Case(
    _RESNET50._replace(width=1 / 4, batch_size=32, side=64), _ALRAO + PEERS
  ),
  "lstm": Case(Symbols("lstm", 70), _ALRAO + PEERS),
  "decoder": Case(Symbols("decoder", 128), _ALRAO + PEERS),
  "googlenet": Case(Images("googlenet"), _ALRAO),
  "mobilenet_v2": Case(Images("mobilenet_v2"), _ALRAO),
  "vgg19": Case(Images("vgg19"), _ALRAO),
  # For accelerators.
  "resnet50": Case(_RESNET50, _ALRAO),
  "resnet50_bfloat16": Case(_RESNET50._replace(dtype=jnp.bfloat16), _ALRAO),
  "googlenet_bfloat16": Case(Images("googlenet", dtype=jnp.bfloat16), _ALRAO),
  "mobilenet_v2_bfloat16": Case(Images("mobilenet_v2", dtype=jnp.bfloat16), _ALRAO),
  "vgg19_bfloat16": Case(Images("vgg19", dtype=jnp.bfloat16), _ALRAO),
  "lstm_words": Case(Symbols("lstm", 70, 10_000, "words", chunks=20), _ALRAO),
}
