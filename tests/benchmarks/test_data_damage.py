"""Damaged, hostile and unusual data: one line that names the file, little memory."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import tracemalloc
import zlib

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import (
  LAYOUTS,
  encode,
  load_small,
  make_small,
  write_archive,
  write_binary,
  write_parquet,
  write_pickles,
)
from imagenet_cases import CLASSES, write_folders, write_shard
from imagenet_cases import write_parquet as write_imagenet
from PIL import Image

from benchmarks import __main__ as command
from benchmarks.data import DataError, cifar_files, image_crops, image_files, load
from benchmarks.data.cache import cache_dir
from benchmarks.data.dataset import check_labels
from benchmarks.data.files import Bounded, read_file, unzip
from benchmarks.data.image_batches import load as load_images
from benchmarks.data.image_crops import decode
from benchmarks.data.image_files import Part, find_images
from benchmarks.data.parquet import Shard
from benchmarks.data.text_files import PTB_NAMES, load_text

MEBIBYTE = 2**20


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("ALRAO_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def small():
  return make_small()


@pytest.fixture
def peak():
  """Returns the largest number of bytes that Python and numpy have held in the test."""
  tracemalloc.start()
  yield lambda: tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()


def refuse(call, *args, match=""):
  """Calls what must raise a `DataError` of one line, and returns its text."""
  with pytest.raises(DataError, match=match) as error:
    call(*args)
  assert len(str(error.value).splitlines()) == 1
  return str(error.value)


# Every text is one line.


@pytest.mark.parametrize(
  "text, line",
  [
    ("a\nb", "a b"),
    ("a\r\x1b[2Jb\x00", r"a\r\x1b[2Jb\x00"),
    ("größer\u2028x", r"größer\u2028x"),
    ("\udcff.txt", r"\udcff.txt"),
  ],
)
def test_a_data_error_is_one_line(text, line):
  error = DataError(text)
  assert str(error) == line
  assert str(pickle.loads(pickle.dumps(error))) == line  # from a process that reads
  assert len(str(DataError("x" * 10_000))) == 2_000


def test_files_with_odd_names_are_read_and_named(small, tmp_path):
  folder = write_parquet(tmp_path, small).rename(tmp_path / "cifar10\nof mine")
  assert len(load_small(tmp_path).train_labels) == 80
  (folder / "test-00000-of-00001.parquet").write_bytes(b"")
  refuse(load_small, tmp_path, match=r"cifar10 of mine/test-00000-of-00001\.parquet: ")
  # Arrow takes names in UTF-8 alone.
  folder.rename(tmp_path / os.fsdecode(b"cifar10-\xff"))
  refuse(load_small, tmp_path, match=r"cifar10-\\udcff/t.*-of-0000.\.parquet: ")
  files = find_images("imagenette", write_folders(tmp_path / "other"))
  path = tmp_path / "other" / "train" / "hen" / "000.jpg"
  path.rename(path.with_name("000\n.jpg"))
  files = find_images("imagenette", tmp_path / "other")
  assert files.train.name(0).endswith("000 .jpg")


# Modes of images.


def png(array, colour):
  """A PNG of 16 bits a channel, which pillow can't write for colours."""
  height, width = array.shape[:2]
  rows = array.astype(">u2").reshape(height, -1)
  lines = b"".join(b"\0" + row.tobytes() for row in rows)
  return png_of(width, height, 16, colour, zlib.compress(lines))


def png_of(width, height, depth, colour, data):
  def chunk(name, content):
    checksum = zlib.crc32(name + content)
    return (
      struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)
    )

  header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
  chunks = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + chunks


