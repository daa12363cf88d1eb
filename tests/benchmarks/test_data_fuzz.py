"""Loaders under thousands of damaged files: right data, or one line that names it.

Every search is the same one in every run: it is for finding what a change to a loader
lets through. `test_data_damage.py` holds what has been found, case by case.
"""

import gzip
import io
import os
import pickle
import shutil
import tarfile
import tempfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import COUNTS, LAYOUTS, encode, load_small, make_small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imagenet_cases import write_folders
from imagenet_cases import write_parquet as write_imagenet
from PIL import Image

from benchmarks.data import DataError, cifar_files
from benchmarks.data.cache import cache_dir
from benchmarks.data.image_batches import load as load_images
from benchmarks.data.image_crops import centre_box, decode
from benchmarks.data.image_files import Part, find_images
from benchmarks.data.text_files import PTB_NAMES, load_text

pytestmark = pytest.mark.slow

MEBIBYTE = 2**20
PNG = encode(np.zeros((32, 32, 3), np.uint8), "PNG")


def searched(max_examples):
  return settings(
    max_examples=max_examples,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
  )


# What can be done to a file.

# Headers and footers are where a byte matters most.
PLACES = st.one_of(
  st.floats(0, 1, exclude_max=True),
  st.integers(0, 600).map(lambda offset: offset / 1e6),
  st.integers(1, 600).map(lambda offset: -offset / 1e6),
)


def place(content, where):
  """An index of a byte: a share of the content, or millionths from either end."""
  if abs(where) < 1e-3 and where != 0:
    return round(where * 1e6) % len(content)
  return int(where * len(content))


@st.composite
def damages(draw):
  """Draws a function that damages bytes."""
  kind = draw(st.sampled_from(["flip", "cut", "remove", "repeat", "write", "replace"]))
  where = draw(st.lists(PLACES, min_size=1, max_size=3))
  size = draw(st.sampled_from([1, 2, 4, 8, 50, 1_000]))
  written = draw(
    st.one_of(
      st.binary(min_size=1, max_size=9),
      st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\n", b"\x80"]),
    )
  )
  bit = draw(st.integers(0, 7))

  def damage(content):
    if not content or kind == "replace":
      return written
    start = place(content, where[0])
    if kind == "flip":
      found = bytearray(content)
      for each in where:
        found[place(content, each)] ^= 1 << bit
      return bytes(found)
    if kind == "cut":
      return content[:start]
    if kind == "remove":
      return content[:start] + content[start + size :]
    if kind == "repeat":
      return content[:start] + content[start : start + size] + content[start:]
    return content[:start] + written + content[start + len(written) :]

  return damage


@st.composite
def damages_within(draw):
  """Draws a function that damages a gzip file, or what is in it, checksum right."""
  damage = draw(damages())
  if draw(st.booleans()):
    return damage
  return lambda content: gzip.compress(damage(gzip.decompress(content)), 1)


