"""The papers' figures, to stand beside ours.

Of *Learning with Random Learning Rates*, arXiv 1810.01322, both versions: test results
(at width 1; of CIFAR-10 as the authors' project page gives them), and the numbers of
parameters.
"""

from typing import NamedTuple


class Figure(NamedTuple):
  """A result of the papers.

  Attributes:
    mean: The mean over runs.
    sd: The standard deviation; None where the papers give none.
  """

  mean: float
  sd: float | None = None


# By name of the measure, as in `benchmarks.tasks`.
Figures = dict[str, Figure]


def _images(loss: float, loss_sd: float, accuracy: float, sd: float) -> Figures:
  """Figures of CIFAR-10; accuracies are in percent there."""
  return {
    "loss": Figure(loss, loss_sd),
    "accuracy": Figure(accuracy / 100, sd / 100),
  }


def _text(bits: float, accuracy: float) -> Figures:
  """Figures of Penn Treebank; accuracies are in percent there."""
  return {"bits": Figure(bits), "accuracy": Figure(accuracy / 100)}


# By data set, what `Task.papers_key` names, and optimizer; SGD is at its best rate.
TABLE_1 = {
  ("cifar10", "mobilenet_v2", "sgd"): _images(0.37, 0.01, 90.2, 0.3),
  ("cifar10", "mobilenet_v2", "adam"): _images(1.01, 0.95, 78.0, 11.0),
  ("cifar10", "mobilenet_v2", "alrao"): _images(0.42, 0.02, 88.1, 0.6),
  ("cifar10", "googlenet", "sgd"): _images(0.45, 0.05, 89.6, 1.0),
  ("cifar10", "googlenet", "adam"): _images(0.47, 0.04, 89.8, 0.4),
  ("cifar10", "googlenet", "alrao"): _images(0.47, 0.03, 88.9, 0.8),
  ("cifar10", "vgg19", "sgd"): _images(0.42, 0.02, 89.5, 0.2),
  ("cifar10", "vgg19", "adam"): _images(0.43, 0.02, 88.9, 0.4),
  ("cifar10", "vgg19", "alrao"): _images(0.45, 0.03, 87.5, 0.4),
  ("ptb", "characters", "lstm", "sgd"): _text(1.566, 66.1),
  ("ptb", "characters", "lstm", "adam"): _text(1.587, 65.6),
  ("ptb", "characters", "lstm", "alrao_fast"): _text(1.67, 64.1),
  ("ptb", "characters", "lstm", "alrao"): _text(1.706, 63.4),
  ("gymnasium", "pendulum", "sgd"): {"return": Figure(-372)},
  ("gymnasium", "pendulum", "adam"): {"return": Figure(-414)},
  ("gymnasium", "pendulum", "alrao"): {"return": Figure(-371)},
  ("gymnasium", "lunar_lander", "sgd"): {"return": Figure(188)},
  ("gymnasium", "lunar_lander", "adam"): {"return": Figure(155)},
  ("gymnasium", "lunar_lander", "alrao"): {"return": Figure(186)},
}

# Numbers of parameters at width 1, with an ordinary output layer and with 10 heads.
TABLE_2 = {
  "googlenet": (6_166_250, 6_258_500),
  "vgg19": (20_040_522, 20_086_692),
  "mobilenet_v2": (2_296_922, 2_412_212),
}
