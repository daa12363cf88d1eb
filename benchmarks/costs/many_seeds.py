"""Training one network from several seeds, one after the other or in one program.

    python -m benchmarks cost many_seeds
    export XLA_FLAGS=--xla_force_host_platform_device_count=2  # and on two devices
    python -m benchmarks cost many_seeds --num-seeds 2 4 8 16

Many runs of one small network are what studies and searches are made of. Vmapped over
the whole training state, they share one program, with batched products in place of an
MLP's, and grouped convolutions, which XLA runs slowly on a CPU. With several devices,
the vmapped program is also run with its seeds spread over them.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import records
from benchmarks.costs._contenders import Contender, ImageNetwork, Network
from benchmarks.costs._cost import Cost, check_known, check_positive, render
from benchmarks.records import Record
from benchmarks.timing import in_turns

CONTENDER = Contender("Alrao, 10 heads", "alrao", 10)
NETWORKS = {
  "mlp_narrow": ImageNetwork("mlp", 1 / 8, norm="none"),
  "mlp": ImageNetwork("mlp", norm="none"),
  "small_cnn": ImageNetwork("small_cnn"),
}


class SeedSteps:
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
    workload = network.workload(CONTENDER)
    step, data = workload.step.step, workload.data
    # Each seed has its own order of images, as in real use.
    batches = [
      jax.tree.map(lambda leaf: leaf[0], workload.batches(seed, 1))
      for seed in range(num_seeds)
    ]
    stacked_batch = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    states = [workload.init(seed, None) for seed in range(num_seeds)]
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


def compare(network: Network, num_seeds: int, rounds: int, steps: int) -> Record:
  """Returns a step's median milliseconds a seed, and its ratio to sequential, by way.

  Args:
    network: The network.
    num_seeds: Number of seeds.
    rounds: Number of turns that each way has.
    steps: Number of steps in a turn.
  """
  ways = SeedSteps(network, num_seeds).ways
  # The first is the sequential one.
  times = in_turns([functools.partial(run, steps) for run in ways.values()], rounds)
  milliseconds = 1e3 * np.median(times, axis=0) / steps / num_seeds
  ratios = np.median(times / times[:, :1], axis=0)
  return {
    "milliseconds": dict(zip(ways, milliseconds.tolist(), strict=True)),
    "ratios": dict(zip(ways, ratios.tolist(), strict=True)),
  }


@dataclasses.dataclass(frozen=True)
class ManySeeds(Cost):
  """Time one network's steps from several seeds."""

  name = "many_seeds"
  networks: tuple[str, ...] = tuple(NETWORKS)
  """Which networks; see NETWORKS in benchmarks/costs/many_seeds.py."""
  num_seeds: tuple[int, ...] = (1, 2, 4, 8, 16)
  """Numbers of seeds."""
  rounds: int = 10
  """Number of turns that each way has."""
  steps: int = 5
  """Number of steps in a turn."""

  def check(self) -> None:
    """Checks the options.

    Raises:
      OptionError: An unknown network, or a number that is not positive.
    """
    check_known("networks", self.networks, NETWORKS)
    check_positive(num_seeds=self.num_seeds, rounds=self.rounds, steps=self.steps)

  def measure(self) -> Iterator[tuple[str, Record]]:
    """Yields the measurements of all networks."""
    num_devices = len(jax.devices())
    rows = [
      {
        "network": NETWORKS[name].title,
        "num_seeds": number,
        **compare(NETWORKS[name], number, self.rounds, self.steps),
      }
      for name in self.networks
      for number in self.num_seeds
    ]
    found = {"rounds": self.rounds, "steps": self.steps, "rows": rows}
    found["environment"] = {"devices": num_devices}
    yield f"devices_{num_devices}", found


def table(found: Record) -> str:
  """Returns the measurements as a Markdown table with its conditions.

  Args:
    found: The record.
  """
  ways = list(dict.fromkeys(way for row in found["rows"] for way in row["ratios"]))
  header = ["network", "seeds", "sequential, ms a seed and step"]
  header += [f"{way} / sequential" for way in ways[1:]]
  rows = []
  for row in found["rows"]:
    cells = [row["network"], str(row["num_seeds"])]
    cells.append(f"{row['milliseconds']['sequential']:.2f}")
    cells += [f"{row['ratios'][w]:.2f}" if w in row["ratios"] else "" for w in ways[1:]]
    rows.append(cells)
  title = "Several seeds of one network, Alrao with 10 heads"
  return render(title, header, rows, records.conditions(found))


COST = ManySeeds