def written(image, kind="PNG", **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


RAMP = np.arange(64 * 64).reshape(64, 64) * 16  # 16 bits, from black to white
GREY = (RAMP >> 8).astype(np.uint8)
COLOURS = np.stack([GREY, GREY.T, 255 - GREY], axis=-1)
ALPHA = GREY[::-1]
THREE = GREY[..., None].repeat(3, axis=-1)
CMYK = Image.fromarray(np.concatenate([COLOURS, ALPHA[..., None]], -1), "RGBA")
PALETTE = Image.fromarray(GREY).convert("P")

MODES = {
  "1": (written(Image.fromarray(GREY > 99)), np.where(THREE > 99, 255, 0)),
  "L": (written(Image.fromarray(GREY)), THREE),
  "LA": (
    written(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])),
    THREE,
  ),
  "P": (written(PALETTE), THREE),
  "P, one transparent": (written(PALETTE, transparency=7), THREE),
  "P, some transparent": (written(PALETTE, transparency=bytes(range(256))), THREE),
  "L, one transparent": (written(Image.fromarray(GREY), transparency=9), THREE),
  "RGB": (written(Image.fromarray(COLOURS)), COLOURS),
  "RGB, one transparent": (
    written(Image.fromarray(COLOURS), transparency=(1, 2, 3)),
    COLOURS,
  ),
  "RGBA": (
    written(Image.fromarray(np.concatenate([COLOURS, ALPHA[..., None]], axis=-1))),
    COLOURS,
  ),
  "16-bit grey": (written(Image.fromarray(RAMP.astype(np.uint16))), THREE),
  "16-bit grey, one transparent": (
    written(Image.fromarray(RAMP.astype(np.uint16)), transparency=9),
    THREE,
  ),
  "16-bit grey, alpha": (png(np.stack([RAMP, RAMP.T], axis=-1), 4), THREE),
  "16-bit RGB": (
    png(np.stack([RAMP, RAMP.T, 65535 - RAMP], axis=-1), 2),
    np.stack([GREY, GREY.T, (65535 - RAMP) >> 8], axis=-1),
  ),
  "16-bit RGBA": (png(np.stack([RAMP] * 4, axis=-1), 6), THREE),
  "WebP with alpha": (
    written(Image.fromarray(THREE).convert("RGBA"), "WEBP", lossless=True),
    THREE,
  ),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_whole_numbers_are_converted(mode):
  encoded, expected = MODES[mode]
  image = decode(encoded)
  assert image is not None and image.mode == "RGB"
  np.testing.assert_array_equal(np.asarray(image), expected)


def test_cmyk_is_converted_to_its_complement():
  ink = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
  image = decode(written(ink, "JPEG", quality=100))
  assert image is not None
  # Cyan, to the precision of JPEG.
  np.testing.assert_allclose(
    np.asarray(image, int), [[[0, 255, 255]] * 16] * 16, atol=3
  )


@pytest.mark.parametrize(
  "encoded",
  [
    written(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"),
    written(Image.fromarray(np.zeros((8, 8), np.int32)), "TIFF"),
    written(Image.fromarray(np.zeros((8, 8), np.uint8)), "GIF"),
    written(Image.fromarray(np.zeros((8, 8), np.uint8)), "BMP"),
    b"",
    7,
  ],
)
def test_other_kinds_of_files_are_counted_as_damaged_by_name(encoded, tmp_path):
  assert decode(encoded) is None
  files = find_images("imagenette", write_folders(tmp_path))
  path = tmp_path / "train" / "hen" / "000.jpg"
  path.write_bytes(bytes(encoded))
  batch = load_images(Part(files.train, np.arange(2)), np.arange(2), 8, centre)
  assert batch["is_corrupt"].tolist() == [True, False]
  assert files.train.name(batch["index"][0]) == str(path)


def centre(index, width, height):
  return image_crops.centre_box(width, height), False


@pytest.mark.parametrize("mode", ["F", "I", "HSV", "LAB"])
def test_modes_without_a_right_conversion_are_refused(mode):
  with pytest.raises(ValueError, match=f"mode {mode}, expected one of"):
    image_crops.to_rgb(Image.new(mode, (2, 2)))


def test_cifar10_converts_16_bits_too(small, tmp_path):
  folder = write_parquet(tmp_path, small)
  encoded = written(Image.fromarray(RAMP[:32, :32].astype(np.uint16)))
  images = [{"bytes": encoded, "path": "x"}] * 20
  shard = folder / "test-00000-of-00001.parquet"
  pq.write_table(pa.table({"img": images, "label": [1] * 20}), shard)
  np.testing.assert_array_equal(load_small(tmp_path).test_images[3], THREE[:32, :32])


# Sizes that headers claim.


def webp_of(width, height):
  """A lossless WebP of any size, with the data of a small one."""
  data = written(Image.new("RGB", (16, 16)), "WEBP", lossless=True)[20:]
  size = struct.pack("<I", (width - 1) | ((height - 1) << 14))
  chunk = b"VP8L" + struct.pack("<I", len(data)) + b"\x2f" + size + data[5:]
  return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def jpeg_of(width, height):
  content = bytearray(written(Image.new("RGB", (16, 16)), "JPEG"))
  place = content.index(b"\xff\xc0") + 5
  content[place : place + 4] = struct.pack(">HH", height, width)
  return bytes(content)


def png_header(width, height):
  return png_of(width, height, 8, 2, zlib.compress(b"0" * 9))


# Pillow warns of more than 89 million pixels, and refuses twice as many.
@pytest.mark.parametrize("side", [8_193, 9_700, 16_000])
@pytest.mark.parametrize("make", [png_header, webp_of, jpeg_of])
def test_a_huge_image_is_damaged_before_it_is_decoded(make, side, monkeypatch):
  encoded = make(side, side)
  decoded = []
  monkeypatch.setattr(image_crops, "to_rgb", decoded.append)
  assert decode(encoded) is None
  assert not decoded


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (2**31 - 1, 2**31 - 1)])
def test_an_image_without_pixels_or_with_too_many_is_damaged(size):
  assert decode(png_header(*size)) is None


