"""A hundred small images, in each layout of CIFAR-10, as its authors write it."""

import functools
import io
import pickle
import struct
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.data import cifar_files

COUNTS = (80, 20)
load_small = functools.partial(cifar_files.load, counts=COUNTS)


def make_small():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
  return images, rng.integers(0, 10, 100)


def batches(small, train_name, test_name):
  """Yields the name, rows (channels first) and labels of each of the six files."""
  images, labels = small
  rows = images.transpose(0, 3, 1, 2).reshape(100, -1)
  for i in range(5):
    part = slice(16 * i, 16 * (i + 1))
    yield train_name.format(i + 1), rows[part], labels[part]
  yield test_name, rows[80:], labels[80:]


def python2_pickle(rows, labels):
  """The very opcodes of the official files, which Python 2 wrote."""

  def text(value):
    return b"T" + struct.pack("<i", len(value)) + value  # BINSTRING

  array = (
    b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    b"(K\x01" + b"".join(b"M" + struct.pack("<H", n) for n in rows.shape) + b"\x86"
    b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff"
    b"\xffK\x00tb\x89" + text(rows.tobytes()) + b"tb"
  )
  numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
  return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def python3_pickle(rows, labels, protocol=2):
  return pickle.dumps({b"data": rows, b"labels": labels.tolist()}, protocol)


def numpy_pickle(rows, labels):
  """A careless copy: another memory order, numpy's own integers, text for keys."""
  return pickle.dumps({"data": np.asfortranarray(rows), "labels": list(labels)})


def write_pickles(folder, small, dump=python2_pickle):
  folder = folder / "cifar-10-batches-py"
  folder.mkdir(parents=True)
  (folder / "readme.html").write_text("not a pickle")
  for name, rows, labels in batches(small, "data_batch_{}", "test_batch"):
    (folder / name).write_bytes(dump(rows, labels))
  return folder


def write_binary(folder, small):
  folder = folder / "cifar-10-batches-bin"
  folder.mkdir(parents=True)
  for name, rows, labels in batches(small, "data_batch_{}.bin", "test_batch.bin"):
    records = np.concatenate([labels[:, None].astype(np.uint8), rows], axis=1)
    (folder / name).write_bytes(records.tobytes())
  return folder


def write_archive(folder, small, write, name):
  content = write(folder / "aside", small)
  (folder / "data").mkdir()
  with tarfile.open(folder / "data" / name, "w:gz") as archive:
    archive.add(content, content.name)
  return folder / "data" / name


def encode(image, kind):
  file = io.BytesIO()
  Image.fromarray(image).save(file, kind, lossless=True)
  return file.getvalue()


def table(images, labels, kind="PNG", column="img"):
  encoded = [{"bytes": encode(image, kind), "path": "x.png"} for image in images]
  return pa.table({column: encoded, "label": pa.array(labels, pa.int64())})


def write_parquet(
  folder, small, kind="PNG", column="img", name="{}-{:05}-of-{:05}.parquet"
):
  images, labels = small
  shards = [("train", 0, 2, 0, 45), ("train", 1, 2, 45, 80), ("test", 0, 1, 80, 100)]
  for split, index, total, start, stop in shards:
    path = folder / "cifar10" / name.format(split, index, total)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(images[start:stop], labels[start:stop], kind, column), path)
  return folder / "cifar10"


LAYOUTS = {
  "pickles of Python 2": write_pickles,
  "pickles of Python 3": functools.partial(write_pickles, dump=python3_pickle),
  "pickles, protocol 5": functools.partial(
    write_pickles, dump=functools.partial(python3_pickle, protocol=5)
  ),
  "pickles of numpy": functools.partial(write_pickles, dump=numpy_pickle),
  "binary": write_binary,
  "archive of pickles": functools.partial(
    write_archive, write=write_pickles, name="cifar-10-python.tar.gz"
  ),
  "binary archive": functools.partial(
    write_archive, write=write_binary, name="cifar-10-binary.tar.gz"
  ),
  "parquet of PNG": write_parquet,
  "parquet of WebP": functools.partial(write_parquet, kind="WEBP", column="image"),
  "parquet in two folders": functools.partial(write_parquet, name="{}/{:04}.parquet"),
}
