"""A small workload that reads image files while it trains.

Run by itself, trains a tiny network: DATA OUT RESULT KILL_AT_STEP (0: never).
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.data.image_files import find_images
from benchmarks.methods import METHODS
from benchmarks.models import build_model
from benchmarks.workloads.image_stream import StreamWorkload


def make_workload(data_dir: Path, **changes: Any) -> StreamWorkload:
  """A tiny network on 24 training images: six steps an epoch, two of them a segment."""
  files = find_images("imagenette", data_dir)
  method = METHODS[changes.pop("optimizer", "alrao")]
  options: dict[str, Any] = {
    "image_size": 32,
    "batch_size": 4,
    "max_epochs": 2,
    "checkpoint_steps": 2,
  }
  model = build_model(
    "small_cnn", files.num_classes, 4 if method.has_heads else None, width=1 / 8
  )
  parts = files.split(24, 9)
  return StreamWorkload(model, method, parts, **{**options, **changes})


def main() -> None:
  """Trains, killed at a step; writes the last and the best snapshot, and records."""
  import os
  import signal

  from training_cases import make_plan, quiet, without_times

  from benchmarks import training
  from benchmarks.records import read

  data, out, result = map(Path, sys.argv[1:4])
  kill_at = int(sys.argv[4])
  training.REFRESH_SECONDS = 0.0
  workload, plan = make_workload(data), make_plan(out, max_epochs=2)
  seen: list[Any] = []
  evaluate, display = workload.evaluate, quiet()

  def remember(snapshot, part):
    seen.append(jax.tree.map(np.array, snapshot))
    return evaluate(snapshot, part)

  def kill(done, **_):
    if kill_at and done >= kill_at:
      os.kill(os.getpid(), signal.SIGKILL)

  workload.evaluate = remember
  display.update = kill
  training.train(workload, plan, display)
  last, best = (jax.tree.leaves(snapshot) for snapshot in seen[-2:])
  records = json.dumps(without_times(read(plan.path)))
  arrays = {f"leaf{i}": leaf for i, leaf in enumerate(last + best)}
  np.savez(result, records=records, **arrays)


if __name__ == "__main__":
  main()