@pytest.mark.parametrize("size", [(16_384, 16_384), (9_700, 9_700), (32, 31)])
@pytest.mark.parametrize("make", [png_header, webp_of])
def test_cifar10_takes_images_of_its_size_alone(make, size, small, tmp_path):
  folder = write_parquet(tmp_path, small)
  images = [{"bytes": make(*size), "path": "x"}] * 20
  shard = folder / "test-00000-of-00001.parquet"
  pq.write_table(pa.table({"img": images, "label": [1] * 20}), shard)
  refuse(load_small, tmp_path, match=f"{shard.name}: image 0: ")


# Archives.


def add(path, *members):
  """Writes an archive of members alone, each with its content."""
  with tarfile.open(path, "w:gz") as archive:
    for member, content in members:
      archive.addfile(member, io.BytesIO(content))


def member(kind, link="", size=0, name="cifar-10-batches-py/data_batch_1"):
  found = tarfile.TarInfo(name)
  found.type, found.linkname, found.size = kind, link, size
  return found


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"])
@pytest.mark.parametrize(
  "kind, link",
  [
    (tarfile.SYMTYPE, "nowhere"),
    (tarfile.SYMTYPE, "data_batch_1"),
    (tarfile.SYMTYPE, "/etc/passwd"),
    (tarfile.SYMTYPE, "../../outside"),
    (tarfile.LNKTYPE, "nowhere"),
    (tarfile.LNKTYPE, "cifar-10-batches-py/data_batch_1"),
    (tarfile.LNKTYPE, "/etc/passwd"),
    (tarfile.DIRTYPE, ""),
    (tarfile.FIFOTYPE, ""),
    (tarfile.CHRTYPE, ""),
    (tarfile.BLKTYPE, ""),
  ],
)
def test_what_is_no_file_in_an_archive_is_refused(kind, link, name, tmp_path):
  ending = ".bin" if "binary" in name else ""
  place = f"cifar-10-batches-py/data_batch_1{ending}"
  add(tmp_path / name, (member(kind, link, name=place), b""))
  refuse(load_small, tmp_path, match=f"{name}/{place}: a link, a folder or a device")


def test_links_in_an_archive_beside_the_data_are_left_alone(small, tmp_path):
  path = write_archive(tmp_path, small, write_binary, "cifar-10-binary.tar.gz")
  content = gzip.decompress(path.read_bytes())
  extra = tmp_path / "extra.tar.gz"
  add(extra, (member(tarfile.SYMTYPE, "nowhere", name="latest"), b""))
  # An archive that begins with another one's members.
  path.write_bytes(gzip.compress(gzip.decompress(extra.read_bytes())[:512] + content))
  assert len(load_small(tmp_path / "data").train_labels) == 80


def sparse(size):
  """A sparse member, which says that it has any size but has no data."""
  header = member(tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT)
  header = bytearray(header)
  header[386:410] = b"%011o\0%011o\0" % (size, 0)
  header[483:495] = b"%011o\0" % size
  header[148:156] = b"        "
  header[148:156] = b"%06o\0 " % sum(header)
  return bytes(header)


@pytest.mark.parametrize("size", [0, 2**20, 2**32])
def test_a_sparse_file_in_an_archive_is_refused(size, peak, tmp_path):
  path = tmp_path / "cifar-10-python.tar.gz"
  path.write_bytes(gzip.compress(sparse(size) + bytes(1024)))
  refuse(load_small, tmp_path, match=path.name)
  assert peak() < 4 * MEBIBYTE


def test_an_archives_file_of_any_size_takes_no_memory(peak, tmp_path):
  path = tmp_path / "cifar-10-binary.tar.gz"
  size = cifar_files.MAX_FILE_BYTES + 1
  place = "cifar-10-batches-bin/data_batch_1.bin"
  head = member(tarfile.REGTYPE, size=size, name=place).tobuf()
  path.write_bytes(gzip.compress(head + bytes(2**16)))
  refuse(
    load_small, tmp_path, match=f"data_batch_1.bin: holds {size:,} bytes, expected"
  )
  assert peak() < 4 * MEBIBYTE


