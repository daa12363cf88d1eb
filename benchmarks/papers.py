"""The papers' figures, to stand beside ours.

Of *Learning with Random Learning Rates*, arXiv 1810.01322: CIFAR-10 at width 1 (test
loss, then accuracy in percent, with standard deviations; as the authors' project page
gives them) and the numbers of parameters.
"""

from typing import NamedTuple


class Figure(NamedTuple):
  """A result of the papers.

  Attributes:
    loss: Test loss, mean.
    loss_sd: Its standard deviation.
    accuracy: Test accuracy, in percent, mean.
    accuracy_sd: Its standard deviation.
  """

  loss: float
  loss_sd: float
  accuracy: float
  accuracy_sd: float


# By network and optimizer, where SGD is at its best rate.
TABLE_1 = {
  ("mobilenet_v2", "sgd"): Figure(0.37, 0.01, 90.2, 0.3),
  ("mobilenet_v2", "adam"): Figure(1.01, 0.95, 78.0, 11.0),
  ("mobilenet_v2", "alrao"): Figure(0.42, 0.02, 88.1, 0.6),
  ("googlenet", "sgd"): Figure(0.45, 0.05, 89.6, 1.0),
  ("googlenet", "adam"): Figure(0.47, 0.04, 89.8, 0.4),
  ("googlenet", "alrao"): Figure(0.47, 0.03, 88.9, 0.8),
  ("vgg19", "sgd"): Figure(0.42, 0.02, 89.5, 0.2),
  ("vgg19", "adam"): Figure(0.43, 0.02, 88.9, 0.4),
  ("vgg19", "alrao"): Figure(0.45, 0.03, 87.5, 0.4),
}

# Numbers of parameters at width 1, with an ordinary output layer and with 10 heads.
TABLE_2 = {
  "googlenet": (6_166_250, 6_258_500),
  "vgg19": (20_040_522, 20_086_692),
  "mobilenet_v2": (2_296_922, 2_412_212),
}
