"""Training one network from several seeds: one after the other, or all in one program.

    python -m benchmarks.many_seeds

Many runs of one small network are what studies and searches are made of. Vmapped over
the whole training state, they share one program, with batched products in place of an
MLP's, and grouped convolutions, which XLA runs slowly on a CPU. With several devices,
the vmapped program is also run with its seeds spread over them.
"""

import dataclasses
import datetime
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import commands, records
from benchmarks.overhead_cases import Contender, Images, Network
from benchmarks.planning import OptionError

CONTENDER = Contender("Alrao, 10 heads", "alrao", 10)
NETWORKS = {
  "mlp_narrow": Images("mlp", 1 / 8, norm="none"),
  "mlp": Images("mlp", norm="none"),
  "small_cnn": Images("small_cnn"),
}


class Seeds:
  """Steps of one network from several seeds.

  Attributes:
    ways: By the name of a way to take them, a function that takes a number of steps and
      returns the seconds they took.
  """

  def __init__(self, network: Network, num_seeds: int):
    """Compiles all ways.

    Args:
      network: The network.
      num_seeds: Number of seeds; the ways with several devices need a multiple of
        their number.
    """
    program = network.program(CONTENDER)
    step, data = program.step.step, program.data
    # Each seed has its own order of images, as in real use.
    batches = [
      jax.tree.map(lambda leaf: leaf[0], program.batches(seed, 1))
      for seed in range(num_seeds)
    ]
    stacked_batch = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    states = [program.init(seed, None) for seed in range(num_seeds)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    one = jax.jit(step, donate_argnums=0)
    all_seeds = jax.jit(jax.vmap(step, in_axes=(0, None, 0)), donate_argnums=0)
    together = jax.tree.map(jnp.copy, stacked)
    self._states = {"sequential": states, "vmapped": [together]}
    self.ways = {
      "sequential": _timer(one, states, data, batches),
      "vmapped": _timer(all_seeds, self._states["vmapped"], data, [stacked_batch]),
    }
    devices = jax.devices()
    if len(devices) > 1 and num_seeds % len(devices) == 0:
      mesh = Mesh(np.array(devices), ("seeds",))
      spread = NamedSharding(mesh, PartitionSpec("seeds"))
      everywhere = NamedSharding(mesh, PartitionSpec())
      self._states["sharded"] = [jax.device_put(stacked, spread)]
      self.ways["sharded"] = _timer(
        jax.jit(
          jax.vmap(step, in_axes=(0, None, 0)),
          donate_argnums=0,
          out_shardings=(spread, spread),
        ),
        self._states["sharded"],
        jax.device_put(data, everywhere),
        [jax.device_put(stacked_batch, spread)],
      )

  def states(self, way: str) -> Any:
    """Returns the training states that a way has come to, with seeds on axis 0.

    Args:
      way: Name of the way.
    """
    states = self._states[way]
    if way != "sequential":
      return states[0]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _timer(step: Any, states: list[Any], data: Any, batches: list[Any]):
  """Returns a function that takes steps, of one state after the other."""

  def run(steps: int) -> float:
    start = time.perf_counter()
    for i, batch in enumerate(batches):
      for _ in range(steps):
        states[i], _ = step(states[i], data, batch)
    jax.block_until_ready(states)
    return time.perf_counter() - start

  run(1)
  return run


def measure(
  network: Network, num_seeds: int, rounds: int, steps: int
) -> dict[str, dict[str, float]]:
  """Returns a step's median milliseconds a seed, and its ratio to sequential, by way.

  Args:
    network: The network.
    num_seeds: Number of seeds.
    rounds: Number of turns that each way has, in an order drawn anew.
    steps: Number of steps in a turn.
  """
  ways = Seeds(network, num_seeds).ways
  times = {name: [] for name in ways}
  generator = np.random.default_rng(0)
  for _ in range(rounds):
    for name in generator.permutation(list(ways)):
      times[name].append(ways[name](steps))
  base = np.array(times["sequential"])
  return {
    "milliseconds": {
      name: 1e3 * float(np.median(values)) / steps / num_seeds
      for name, values in times.items()
    },
    "ratios": {
      name: float(np.median(np.array(values) / base)) for name, values in times.items()
    },
  }


@dataclasses.dataclass(frozen=True)
class Measure:
  """Measure, and write what was measured."""

  networks: tuple[str, ...] = tuple(NETWORKS)
  """Which networks; see NETWORKS in benchmarks/many_seeds.py."""
  num_seeds: tuple[int, ...] = (1, 2, 4, 8, 16)
  """Numbers of seeds."""
  rounds: int = 10
  """Number of turns that each way has."""
  steps: int = 5
  """Number of steps in a turn."""
  out: Path = Path("benchmarks/overhead/many_seeds.json")
  """File of the result."""

  def __call__(self) -> None:
    """Measures, writes and prints.

    Raises:
      OptionError: An unknown network, or a number that is not positive.
    """
    unknown = set(self.networks) - set(NETWORKS)
    if unknown:
      known = ", ".join(NETWORKS)
      raise OptionError(f"--networks knows {known}, not {sorted(unknown)}.")
    if min(*self.num_seeds, self.rounds, self.steps) < 1:
      raise OptionError(
        "--num-seeds, --rounds and --steps must be at least 1, got "
        f"{self.num_seeds}, {self.rounds}, {self.steps}."
      )
    found = {
      "kind": "many_seeds",
      "rounds": self.rounds,
      "steps": self.steps,
      "date": datetime.date.today().isoformat(),
      "environment": {**records.environment(), "devices": len(jax.devices())},
      "rows": [
        {
          "network": NETWORKS[name].title,
          "num_seeds": number,
          **measure(NETWORKS[name], number, self.rounds, self.steps),
        }
        for name in self.networks
        for number in self.num_seeds
      ],
    }
    records.write_text(self.out, json.dumps(found, indent=1) + "\n")
    print(table(found))


def table(found: records.Record) -> str:
  """Returns the measurements as a Markdown table.

  Args:
    found: What `Measure` writes.
  """
  ways = list(dict.fromkeys(way for row in found["rows"] for way in row["ratios"]))
  header = ["network", "seeds", "sequential, ms a seed and step"]
  header += [f"{way} / sequential" for way in ways[1:]]
  lines = [
    "### Several seeds of one network, Alrao with 10 heads",
    "",
    "| " + " | ".join(header) + " |",
    "|" + " --- |" * len(header),
  ]
  for row in found["rows"]:
    cells = [row["network"], str(row["num_seeds"])]
    cells.append(f"{row['milliseconds']['sequential']:.2f}")
    cells += [f"{row['ratios'][w]:.2f}" if w in row["ratios"] else "" for w in ways[1:]]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join([*lines, "", records.conditions(found)])


if __name__ == "__main__":
  commands.main(Measure, __doc__)
