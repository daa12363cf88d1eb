"""Steps of plain SGD in JAX beside PyTorch's, on a CPU and on like networks.

    pip install torch && python -m benchmarks cost pytorch

PyTorch is no dependency of this project: this tells newcomers without an accelerator
what JAX itself costs or spares them there, apart from Alrao. The networks are the same
but for PyTorch's second bias of each LSTM gate. JAX's step also normalises its images
from bytes and reports its loss; PyTorch's starts from normalised ones.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import records
from benchmarks.console import OptionError
from benchmarks.costs._contenders import RATE, SGD, Competitor
from benchmarks.costs._cost import Cost, check_known, check_positive, render
from benchmarks.costs.steps import CASES
from benchmarks.records import Record
from benchmarks.timing import in_turns


def small_cnn(torch: Any) -> tuple[Any, tuple[int, ...]]:
  """Returns the small CNN with batch normalisation, and the shape of its input.

  Args:
    torch: The module.
  """
  layers, before = [], 3
  for channels in (16, 32, 64):
    layers += [
      torch.nn.Conv2d(before, channels, 3, stride=2, padding=1),
      torch.nn.BatchNorm2d(channels),
      torch.nn.ReLU(),
    ]
    before = channels
  pooled = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10)]
  return torch.nn.Sequential(*layers, *pooled), (32, 3, 32, 32)


def mlp(torch: Any) -> tuple[Any, tuple[int, ...]]:
  """Returns the MLP, and the shape of its input.

  Args:
    torch: The module.
  """
  net = torch.nn.Sequential(
    torch.nn.Linear(784, 512),
    torch.nn.ReLU(),
    torch.nn.Linear(512, 512),
    torch.nn.ReLU(),
    torch.nn.Linear(512, 10),
  )
  return net, (128, 784)


def lstm(torch: Any) -> tuple[Any, tuple[int, ...]]:
  """Returns the character LSTM, and the shape of its input, (streams, time).

  Args:
    torch: The module.
  """

  class CharacterLSTM(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.embedding = torch.nn.Embedding(50, 100)
      self.layers = torch.nn.LSTM(100, 100, num_layers=2, batch_first=True)
      self.dropout = torch.nn.Dropout(0.2)
      self.output = torch.nn.Linear(100, 50)

    def forward(self, symbols):
      hidden, _ = self.layers(self.embedding(symbols))
      return self.output(self.dropout(hidden)).flatten(0, 1)

  return CharacterLSTM(), (20, 70)


NETWORKS = {"mlp": mlp, "small_cnn": small_cnn, "lstm": lstm}


def torch_step(torch: Any, name: str) -> Callable[[int], float]:
  """Returns a function that trains some steps and returns the seconds they took.

  Args:
    torch: The module.
    name: Name of the network.
  """
  torch.manual_seed(0)
  net, shape = NETWORKS[name](torch)
  optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
  if name == "lstm":
    inputs = torch.randint(0, 50, shape)
    labels = torch.randint(0, 50, (shape[0] * shape[1],))
  else:
    inputs = torch.randn(shape)
    labels = torch.randint(0, 10, shape[:1])

  def run(steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
      optimizer.zero_grad()
      torch.nn.functional.cross_entropy(net(inputs), labels).backward()
      optimizer.step()
    return time.perf_counter() - start

  return run


def compare(torch: Any, name: str, rounds: int, steps: int) -> Record:
  """Returns a step's median milliseconds in both, and their ratio.

  Args:
    torch: The module.
    name: Name of the network.
    rounds: Number of turns that each has.
    steps: Number of steps in a turn.
  """
  competitor = Competitor(CASES[name].network, SGD)
  competitor.compile()
  runs = [
    functools.partial(run, steps) for run in (competitor.run, torch_step(torch, name))
  ]
  for run in runs:
    run()
  times = in_turns(runs, rounds) / steps
  ratios = times[:, 0] / times[:, 1]
  milliseconds = 1e3 * np.median(times, axis=0)
  return {
    "network": name,
    "jax_milliseconds": float(milliseconds[0]),
    "torch_milliseconds": float(milliseconds[1]),
    "ratio": float(np.median(ratios)),
    "ratio_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
  }


@dataclasses.dataclass(frozen=True)
class PyTorch(Cost):
  """Time steps of plain SGD in JAX and in PyTorch, in turns within one process."""

  name = "pytorch"
  networks: tuple[str, ...] = tuple(NETWORKS)
  """Which networks."""
  rounds: int = 30
  """Number of turns that each has."""
  steps: int = 10
  """Number of steps in a turn."""

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: An unknown network, or no rounds or steps.
    """
    check_known("networks", self.networks, NETWORKS)
    check_positive(rounds=self.rounds, steps=self.steps)

  def measure(self) -> Iterator[tuple[str, Record]]:
    """Yields the measurements of all networks.

    Raises:
      OptionError: There is no PyTorch.
    """
    try:
      import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
      raise OptionError("cost pytorch needs PyTorch: pip install torch") from error
    rows = [compare(torch, name, self.rounds, self.steps) for name in self.networks]
    found = {"rounds": self.rounds, "steps": self.steps, "rows": rows}
    found["environment"] = {"torch": torch.__version__}
    yield "sgd", found


def table(found: Record) -> str:
  """Returns the measurements as a Markdown table with its conditions.

  Args:
    found: The record.
  """
  header = ["network", "JAX, ms a step", "PyTorch, ms a step", "JAX / PyTorch"]
  header += ["quartiles"]
  rows = []
  for row in found["rows"]:
    low, high = row["ratio_quartiles"]
    cells = [row["jax_milliseconds"], row["torch_milliseconds"], row["ratio"]]
    numbers = [f"{cell:.2f}" for cell in cells]
    rows.append([row["network"], *numbers, f"{low:.2f} to {high:.2f}"])
  title = "Plain SGD, JAX beside PyTorch"
  return render(title, header, rows, records.conditions(found))


COST = PyTorch
