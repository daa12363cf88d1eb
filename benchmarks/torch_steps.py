"""Steps of plain SGD in JAX beside PyTorch's, on a CPU and on like networks.

    pip install torch && python -m benchmarks.torch_steps

PyTorch is no dependency of this project: this tells newcomers without an accelerator
what JAX itself costs or spares them there, apart from Alrao. The networks are the same
but for PyTorch's second bias of each LSTM gate. JAX's step also normalises its images
from bytes and reports its loss; PyTorch's starts from normalised ones.
"""

import dataclasses
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import commands, records
from benchmarks.competitors import Competitor
from benchmarks.overhead_cases import CASES, SGD
from benchmarks.planning import OptionError

RATE = 1e-3


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


@dataclasses.dataclass(frozen=True)
class Compare:
  """Measure both, in turns within one process, and write what was measured."""

  networks: tuple[str, ...] = tuple(NETWORKS)
  """Which networks."""
  rounds: int = 30
  """Number of turns that each has."""
  steps: int = 10
  """Number of steps in a turn."""
  out: Path = Path("benchmarks/overhead/torch.json")
  """File of the result."""

  def __call__(self) -> None:
    """Measures, writes and prints.

    Raises:
      OptionError: An unknown network, no rounds or steps, or no PyTorch.
    """
    unknown = set(self.networks) - set(NETWORKS)
    if unknown:
      known = ", ".join(NETWORKS)
      raise OptionError(f"--networks knows {known}, not {sorted(unknown)}.")
    if self.rounds < 1 or self.steps < 1:
      raise OptionError(
        f"--rounds and --steps must be at least 1, got {self.rounds}, {self.steps}."
      )
    try:
      import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
      raise OptionError(
        "benchmarks.torch_steps needs PyTorch: pip install torch"
      ) from error
    rows = [self._measure(torch, name) for name in self.networks]
    found = {
      "kind": "torch_steps",
      "date": datetime.date.today().isoformat(),
      "rounds": self.rounds,
      "steps": self.steps,
      "environment": {**records.environment(), "torch": torch.__version__},
      "rows": rows,
    }
    records.write_text(self.out, json.dumps(found, indent=1) + "\n")
    print(table(found))

  def _measure(self, torch: Any, name: str) -> records.Record:
    competitor = Competitor(CASES[name].network, SGD)
    competitor.compile()
    turns = {"jax": competitor.run, "torch": torch_step(torch, name)}
    times = {label: [] for label in turns}
    for run in turns.values():
      run(self.steps)
    generator = np.random.default_rng(0)
    for _ in range(self.rounds):
      for label in generator.permutation(list(turns)):
        times[label].append(turns[label](self.steps) / self.steps)
    ratios = np.array(times["jax"]) / np.array(times["torch"])
    return {
      "network": name,
      "jax_milliseconds": 1e3 * float(np.median(times["jax"])),
      "torch_milliseconds": 1e3 * float(np.median(times["torch"])),
      "ratio": float(np.median(ratios)),
      "ratio_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
    }


def table(found: records.Record) -> str:
  """Returns the measurements as a Markdown table with their conditions.

  Args:
    found: What `Compare` writes.
  """
  lines = [
    "### Plain SGD, JAX beside PyTorch",
    "",
    "| network | JAX, ms a step | PyTorch, ms a step | JAX / PyTorch | quartiles |",
    "| --- | --- | --- | --- | --- |",
  ]
  for row in found["rows"]:
    low, high = row["ratio_quartiles"]
    cells = [row["jax_milliseconds"], row["torch_milliseconds"], row["ratio"]]
    numbers = " | ".join(f"{cell:.2f}" for cell in cells)
    lines.append(f"| {row['network']} | {numbers} | {low:.2f} to {high:.2f} |")
  return "\n".join([*lines, "", records.conditions(found)])


if __name__ == "__main__":
  commands.main(Compare, __doc__)
