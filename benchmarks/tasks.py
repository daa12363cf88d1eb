"""The kinds of task, as far as their tables differ."""

from typing import NamedTuple

from benchmarks import papers
from benchmarks.records import Record


class Measure(NamedTuple):
  """A column of results.

  Attributes:
    name: Its name in the records, behind ``test_`` and ``validation_``.
    label: Its name in tables.
    scale: What its values are multiplied by.
    digits: Number of decimals.
    higher_is_better: Whether it is a gain rather than a loss.
  """

  name: str
  label: str
  scale: float = 1.0
  digits: int = 3
  higher_is_better: bool = False


class Task(NamedTuple):
  """A kind of task.

  Attributes:
    title: Its name.
    measures: The columns of its tables.
    score: The one by which methods are compared, of `measures`.
    curve: The one whose course is drawn, of `measures`.
    curve_limit: The value beyond which a curve is cut off, in multiples of the loss of
      a guess; None: nowhere.
    table_options: Options that tell one table from another.
    size_options: Options that tell one size of experiment from another.
    size: What a size's title says of it, a format of its options.
    papers_key: Options that tell which of the papers' figures belong beside a run.
    not_real: What is said in bold of results that are not on the papers' data.
    note: What else a reader must know.
    train_curves: Whether training's curves are drawn too, and all rates told apart.
  """

  title: str
  measures: tuple[Measure, ...]
  score: Measure
  curve: Measure
  curve_limit: float | None
  table_options: tuple[str, ...]
  size_options: tuple[str, ...]
  size: str
  papers_key: tuple[str, ...]
  not_real: str
  note: str = ""
  train_curves: bool = False

  def table_title(self, config: Record) -> str:
    """Returns a table's title.

    Args:
      config: The options of one of its runs.
    """
    network, *rest = self.table_options
    words = [str(config[network])]
    for name in rest:
      value = config[name]
      if name == "norm":
        words += ["no normalisation"] if value == "none" else []
      else:
        words.append(f"{name} {value:g}" if isinstance(value, float) else f"{value}")
    return ", ".join(words)

  def papers(self, config: Record) -> papers.Figures | None:
    """Returns the papers' figures for what a run trains, if they have any.

    Args:
      config: The run's options.
    """
    names = ("dataset", *self.papers_key, "optimizer")
    return papers.TABLE_1.get(tuple(config[name] for name in names))


_LOSS = Measure("loss", "loss")
_ACCURACY = Measure("accuracy", "accuracy, %", 100.0, 2, True)
_BITS = Measure("bits", "bits a symbol")
_RETURN = Measure("return", "return", 1.0, 1, True)

TASKS = {
  "images": Task(
    title="Images",
    measures=(_LOSS, _ACCURACY),
    score=_ACCURACY,
    curve=_LOSS,
    curve_limit=1.13,
    table_options=("network", "width", "norm"),
    size_options=(
      "dataset",
      "num_train",
      "num_validation",
      "num_test",
      "max_epochs",
      "patience",
      "batch_size",
      "augment",
      "dtype",
    ),
    size="{dataset}, {num_train:,} training images, at most {max_epochs} epochs",
    papers_key=("network",),
    not_real="Not CIFAR-10",
  ),
  "imagenet": Task(
    title="ImageNet",
    measures=(_LOSS, _ACCURACY),
    score=_ACCURACY,
    curve=_LOSS,
    curve_limit=1.13,
    table_options=("network", "width", "norm"),
    size_options=(
      "dataset",
      "num_classes",
      "image_size",
      "num_train",
      "num_validation",
      "num_test",
      "max_epochs",
      "patience",
      "batch_size",
      "norm_parts",
      "dtype",
    ),
    size="{dataset} at {image_size} pixels, {num_train:,} training images, at most "
    "{max_epochs} epochs",
    papers_key=("network",),
    not_real="Not ImageNet, but ten of its classes, or a part",
    note="The last training images validate, and the official validation images test. "
    "Curves end where a run does: early stopping cuts them off.",
    train_curves=True,
  ),
  "text": Task(
    title="Text",
    measures=(_BITS, _ACCURACY),
    score=_BITS,
    curve=_BITS,
    curve_limit=1.13,
    table_options=("network", "level", "output_layer"),
    size_options=(
      "dataset",
      "level",
      "num_train",
      "num_validation",
      "num_test",
      "max_epochs",
      "epoch_steps",
      "patience",
      "batch_size",
      "length",
      "dropout",
      "clip",
    ),
    size="{dataset}, {level}, at most {max_epochs} epochs of {epoch_steps} steps",
    papers_key=("level", "network"),
    not_real="Not Penn Treebank",
    note="Chance is a uniform prediction, a low bar: to know no more of Penn Treebank "
    "than how often each symbol occurs in its training text takes 4.32 bits a "
    "character, and 9.29 a word of the test text's first 20,000.",
  ),
  "rl": Task(
    title="Reinforcement learning",
    measures=(_RETURN,),
    score=_RETURN,
    curve=_RETURN,
    curve_limit=None,
    table_options=("environment",),
    size_options=(
      "num_steps",
      "max_epochs",
      "noise_scale",
      "num_validation",
      "num_test",
      "num_envs",
      "batch_size",
      "steps_per_update",
      "width",
      "warm_up",
      "discount",
      "exploration_fraction",
      "final_exploration",
      "capacity",
      "target_period",
      "reward_scale",
    ),
    size="{num_steps:,} steps in {environment}",
    papers_key=("environment",),
    not_real="",
    note="The validation loss, which chooses epoch and rate, is minus the mean return "
    "of the validation episodes. Alrao acts on the mean of those heads that hold at "
    "least half an even share. Random actions return -1,222 in Pendulum and -181 in "
    "LunarLander: that is chance. A table counts once SGD or Adam comes within 20 % of "
    "the papers' return.",
  ),
}
