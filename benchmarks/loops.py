"""Runs a compiled step over many batches: as one scan, or step by step."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

PyTree = Any
Step = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
OnProgress = Callable[[int, PyTree], None]

REFRESH_SECONDS = 0.5


class Loop:
  """A step, compiled once, and the loop over it that suits the backend.

  On accelerators the loop is one `lax.scan`, which spares the launch of every step. On
  a CPU it is a Python loop over the jitted step: XLA runs convolutions within a scan on
  one thread, several times slower. This is the only place that chooses.

  Attributes:
    step: The step.
    num_traces: How many times the step has been traced, hence compiled.
  """

  def __init__(self, step: Step, *, scan: bool | None = None):
    """Makes the loop; nothing is compiled yet.

    Args:
      step: Pure function ``(carry, data, batch) -> (carry, outputs)``. The buffers of
        `carry` are donated, those of `data` are not.
      scan: Whether to scan; by default, unless the backend is a CPU.
    """
    self.step = step
    self.num_traces = 0
    self._scan = jax.default_backend() != "cpu" if scan is None else scan

    def counted(carry, data, batch):
      self.num_traces += 1
      return step(carry, data, batch)

    def scanned(carry, data, batches):
      return jax.lax.scan(lambda carry, x: counted(carry, data, x), carry, batches)

    self._jitted = jax.jit(scanned if self._scan else counted, donate_argnums=0)

  def __call__(
    self,
    carry: PyTree,
    data: PyTree,
    batches: PyTree,
    on_progress: OnProgress | None = None,
  ) -> tuple[PyTree, PyTree]:
    """Runs all batches.

    Args:
      carry: What a step changes. Not to be used afterwards.
      data: What steps only read, on the device.
      batches: Numpy arrays, one entry on axis 0 for each step; or, for a loop that
        does not scan, an iterator of at least one batch.
      on_progress: Called now and then with the number of steps done and the outputs of
        the last.

    Returns:
      The last carry, and the outputs of all steps as numpy arrays, stacked on axis 0.
    """
    if self._scan:
      carry, outputs = self._jitted(carry, data, batches)
      outputs = jax.device_get(outputs)
      if on_progress is not None:
        num_steps = len(jax.tree.leaves(batches)[0])
        on_progress(num_steps, jax.tree.map(lambda x: x[-1], outputs))
      return carry, outputs
    collected, last = [], time.perf_counter()
    for i, batch in enumerate(_each(batches)):
      carry, outputs = self._jitted(carry, data, batch)
      collected.append(outputs)
      if on_progress is not None and time.perf_counter() - last > REFRESH_SECONDS:
        on_progress(i + 1, jax.device_get(outputs))
        last = time.perf_counter()
    collected = jax.device_get(collected)
    return carry, jax.tree.map(lambda *xs: np.stack(xs), *collected)


def _each(batches: PyTree) -> Iterator[PyTree]:
  """The batches, one after the other."""
  if isinstance(batches, Iterator):
    yield from batches
  else:
    for i in range(len(jax.tree.leaves(batches)[0])):
      yield jax.tree.map(lambda x, i=i: x[i], batches)
