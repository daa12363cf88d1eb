"""Small image files like ImageNet's, in every layout."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

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
