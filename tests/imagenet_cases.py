"""Small image files like ImageNet's, in every layout, and a program that reads them.

Run by itself, trains a tiny network: DATA OUT RESULT KILL_AT_STEP (0: never).
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.data.imagenet import find_images
from benchmarks.image_stream_program import ImageStreamProgram
from benchmarks.models import build_model
from benchmarks.optimizers import OPTIMIZERS

CLASSES = ("hen", "owl", "tern")
COUNTS = {"train": 40, "validation": 11}
DAMAGED = b"\xff\xd8\xff\xe0 no more of it"


def make_images(split: str, *, damaged=(), order="mixed") -> list[tuple]:
  """Encoded images of several sizes, with labels, which show in the colours."""
  rng = np.random.default_rng(len(split))
  found = []
  for index in range(COUNTS[split]):
    label = index % 3 if order == "mixed" else index * 3 // COUNTS[split]
    height, width = rng.integers(34, 60, 2)
    pixels = rng.integers(0, 120, (height, width, 3), np.uint8)
    pixels[..., label] += 100
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    encoded = DAMAGED if index in damaged else file.getvalue()
    found.append((f"{index:03}.jpg", encoded, label))
  return found


def write_parquet(
  folder: Path, name="{}-{:05}-of-{:05}.parquet", rows=7, info=True, **options: Any
) -> Path:
  for split in COUNTS:
    images = make_images(split, **options)
    cut = len(images) * 2 // 3
    for number, part in enumerate((images[:cut], images[cut:])):
      shard = folder / name.format(split, number, 2)
      shard.parent.mkdir(parents=True, exist_ok=True)
      write_shard(shard, part, rows, CLASSES if info else ())
  return folder


def write_shard(shard: Path, images: list[tuple], rows=7, names=CLASSES) -> None:
  """Writes one shard, with the hub's metadata if there are names of classes."""
  table = pa.table(
    {
      "image": pa.array(
        [{"bytes": encoded, "path": path} for path, encoded, _ in images],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
      ),
      "label": pa.array([label for *_, label in images], pa.int64()),
    }
  )
  if names:
    features = {"label": {"names": list(names), "_type": "ClassLabel"}}
    info = json.dumps({"info": {"features": features}})
    table = table.replace_schema_metadata({"huggingface": info})
  pq.write_table(table, shard, row_group_size=rows)


def write_folders(folder: Path, val="val", **options: Any) -> Path:
  for split in COUNTS:
    for name, encoded, label in make_images(split, **options):
      place = folder / {"validation": val}.get(split, split) / CLASSES[label] / name
      place.parent.mkdir(parents=True, exist_ok=True)
      place.write_bytes(encoded)
  return folder


def make_program(data_dir: Path, **changes: Any) -> ImageStreamProgram:
  """A tiny network on 24 training images: six steps an epoch, two of them a segment."""
  files = find_images("imagenette", data_dir)
  optimizer = OPTIMIZERS[changes.pop("optimizer", "alrao")]
  options: dict[str, Any] = {
    "image_size": 32,
    "batch_size": 4,
    "max_epochs": 2,
    "checkpoint_steps": 2,
  }
  model = build_model(
    "small_cnn", files.num_classes, 4 if optimizer.has_heads else None, width=1 / 8
  )
  parts = files.split(24, 9)
  return ImageStreamProgram(model, optimizer, parts, **{**options, **changes})


def main() -> None:
  """Trains, killed at a step; writes the last and the best snapshot, and records."""
  import os
  import signal

  from benchmark_cases import make_plan, quiet, without_times

  from benchmarks import engine, loops
  from benchmarks.records import read

  data, out, result = map(Path, sys.argv[1:4])
  kill_at = int(sys.argv[4])
  loops.REFRESH_SECONDS = 0.0
  program, plan = make_program(data), make_plan(out, max_epochs=2)
  seen: list[Any] = []
  evaluate, display = program.evaluate, quiet()

  def remember(snapshot, part):
    seen.append(jax.tree.map(np.array, snapshot))
    return evaluate(snapshot, part)

  def kill(done, **_):
    if kill_at and done >= kill_at:
      os.kill(os.getpid(), signal.SIGKILL)

  program.evaluate = remember
  display.update = kill
  engine.train(program, plan, display)
  last, best = (jax.tree.leaves(snapshot) for snapshot in seen[-2:])
  records = json.dumps(without_times(read(plan.path)))
  arrays = {f"leaf{i}": leaf for i, leaf in enumerate(last + best)}
  np.savez(result, records=records, **arrays)


if __name__ == "__main__":
  main()