@pytest.mark.parametrize("place", ["readme.html", "a" * 90])
def test_an_archive_is_read_up_to_a_size(place, peak, tmp_path, monkeypatch):
  monkeypatch.setattr(cifar_files, "MAX_BYTES", 2**20)
  path = tmp_path / "cifar-10-binary.tar.gz"
  size = 2**26
  add(path, (member(tarfile.REGTYPE, size=size, name=place), bytes(size)))
  tracemalloc.reset_peak()
  before = tracemalloc.get_traced_memory()[0]
  refuse(load_small, tmp_path, match="more than 1,048,576 bytes")
  assert peak() - before < 4 * MEBIBYTE


def test_an_archive_of_too_many_files_is_refused(tmp_path):
  path = tmp_path / "cifar-10-binary.tar.gz"
  add(path, *[(member(tarfile.REGTYPE, name=f"{i}"), b"") for i in range(1_001)])
  refuse(load_small, tmp_path, match=r"binary\.tar\.gz: more than 1,?000 files")


def test_headers_with_endless_names_are_refused(peak, tmp_path, monkeypatch):
  monkeypatch.setattr(cifar_files, "MAX_BYTES", 2**20)
  path = tmp_path / "cifar-10-binary.tar.gz"
  head = member(tarfile.GNUTYPE_LONGNAME, size=2**33).tobuf(tarfile.GNU_FORMAT)
  path.write_bytes(gzip.compress(head + bytes(2**24)))
  refuse(load_small, tmp_path, match="binary.tar.gz")


def test_a_command_says_it_in_one_line_and_exits_with_2(tmp_path, monkeypatch, capsys):
  add(tmp_path / "cifar-10-python.tar.gz", (member(tarfile.SYMTYPE, "nowhere"), b""))
  arguments = [
    "run",
    "cifar10",
    "--out",
    str(tmp_path / "out"),
    "--data-dir",
    str(tmp_path),
  ]
  before = jax.config.jax_compilation_cache_dir
  with pytest.raises(SystemExit) as stopped:
    command.main(arguments)
  jax.config.update("jax_compilation_cache_dir", before)
  assert stopped.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"error: {tmp_path}/cifar-10-python.tar.gz/")


# Files that cannot be read.


def no_file(path):
  path.mkdir()


def pipe(path):
  os.mkfifo(path)


def loop(path):
  path.symlink_to(path.name)


def dangling(path):
  path.symlink_to("nowhere")


def device(path):
  path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [no_file, pipe, loop, dangling, device])
@pytest.mark.parametrize(
  "write, name",
  [
    (write_pickles, "data_batch_2"),
    (write_binary, "test_batch.bin"),
    (write_parquet, "train-00001-of-00002.parquet"),
    (write_parquet, "test-00000-of-00001.parquet"),
  ],
)
def test_what_is_no_file_in_a_folder_is_named(write, name, make, small, tmp_path):
  path = write(tmp_path, small) / name
  path.unlink()
  make(path)
  refuse(load_small, tmp_path, match=f"{name}: cannot be read ")


@pytest.mark.parametrize(
  "layout", ["binary", "archive of pickles", "parquet of PNG", "text", "images"]
)
def test_what_may_not_be_read_is_named(layout, small, tmp_path, monkeypatch):
  # Tests may run as a user who may read all.
  monkeypatch.setattr(os, "access", lambda path, mode: tmp_path not in path.parents)
  match = r": cannot be read \(Permission denied\)"
  if layout == "images":
    files = find_images("imagenette", write_folders(tmp_path))
    assert files.train.read(np.arange(2)) == [None, None]
  elif layout == "text":
    for name in PTB_NAMES:
      (tmp_path / name).write_text("abc")
    refuse(load_text, "words", tmp_path, match=match)
  else:
    LAYOUTS[layout](tmp_path, small)
    data_dir = tmp_path / "data" if "archive" in layout else tmp_path
    refuse(load_small, data_dir, match=match)


@pytest.mark.parametrize("make", [no_file, pipe, loop, dangling, device])
def test_what_is_no_file_among_images_is_counted_as_damaged(make, tmp_path):
  files = find_images("imagenette", write_folders(tmp_path))
  path = tmp_path / "train" / "hen" / "000.jpg"
  path.unlink()
  make(path)
  assert files.train.read(np.arange(1)) == [None]
  assert find_images("imagenette", tmp_path).train.read(np.arange(1)) == [None]