def read_tree(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


@pytest.fixture(scope="module")
def place_to_write():
  """A folder in memory where there is one: each search writes hundreds of times."""
  memory = Path("/dev/shm")
  parent = memory if os.access(memory, os.W_OK) else None
  with tempfile.TemporaryDirectory(dir=parent) as folder:
    yield Path(folder)


@pytest.fixture(autouse=True)
def own_cache(place_to_write, monkeypatch):
  monkeypatch.setenv("ALRAO_CACHE_DIR", str(place_to_write / "cache"))


def write_tree(folder, files):
  shutil.rmtree(folder, ignore_errors=True)
  shutil.rmtree(cache_dir(), ignore_errors=True)
  for name, content in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def check(read, folder):
  """Reads data; what is wrong with it must be told in one line that names its place."""
  try:
    read(folder)
  except DataError as error:
    assert len(str(error).splitlines()) == 1
    assert str(folder) in str(error)


def read_cifar10(folder):
  dataset = load_small(folder)
  for images, labels, count in (
    (dataset.train_images, dataset.train_labels, COUNTS[0]),
    (dataset.test_images, dataset.test_labels, COUNTS[1]),
  ):
    assert (images.shape, images.dtype) == ((count, 32, 32, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((count,), np.int32)
    assert labels.min() >= 0 and labels.max() < 10


# Files, damaged at random.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cifar10(layout, tmp_path, place_to_write):
  LAYOUTS[layout](tmp_path, make_small())
  whole = read_tree(tmp_path / "data" if "archive" in layout else tmp_path)
  folder = place_to_write / "data"

  @searched(200)
  @given(
    st.sampled_from(sorted(whole)), damages_within() if len(whole) == 1 else damages()
  )
  def search(name, damage):
    write_tree(folder, {**whole, name: damage(whole[name])})
    check(read_cifar10, folder)

  search()


def test_footers_of_shards(tmp_path, place_to_write):
  LAYOUTS["parquet of PNG"](tmp_path, make_small())
  whole, name = read_tree(tmp_path), "cifar10/test-00000-of-00001.parquet"
  folder = place_to_write / "data"
  places = st.tuples(st.integers(9, 700), st.integers(0, 7))

  @searched(300)
  @given(st.lists(places, min_size=1, max_size=3))
  def search(flips):
    content = bytearray(whole[name])
    for offset, bit in flips:
      content[-offset] ^= 1 << bit
    write_tree(folder, {**whole, name: bytes(content)})
    check(read_cifar10, folder)

  search()


def read_images(folder):
  files = find_images("imagenette", folder)
  for source in (files.train, files.held_out):
    everything = np.arange(len(source.labels))
    batch = load_images(Part(source, everything), everything, 8, centre)
    assert batch["images"].shape == (len(everything), 8, 8, 3)
    for index in np.flatnonzero(batch["is_corrupt"]):
      assert str(folder) in source.name(int(index))


def centre(index, width, height):
  return centre_box(width, height), False


@pytest.mark.parametrize("write", [write_imagenet, write_folders])
def test_imagenet(write, tmp_path, place_to_write):
  whole = read_tree(write(tmp_path))
  folder = place_to_write / "data"

  @searched(150)
  @given(st.sampled_from(sorted(whole)), damages())
  def search(name, damage):
    write_tree(folder, {**whole, name: damage(whole[name])})
    check(read_images, folder)

  search()


@pytest.mark.parametrize("level", ["characters", "words"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_texts(ending, level, place_to_write):
  text = b"the cat <unk> sat\nthe dog sat \xc3\xa4\n" * 20
  content = gzip.compress(text) if ending else text
  whole = {name + ending: content for name in PTB_NAMES}
  folder = place_to_write / "data"

  @searched(200)
  @given(st.sampled_from(sorted(whole)), damages_within() if ending else damages())
  def search(name, damage):
    write_tree(folder, {**whole, name: damage(whole[name])})
    check(lambda folder: load_text(level, folder), folder)

  search()


def test_the_cache_of_decoded_images(tmp_path, place_to_write):
  LAYOUTS["parquet of PNG"](tmp_path, make_small())
  shutil.rmtree(cache_dir(), ignore_errors=True)
  expected = load_small(tmp_path)
  (kept,) = cache_dir().iterdir()
  whole = kept.read_bytes()

  @searched(200)
  @given(damages())
  def search(damage):
    kept.write_bytes(damage(whole))
    found = load_small(tmp_path)  # decoded anew if damaged
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
      np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))

  search()


def images_of_all_modes():
  grey = np.arange(24 * 24, dtype=np.uint16).reshape(24, 24)
  small = Image.fromarray((grey % 256).astype(np.uint8))
  images = [
    (Image.fromarray(grey * 100), "PNG", {}),
    (small, "PNG", {"transparency": 3}),
    (small.convert("P"), "PNG", {"transparency": bytes(256)}),
    (small.convert("1"), "PNG", {}),
    (small.convert("LA"), "PNG", {}),
    (small.convert("RGBA"), "PNG", {}),
    (small.convert("RGB"), "PNG", {}),
    (small.convert("CMYK"), "JPEG", {}),
    (small.convert("RGB"), "JPEG", {"progressive": True}),
    (small, "JPEG", {}),
    (small.convert("RGBA"), "WEBP", {"lossless": True}),
    (small.convert("RGB"), "WEBP", {}),
    (Image.fromarray(grey.astype(np.float32)), "TIFF", {}),
  ]
  for image, kind, options in images:
    file = io.BytesIO()
    image.save(file, kind, **options)
    yield file.getvalue()


def png_checksums(content):
  """The same PNG with all checksums right, so that pillow reads on."""
  found, start = bytearray(content), 8
  while start + 12 <= len(content):
    end = start + 8 + int.from_bytes(content[start : start + 4], "big")
    if end + 4 > len(content):
      break
    found[end : end + 4] = zlib.crc32(found[start + 4 : end]).to_bytes(4, "big")
    start = end + 4
  return bytes(found)


@searched(1_500)
@given(st.sampled_from(list(images_of_all_modes())), damages(), st.booleans())
def test_images(encoded, damage, mended):
  damaged = damage(encoded)
  if mended and damaged.startswith(b"\x89PNG"):
    damaged = png_checksums(damaged)
  image = decode(damaged)
  assert image is None or (image.mode == "RGB" and min(image.size) > 0)


SIDES = st.sampled_from([0, 1, 31, 32, 33, 9_700, 20_000, 2**31 - 1])


@searched(200)
@given(st.sampled_from(list(images_of_all_modes())), damages(), SIDES, SIDES)
def test_images_within_shards(place_to_write, encoded, damage, width, height):
  if encoded.startswith(b"\x89PNG"):
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    encoded = png_checksums(encoded[:16] + size + encoded[24:])
  images = [{"bytes": x} for x in [PNG, encoded, damage(PNG), *[PNG] * 17]]
  file = io.BytesIO()
  pq.write_table(pa.table({"img": images, "label": [1] * 20}), file)
  folder = place_to_write / "data"
  shards = {f"cifar10/{split}.parquet": file.getvalue() for split in ("train", "test")}
  write_tree(folder, shards)
  check(lambda folder: cifar_files.load(folder, counts=(20, 20)), folder)


# Files that are whole, but hold something else.

MEMBERS = st.tuples(
  st.sampled_from(
    ["data_batch_1", "cifar-10-batches-py/data_batch_2", "test_batch", "x"]
  ),
  st.sampled_from(
    [
      tarfile.REGTYPE,
      tarfile.SYMTYPE,
      tarfile.LNKTYPE,
      tarfile.DIRTYPE,
      tarfile.FIFOTYPE,
      tarfile.CHRTYPE,
      tarfile.CONTTYPE,
      tarfile.GNUTYPE_SPARSE,
    ]
  ),
  st.sampled_from(["", "x", "data_batch_1", "test_batch", "/etc/passwd", "../x"]),
  st.sampled_from([b"", b"}.", b"\x80\x02}.", bytes(600)]),
)


@searched(300)
@given(st.lists(MEMBERS, max_size=4))
def test_archives_of_members_of_all_kinds(place_to_write, members):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
    for name, kind, link, content in members:
      member = tarfile.TarInfo(name)
      member.type, member.linkname = kind, link
      member.size = len(content) if member.isreg() else 0
      archive.addfile(member, io.BytesIO(content))
  folder = place_to_write / "data"
  write_tree(folder, {"cifar-10-python.tar.gz": file.getvalue()})
  check(read_cifar10, folder)


COLUMNS = {
  "good images": pa.array([{"bytes": PNG, "path": "x"}] * 20),
  "missing images": pa.array([{"bytes": PNG}, None] * 10),
  "numbers as images": pa.array([{"bytes": 5}] * 20),
  "text as images": pa.array([{"bytes": "a"}] * 20),
  "lists as images": pa.array([{"bytes": [1]}] * 20),
  "nothing as images": pa.array([{"bytes": None}] * 20),
  "large images": pa.array(
    [{"bytes": PNG}] * 20, pa.struct({"bytes": pa.large_binary()})
  ),
  "images of a fixed size": pa.array(
    [{"bytes": b"ab"}] * 20, pa.struct({"bytes": pa.binary(2)})
  ),
  "bytes": pa.array([PNG] * 20),
  "good labels": pa.array([1] * 20),
  "small labels": pa.array([1] * 20, pa.uint8()),
  "huge labels": pa.array([2**64 - 1] * 20, pa.uint64()),
  "labels beyond 32 bits": pa.array([2**32 + 1] * 20),
  "negative labels": pa.array([-1] * 20),
  "missing labels": pa.array([1, None] * 10),
  "floats": pa.array([1.0] * 20),
  "texts": pa.array(["a\nb"] * 20),
  "lists": pa.array([[1]] * 20),
  "nothing": pa.nulls(20),
  "truths": pa.array([True] * 20),
  "dates": pa.array([1] * 20, pa.date32()),
  "decimals": pa.array([1] * 20, pa.decimal128(5)),
}
SCHEMAS = st.lists(
  st.tuples(
    st.sampled_from(["img", "image", "label", "a\nb", "img.bytes"]),
    st.sampled_from(sorted(COLUMNS)),
  ),
  max_size=4,
)


@searched(400)
@given(SCHEMAS)
def test_shards_of_all_schemas(place_to_write, schema):
  file = io.BytesIO()
  arrays, names = [COLUMNS[kind] for _, kind in schema], [name for name, _ in schema]
  pq.write_table(pa.Table.from_arrays(arrays, names=names), file)
  folder = place_to_write / "data"
  shards = {f"cifar10/{split}.parquet": file.getvalue() for split in ("train", "test")}
  write_tree(folder, shards)
  check(lambda folder: cifar_files.load(folder, counts=(20, 20)), folder)
  shards = {f"{split}.parquet": file.getvalue() for split in ("train", "validation")}
  write_tree(folder, shards)
  check(read_images, folder)


VALUES = st.recursive(
  st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.sampled_from(
      [
        np.zeros((16, 3072), np.uint8),
        np.zeros((16, 3072), np.uint8, order="F"),
        np.zeros(16, np.int64),
        np.float32(1),
        np.int64(3),
        np.datetime64("2020"),
        np.array([None]),
        [1] * 16,
        [np.int64(1)] * 16,
        range(16),
        {1},
        1j,
      ]
    ),
  ),
  lambda values: st.one_of(
    st.lists(values, max_size=3),
    st.dictionaries(st.sampled_from(["data", b"labels", 5, None]), values, max_size=3),
  ),
  max_leaves=5,
)
KEYS = st.sampled_from(["data", b"data", "labels", b"labels", 5, None, "x", b"\xff"])


@searched(400)
@given(st.one_of(VALUES, st.dictionaries(KEYS, VALUES)), st.sampled_from([0, 2, 4, 5]))
def test_pickles_of_all_values(place_to_write, value, protocol):
  folder = place_to_write / "data"
  content = pickle.dumps(value, protocol)
  write_tree(folder, {"cifar-10-batches-py/data_batch_1": content})
  check(read_cifar10, folder)


OPCODES = st.one_of(
  st.sampled_from(
    [
      b"}", b"]", b"(", b")", b"l", b"t", b"d", b"e", b"u", b"a", b"s", b"0", b"2",
      b"\x85", b"\x86", b"\x87", b"R", b"b", b"\x81", b"\x8f", b"\x90", b"\x91",
      b"\x94", b"q\x00", b"q\x01", b"q\xff", b"h\x00", b"h\x01", b"N", b"\x88",
      b"Q", b"P1\n",
      b"r\xff\xff\xff\x03", b"j\0\0\0\0", b"p99999999\n", b"g0\n", b"\x82\x01",
      b"\x8e\0\0\0\x80\0\0\0\0", b"\x96\0\0\0\x08\0\0\0\0", b"B\0\0\0\x10",
      b"\x95\0\0\0\x80\0\0\0\0", b"U\x01b", b"X\x01\0\0\0|", b"K\x07", b"M\x00\x0c",
      b"J\xff\xff\xff\xff", b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"cos\nsystem\n",
      b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy.core.multiarray\nscalar\n",
      b"c_codecs\nencode\n", b"X\x06\0\0\0latin1", b"U\x02u1", b"X\x04\0\0\0data",
      b"X\x06\0\0\0labels", b"(K\x03U\x01|NNNK\x00K\x00K\x00tb",
      b"X\0\0\x01\0" + b"a" * 2**16,
    ]
  ),
  st.binary(min_size=1, max_size=3),
)  # fmt: skip


@searched(500)
@given(st.lists(st.tuples(OPCODES, st.sampled_from([1, 1, 1, 1, 500])), max_size=40))
def test_pickles_of_all_opcodes(place_to_write, opcodes):
  folder = place_to_write / "data"
  content = b"\x80\x02" + b"".join(code * count for code, count in opcodes) + b"."
  write_tree(folder, {"cifar-10-batches-py/data_batch_1": content})
  tracemalloc.start()
  check(read_cifar10, folder)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 20 * len(content) + 4 * MEBIBYTE


@searched(30)
@given(st.sampled_from([1, 9, 2**10, 2**20, 2**25, 2**27]), st.integers(0, 3))
def test_compressed_texts_of_all_sizes(place_to_write, size, start):
  folder = place_to_write / "data"
  content = gzip.compress(b"a b\n" * start + b" " * size, 1)
  write_tree(folder, {f"{name}.gz": content for name in PTB_NAMES})
  tracemalloc.start()
  check(lambda folder: load_text("words", folder), folder)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 6 * min(size, 4 * 5_101_618) + 4 * MEBIBYTE


ARRAYS = st.sampled_from(
  [
    np.zeros((80, 32, 32, 3), np.uint8),
    np.zeros((20, 32, 32, 3), np.uint8),
    np.zeros((80, 32, 32, 3)),
    np.zeros((80, 31, 32, 3), np.uint8),
    np.zeros(80, np.int32),
    np.zeros(20, np.int32),
    np.zeros(20, np.int64),
    np.full(20, 10, np.int32),
    np.full(80, -1, np.int32),
    np.zeros(80),
    np.array("text"),
    np.array(1),
    np.zeros(0),
  ]
)
NAMES = [
  "train_images",
  "train_labels",
  "test_images",
  "test_labels",
  "fingerprint",
  "x",
]


def test_caches_of_all_arrays(tmp_path, place_to_write):
  LAYOUTS["parquet of PNG"](tmp_path, make_small())
  shutil.rmtree(cache_dir(), ignore_errors=True)
  load_small(tmp_path)
  (kept,) = cache_dir().iterdir()
  with np.load(kept) as content:
    whole = dict(content)

  @searched(300)
  @given(
    st.dictionaries(st.sampled_from(NAMES), ARRAYS), st.sets(st.sampled_from(NAMES))
  )
  def search(others, missing):
    arrays = {name: x for name, x in {**whole, **others}.items() if name not in missing}
    np.savez(kept, **arrays)
    read_cifar10(tmp_path)

  search()
