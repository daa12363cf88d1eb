"""CIFAR-10 as plain bytes: ``cifar-10-batches-bin``, or its ``.tar.gz``."""

import numpy as np

from benchmarks.data.cifar_batches import (
  NUM_CLASSES,
  ROW,
  BatchFiles,
  rows_to_images,
)
from benchmarks.data.dataset import DataError, Split, check_labels


def _parse(where: str, content: bytes, count: int) -> Split:
  record = 1 + ROW  # a label, then the image
  if len(content) != count * record:
    raise DataError(
      f"{where}: holds {len(content):,} bytes, expected {count * record:,} ({count:,} "
      f"images of {record:,}); truncated, or no CIFAR-10 file."
    )
  records = np.frombuffer(content, np.uint8).reshape(count, record)
  labels = check_labels(where, records[:, 0], NUM_CLASSES)
  return Split(rows_to_images(records[:, 1:]), labels)


LAYOUT = BatchFiles(
  folder="cifar-10-batches-bin",
  archive="cifar-10-binary.tar.gz",
  train_names=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
  test_name="test_batch.bin",
  parse=_parse,
)