@pytest.mark.parametrize("make", [no_file, loop, dangling])
def test_what_is_no_file_in_place_of_a_text_is_named(make, tmp_path):
  path = tmp_path / "my.txt"
  make(path)
  with pytest.raises(DataError, match=r"my\.txt: cannot be read"):
    load_text("characters", files=[path])
  path.rename(tmp_path / PTB_NAMES[0])
  refuse(load_text, "characters", tmp_path, match="no Penn Treebank below")


def test_a_text_may_come_through_a_pipe(tmp_path):
  reading, writing = os.pipe()
  os.write(writing, b"abcde" * 20)
  os.close(writing)
  text = load_text("characters", files=[type(tmp_path)(f"/dev/fd/{reading}")])
  os.close(reading)
  assert len(text.train) == 80


@pytest.mark.parametrize("read", [load_small, lambda path: load_text("words", path)])
def test_a_folder_that_cannot_be_searched_is_told(read, tmp_path, monkeypatch):
  (tmp_path / "file").touch()
  refuse(read, tmp_path / "file", match=r"below .*file \(Not a directory\)")
  refuse(read, tmp_path / "none", match=r"below .*none \(no such folder\)")
  loop(tmp_path / "loop")
  refuse(read, tmp_path / "loop", match=r"below .*loop \(Too many levels of symbolic")

  def denied(*_):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(os, "scandir", denied)
  refuse(read, tmp_path, match=r"below .* \(Permission denied\)")


def test_a_class_that_cannot_be_listed_is_told(tmp_path, monkeypatch):
  write_folders(tmp_path)
  scandir = os.scandir

  def denied(folder):
    if str(folder).endswith("hen"):
      raise PermissionError(13, "Permission denied")
    return scandir(folder)

  monkeypatch.setattr(os, "scandir", denied)
  refuse(find_images, "imagenette", tmp_path, match=r"hen: cannot be read \(Perm")


def test_a_user_that_there_is_not_is_told():
  refuse(load, "cifar10", "~no-such-user/data", match="~no-such-user.*no such user")


def test_files_are_read_up_to_a_size(peak, tmp_path):
  path = tmp_path / "x"
  path.write_bytes(bytes(100))
  assert read_file(path, 100) == bytes(100)
  refuse(read_file, path, 99, match="x: holds 100 bytes, expected at most 99")
  refuse(read_file, type(path)("/proc/self/maps"), 9, match="maps: holds more than 9")
  with path.open("wb") as file:
    file.truncate(2**40)
  refuse(read_file, path, 2**20, match="x: holds 1,099,511,627,776 bytes, expected")
  assert peak() < 4 * MEBIBYTE


# Pickles that take memory.


def pickled(*opcodes):
  return b"\x80\x02" + b"".join(opcodes) + b"."


LONG = b"X" + struct.pack("<I", 2**20) + b"a" * 2**20 + b"q\x00"  # remembered as 0
BOMBS = {
  "a table of what is remembered": pickled(b"}r", struct.pack("<I", 2**26)),
  "objects without content": pickled(b"(", b"\x8f" * 10**6, b"l"),
  "a length that is not there": pickled(b"\x8e", struct.pack("<Q", 2**36)),
  "lists of the same list": pickled(
    b"}(X\x04\x00\x00\x00data](", b"K\x00" * 999, b"eq\x00", b"0](", b"h\x00" * 300,
    b"eq\x01](", b"h\x01" * 300, b"eX\x06\x00\x00\x00labels](eu",
  ),
  "bytes encoded again and again": pickled(
    LONG, b"0c_codecs\nencode\nq\x01", b"X\x06\x00\x00\x00latin1q\x020](",
    b"h\x01h\x00h\x02\x86R" * 150, b"e",
  ),
  "a type's name that grows": pickled(
    LONG, b"0cnumpy\ndtype\n", b"X\x02\x00\x00\x00u1K\x00K\x01\x87R",
    b"(K\x03h\x00NNNK\x00K\x00K\x00tb" * 100,
  ),
}  # fmt: skip


def test_a_pickle_of_tuples_in_tuples_is_refused(small, tmp_path):
  # Python would end without an error when it hashes the key.
  path = write_pickles(tmp_path, small) / "data_batch_1"
  path.write_bytes(pickled(b"}N", b"\x85" * 200_000, b"Ns"))
  refuse(load_small, tmp_path, match="data_batch_1: holds too many")
  content = pickled(b"}N", b"\x85" * 30_000, b"Ns")
  with pytest.raises(DataError, match="too many tuples"):
    cifar_files.PICKLE.parse("file", content, 10_000)


@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_takes_little_more_memory_than_its_file(name, peak, small, tmp_path):
  path = write_pickles(tmp_path, small) / "data_batch_1"
  path.write_bytes(BOMBS[name])
  tracemalloc.reset_peak()
  before = tracemalloc.get_traced_memory()[0]
  refuse(load_small, tmp_path, match="data_batch_1: ")
  assert peak() - before < cifar_files.MAX_FILE_BYTES + 16 * MEBIBYTE


# Shards of other schemas.

PNG = encode(np.zeros((32, 32, 3), np.uint8), "PNG")
IMAGES = pa.array([{"bytes": PNG, "path": "x"}] * 20)
LABELS = pa.array([1] * 20, pa.int64())


def structs(kind, value):
  return pa.array([{"bytes": value}] * 20, pa.struct([("bytes", kind)]))


def columns(*pairs):
  return pa.Table.from_arrays([x for _, x in pairs], names=[name for name, _ in pairs])


TWICE = pa.StructArray.from_arrays([IMAGES.field("bytes")] * 2, names=["bytes"] * 2)
SCHEMAS = {
  "no columns": columns(),
  "no label": columns(("img", IMAGES)),
  "no images": columns(("label", LABELS)),
  "another name": columns(("pixels", IMAGES), ("label", LABELS)),
  "a name of two lines": columns(("a\nb", IMAGES), ("label", LABELS)),
  "two labels": columns(("img", IMAGES), ("label", LABELS), ("label", LABELS)),
  "two img": columns(("img", IMAGES), ("img", IMAGES), ("label", LABELS)),
  "bytes twice": columns(("img", TWICE), ("label", LABELS)),
  "bytes of int64": columns(("img", structs(pa.int64(), 5)), ("label", LABELS)),
  "bytes of string": columns(("img", structs(pa.string(), "a")), ("label", LABELS)),
  "bytes of a list": columns(
    ("img", structs(pa.list_(pa.uint8()), [1])), ("label", LABELS)
  ),
  "bytes of a struct": columns(
    ("img", structs(pa.struct([("bytes", pa.binary())]), {"bytes": PNG})),
    ("label", LABELS),
  ),
  "bytes of a fixed size": columns(
    ("img", structs(pa.binary(3), b"abc")), ("label", LABELS)
  ),
  "a list of images": columns(
    ("img", pa.array([[{"bytes": PNG}]] * 20)), ("label", LABELS)
  ),
  "plain bytes": columns(("img", pa.array([PNG] * 20)), ("label", LABELS)),
  "labels of floats": columns(("img", IMAGES), ("label", pa.array([1.0] * 20))),
  "labels of text": columns(("img", IMAGES), ("label", pa.array(["1"] * 20))),
  "labels in lists": columns(("img", IMAGES), ("label", pa.array([[1]] * 20))),
  "labels of true": columns(("img", IMAGES), ("label", pa.array([True] * 20))),
  "labels of nothing": columns(("img", IMAGES), ("label", pa.nulls(20))),
  "a label missing": columns(
    ("img", IMAGES), ("label", pa.array([1] * 19 + [None], pa.int64()))
  ),
  "a negative label": columns(("img", IMAGES), ("label", pa.array([-1] * 20))),
  "a label too large": columns(("img", IMAGES), ("label", pa.array([10] * 20))),
  "a label of 64 bits": columns(
    ("img", IMAGES), ("label", pa.array([2**63 + 1] * 20, pa.uint64()))
  ),
  "a label of 33 bits": columns(("img", IMAGES), ("label", pa.array([2**32] * 20))),
  "an image missing": columns(
    ("img", pa.array([*IMAGES[:19].to_pylist(), None], IMAGES.type)), ("label", LABELS)
  ),
  "no rows": columns(("img", IMAGES[:0]), ("label", LABELS[:0])),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_shard_of_another_schema_is_named(name, small, tmp_path):
  shard = write_parquet(tmp_path, small) / "test-00000-of-00001.parquet"
  pq.write_table(SCHEMAS[name], shard)
  refuse(load_small, tmp_path, match=r"/cifar10(/test-00000-of-00001\.parquet)?: ")


@pytest.mark.parametrize(
  "name", [x for x in SCHEMAS if "label" in x and x != "a label too large"]
)
def test_labels_of_images_read_later_are_checked_alike(name, tmp_path):
  folder = write_imagenet(tmp_path, info=False)
  shard = folder / "train-00001-of-00002.parquet"
  pq.write_table(SCHEMAS[name], shard)
  refuse(find_images, "imagenet", tmp_path, match="00001-of-00002.parquet: ")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_bytes_of_any_kind_are_read(kind, small, tmp_path):
  folder = write_parquet(tmp_path, small)
  shard = folder / "test-00000-of-00001.parquet"
  pq.write_table(columns(("img", structs(kind, PNG)), ("label", LABELS)), shard)
  assert not load_small(tmp_path).test_images.any()
  write_imagenet(tmp_path / "imagenette")
  shard = tmp_path / "imagenette" / "train-00001-of-00002.parquet"
  pq.write_table(columns(("image", structs(kind, PNG)), ("label", LABELS)), shard)
  source = find_images("imagenette", tmp_path / "imagenette").train
  assert source.read(np.array([45, 30])) == [PNG, PNG]
  assert source.name(30).endswith("of-00002.parquet: image 4")


def test_a_row_group_is_read_up_to_a_size(tmp_path):
  # One value of a mebibyte that a hundred rows refer to: a file of a few kilobytes.
  value, path = bytes(2**20), tmp_path / "train.parquet"
  images = pa.array([{"bytes": value, "path": "x"}] * 100)
  table = columns(("img", images), ("label", pa.array([1] * 100)))
  pq.write_table(table, path, compression="zstd")
  assert path.stat().st_size < 2**16
  before = pa.total_allocated_bytes()
  shard = Shard(path)
  text = refuse(shard.images, 0, 8 * MEBIBYTE, match=r"train\.parquet: a row group")
  assert "expected at most 8,388,608" in text
  # What is read, and one batch more, of 100 mebibytes.
  assert pa.total_allocated_bytes() - before < 20 * MEBIBYTE
  assert len(shard.images(0, 101 * MEBIBYTE)) == 100


def test_rows_are_counted_before_labels_are_read(tmp_path, monkeypatch):
  monkeypatch.setattr(image_files, "MAX_IMAGES", 39)
  monkeypatch.setattr(Shard, "labels", lambda *_: np.zeros(26, np.int32))
  write_imagenet(tmp_path)
  refuse(find_images, "imagenette", tmp_path, match="00001.* 40 train images in the")


def test_a_shard_that_has_changed_is_named(tmp_path):
  write_imagenet(tmp_path)
  source = find_images("imagenette", tmp_path).train
  write_shard(tmp_path / "train-00001-of-00002.parquet", [("x", b"", 0)] * 3)
  match = "00001-of-00002.parquet: (changed while|truncated)"
  refuse(source.read, np.arange(40), match=match)


# Names of classes.


@pytest.mark.parametrize(
  "info",
  [
    "[" * 100_000,
    "\ud800",
    "{}",
    "[1]",
    '{"info": {"features": {"label": {"names": 5}}}}',
    '{"info": {"features": {"label": {"names": "hen"}}}}',
    '{"info": {"features": {"label": null}}}',
  ],
)
def test_what_names_no_classes_is_left_alone(info, tmp_path):
  write_imagenet(tmp_path, info=False)
  shard = tmp_path / "train-00000-of-00002.parquet"
  metadata = {"huggingface": info.encode(errors="surrogatepass")}
  table = pq.read_table(shard).replace_schema_metadata(metadata)
  pq.write_table(table, shard, row_group_size=7)
  files = find_images("imagenette", tmp_path)
  assert (files.train.class_names, files.num_classes) == ((), 3)


def test_shards_with_other_classes_are_told(tmp_path):
  write_imagenet(tmp_path)
  shard = tmp_path / "train-00001-of-00002.parquet"
  write_shard(shard, [("x.jpg", b"", 0)], names=CLASSES[::-1])
  refuse(find_images, "imagenette", tmp_path, match="00001.*: other names of classes")


def test_more_classes_than_a_data_set_has_are_told(tmp_path):
  write_imagenet(tmp_path, info=False)
  images = [("x.jpg", b"", label) for label in (0, 700)]
  write_shard(tmp_path / "train-00001-of-00002.parquet", images, names=())
  refuse(find_images, "imagenette", tmp_path, match="701 classes, where imagenette has")
  assert find_images("imagenet", tmp_path).num_classes == 701


@pytest.mark.parametrize(
  "labels", [np.zeros(3), np.zeros((3, 1), int), np.array([None]), np.array(["1"])]
)
def test_labels_are_integers_one_for_each_image(labels):
  refuse(check_labels, "file", labels, 10, match="file: labels are of type")


# Texts.


def test_a_compressed_text_takes_no_memory_before_its_size_is_known(peak, tmp_path):
  path = tmp_path / f"{PTB_NAMES[0]}.gz"
  with gzip.open(path, "wb") as file:
    for _ in range(64):
      file.write(bytes(2**20))
  for name in PTB_NAMES[1:]:
    (tmp_path / name).write_text("abc\n")
  tracemalloc.reset_peak()
  refuse(load_text, "words", tmp_path, match=r"train\.txt\.gz: holds more than 20,4")
  assert peak() < 8 * MEBIBYTE


def test_a_text_of_ones_own_has_a_largest_size_too(tmp_path):
  path = tmp_path / "my.txt"
  with path.open("wb") as file:
    file.truncate(2**30 + 1)
  with pytest.raises(DataError, match=r"my\.txt: holds 1,073,741,825 bytes, expected"):
    load_text("characters", files=[path])


def test_sizes_are_exact_limits(tmp_path):
  content = gzip.compress(b"a" * 1000)
  assert unzip(tmp_path, content, 1000) == b"a" * 1000
  refuse(unzip, tmp_path, content, 999, match="holds more than 999 bytes")
  stream = Bounded(tmp_path, io.BytesIO(b"abc"), 3)
  assert (stream.read(2), stream.read(9), stream.read(9)) == (b"ab", b"c", b"")


# A cache of other arrays.


def changed(content, name, change):
  return {**content, name: change(content[name])}


CACHES = {
  "labels too large": ("test_labels", lambda x: np.where(x == 3, 10, x).astype("i4")),
  "labels too small": ("test_labels", lambda x: x - np.int32(1)),
  "labels of other type": ("train_labels", lambda x: x.astype(np.int64)),
  "labels of floats": ("train_labels", lambda x: x.astype(np.float32)),
  "labels too few": ("train_labels", lambda x: x[1:]),
  "images of other type": ("train_images", lambda x: x.astype(np.float32)),
  "images of other shape": ("train_images", lambda x: x[:, :31]),
  "images too few": ("test_images", lambda x: x[1:]),
  "images of objects": ("test_images", lambda x: np.array([None])),
  "another fingerprint": ("fingerprint", lambda x: x + 1),
  "a fingerprint of text": ("fingerprint", lambda x: np.array("x")),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_of_other_arrays_is_replaced(name, save, small, tmp_path):
  write_parquet(tmp_path, small)
  whole = load_small(tmp_path)
  (kept,) = cache_dir().iterdir()
  intact = kept.read_bytes()
  with np.load(kept) as content:
    save(kept, **changed(dict(content), *CACHES[name]))
  again = load_small(tmp_path)
  for field in ("train_images", "train_labels", "test_images", "test_labels"):
    found, expected = getattr(again, field), getattr(whole, field)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
  assert len(kept.read_bytes()) == len(intact)


@pytest.mark.parametrize(
  "content",
  [
    {},
    {"train_images": np.zeros(3)},
    {"fingerprint": np.zeros(3)},
  ],
)
def test_a_cache_without_arrays_is_replaced(content, small, tmp_path):
  write_parquet(tmp_path, small)
  load_small(tmp_path)
  (kept,) = cache_dir().iterdir()
  with np.load(kept) as whole:
    content = {**content, "fingerprint": content.get("x", whole["fingerprint"])}
  np.savez(kept, **content)
  size = kept.stat().st_size
  assert len(load_small(tmp_path).train_labels) == 80
  assert kept.stat().st_size > size


def test_a_cache_that_is_no_archive_is_replaced(small, tmp_path):
  write_parquet(tmp_path, small)
  load_small(tmp_path)
  (kept,) = cache_dir().iterdir()
  size = kept.stat().st_size
  for content in (pickle.dumps([1]), written_array(), b"PK\x05\x06" + bytes(18)):
    kept.write_bytes(content)
    assert len(load_small(tmp_path).train_labels) == 80
    assert kept.stat().st_size == size


def written_array():
  file = io.BytesIO()
  np.save(file, np.zeros(3))
  return file.getvalue()


def test_a_folder_in_the_caches_place_is_told_once_a_reading(small, tmp_path):
  write_parquet(tmp_path, small)
  load_small(tmp_path)
  (kept,) = cache_dir().iterdir()
  kept.unlink()
  kept.mkdir()
  with pytest.warns(UserWarning, match="could not keep the decoded images"):
    assert len(load_small(tmp_path).train_labels) == 80
