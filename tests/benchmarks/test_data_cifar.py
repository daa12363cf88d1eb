import functools
import gzip
import hashlib
import http.server
import os
import pickle
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import (
  LAYOUTS,
  encode,
  load_small,
  make_small,
  python3_pickle,
  table,
  write_archive,
  write_binary,
  write_parquet,
  write_pickles,
)

from benchmarks.data import DataError, channel_statistics, cifar_files, download, load
from benchmarks.data import augment as augmentation
from benchmarks.data.augment import crop_and_flip, normalize
from benchmarks.data.cache import cache_dir

augment = jax.jit(augmentation.augment, static_argnames=("padding", "flip"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("ALRAO_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def small():
  return make_small()


def assert_equal(dataset, small):
  images, labels = small
  np.testing.assert_array_equal(dataset.train_images, images[:80])
  np.testing.assert_array_equal(dataset.test_images, images[80:])
  np.testing.assert_array_equal(dataset.train_labels, labels[:80])
  np.testing.assert_array_equal(dataset.test_labels, labels[80:])
  for array in (dataset.train_images, dataset.test_images):
    assert array.dtype == np.uint8 and array.flags.c_contiguous
  for array in (dataset.train_labels, dataset.test_labels):
    assert array.dtype == np.int32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images(layout, small, tmp_path):
  written = LAYOUTS[layout](tmp_path, small)
  data_dir = tmp_path / "data" if "archive" in layout else tmp_path
  dataset = load_small(data_dir)
  assert_equal(dataset, small)
  assert dataset.source == str(written)


def test_class_names_are_in_the_order_of_the_labels():
  # The hub's and the official files' order is alphabetical.
  assert list(cifar_files.CLASS_NAMES) == sorted(cifar_files.CLASS_NAMES)
  assert len(cifar_files.CLASS_NAMES) == 10


# Finding.


@pytest.mark.parametrize(
  "place",
  [
    ".",
    "vision",
    "vision/CIFAR-10",
    "hub/datasets--uoft-cs--cifar10/snapshots/0123/plain_text",
  ],
)
@pytest.mark.parametrize("write", [write_pickles, write_parquet])
def test_finds_data_in_subfolders(place, write, small, tmp_path):
  write(tmp_path / place, small)
  assert_equal(load_small(tmp_path), small)


@pytest.mark.parametrize("write", [write_pickles, write_binary, write_parquet])
def test_takes_the_very_folder(write, small, tmp_path):
  folder = write(tmp_path, small).rename(tmp_path / "renamed")
  assert_equal(load_small(folder), small)


def test_follows_links(small, tmp_path):
  write_binary(tmp_path / "disk", small)
  (tmp_path / "data").mkdir()
  (tmp_path / "data" / "cifar10").symlink_to(tmp_path / "disk")
  (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
  assert_equal(load_small(tmp_path / "data"), small)


def test_takes_no_other_parquet_data_for_cifar10(small, tmp_path):
  for other in ("imagenette128", "cifar100", "cifar-100"):
    write_parquet(tmp_path, small).rename(tmp_path / other)
  with pytest.raises(DataError, match="no CIFAR-10 below"):
    load_small(tmp_path)


def test_data_dir_defaults_to_the_environment(tmp_path, monkeypatch):
  (tmp_path / "cifar-10-batches-py").mkdir()
  monkeypatch.setenv("ALRAO_DATA_DIR", str(tmp_path))
  with pytest.raises(DataError, match=f"{tmp_path}/cifar-10-batches-py"):
    load("cifar10")


def test_says_where_it_looked_and_what_to_put_there(tmp_path):
  with pytest.raises(DataError) as error:
    load("cifar10", tmp_path)
  for text in (
    f"no CIFAR-10 below {tmp_path}.",
    "cifar-10-python.tar.gz",
    "cifar-10-batches-bin",
    "train*.parquet",
    "--download",
    "--dataset digits",
  ):
    assert text in str(error.value)
  with pytest.raises(DataError, match=r"nowhere \(no such folder\)"):
    load("cifar10", tmp_path / "nowhere")


def test_refuses_an_unknown_name():
  with pytest.raises(ValueError, match="one of cifar10, digits, got 'mnist'"):
    load("mnist")


# Broken data.


def damage(path, change):
  path.write_bytes(change(path.read_bytes()))


def halve(content):
  return content[: len(content) // 2]


class Call:
  """Unpickled, runs a command."""

  def __init__(self, command):
    self.command = command

  def __reduce__(self):
    return os.system, (self.command,)


@pytest.mark.parametrize("counts", [(85, 20), (80, 25), (50_000, 10_000)])
@pytest.mark.parametrize("write", [write_pickles, write_binary, write_parquet])
def test_wrong_number_of_images(write, counts, small, tmp_path):
  write(tmp_path, small)
  with pytest.raises(DataError, match="expected"):
    cifar_files.load(tmp_path, counts=counts)


@pytest.mark.parametrize("name", ["cifar-10-batches-py", "cifar-10-batches-bin"])
def test_empty_folder(name, tmp_path):
  (tmp_path / name).mkdir()
  with pytest.raises(DataError, match=f"{name}: no data_batch_1.* in it"):
    load_small(tmp_path)


@pytest.mark.parametrize(
  "write, name", [(write_pickles, "data_batch_3"), (write_binary, "test_batch.bin")]
)
def test_missing_file(write, name, small, tmp_path):
  (write(tmp_path, small) / name).unlink()
  with pytest.raises(DataError, match=f": no {name} in it"):
    load_small(tmp_path)


def test_pickle_that_calls_code(small, tmp_path):
  proof = tmp_path / "called"
  folder = write_pickles(tmp_path, small)
  evil = {"data": Call(f"touch {proof}"), "labels": []}
  (folder / "data_batch_2").write_bytes(pickle.dumps(evil))
  with pytest.raises(DataError, match=r"data_batch_2: .* would call .*\.system"):
    load_small(tmp_path)
  assert not proof.exists()


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "truncated, or no CIFAR-10 pickle"),
    (b"<html>", "truncated, or no CIFAR-10 pickle"),
    (pickle.dumps([1, 2]), "truncated, or no CIFAR-10 pickle"),
    (pickle.dumps({"data": [[1], [2, 3]], "labels": []}), "truncated, or no CIFAR-10"),
    (pickle.dumps({"labels": [1]}), "truncated, or no CIFAR-10 pickle.*'data'"),
    (python3_pickle(np.zeros((16, 3072)), np.zeros(16)), "array of type <f8"),
    (
      python3_pickle(np.zeros((16, 100), np.uint8), np.zeros(16, int)),
      r"data of shape \(16, 100\)",
    ),
    (
      python3_pickle(np.zeros((16, 3072), np.uint8), np.zeros(15, int)),
      r"labels of shape \(15,\)",
    ),
    (
      python3_pickle(np.zeros((16, 3072), np.int64), np.zeros(16, int)),
      "data of int64 and labels of int64",
    ),
    (
      python3_pickle(np.zeros((16, 3072), np.uint8), np.ones(16)),
      "data of uint8 and labels of float64",
    ),
    (
      b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aU\x03zip\x86R.",
      "refused to decode",
    ),
  ],
)
def test_pickle_of_something_else(content, message, small, tmp_path):
  (write_pickles(tmp_path, small) / "data_batch_4").write_bytes(content)
  with pytest.raises(DataError, match=f"data_batch_4: .*{message}"):
    load_small(tmp_path)


def test_truncated_pickle(small, tmp_path):
  damage(write_pickles(tmp_path, small) / "test_batch", halve)
  with pytest.raises(DataError, match="test_batch: truncated"):
    load_small(tmp_path)


def test_binary_file_of_wrong_length(small, tmp_path):
  damage(write_binary(tmp_path, small) / "data_batch_5.bin", lambda data: data[:-1])
  with pytest.raises(DataError, match="data_batch_5.bin: holds 49,167 bytes, expected"):
    load_small(tmp_path)


@pytest.mark.parametrize("write", [write_pickles, write_binary, write_parquet])
def test_label_out_of_range(write, small, tmp_path):
  images, labels = small
  write(tmp_path, (images, np.where(np.arange(100) == 50, 10, labels)))
  # Image 50 of all is image 2 of the fourth batch, 5 of the second shard.
  with pytest.raises(
    DataError,
    match=r"(_4|_4.bin|-00001-of.*): label 10 of image (2|5) is not in 0\.\.9",
  ):
    load_small(tmp_path)


@pytest.mark.parametrize(
  "change, message",
  [
    (halve, "truncated or damaged"),
    (lambda content: content[:-4], "truncated or damaged"),
    (lambda content: b"<html>", "truncated or damaged"),
    (lambda content: gzip.compress(b""), "truncated or damaged|no data_batch_1"),
    (gzip.decompress, "truncated or damaged"),
  ],
)
@pytest.mark.parametrize(
  "write, name",
  [(write_pickles, "cifar-10-python.tar.gz"), (write_binary, "cifar-10-binary.tar.gz")],
)
def test_damaged_archive(write, name, change, message, small, tmp_path):
  damage(write_archive(tmp_path, small, write, name), change)
  with pytest.raises(DataError, match=f"{name}: ({message})"):
    load_small(tmp_path / "data")


@pytest.mark.parametrize(
  "change", [halve, lambda content: b"", lambda content: content[:-1]]
)
def test_damaged_shard(change, small, tmp_path):
  damage(write_parquet(tmp_path, small) / "train-00001-of-00002.parquet", change)
  with pytest.raises(DataError, match="train-00001-of-00002.parquet: truncated, or no"):
    load_small(tmp_path)


def test_missing_shard(small, tmp_path):
  folder = write_parquet(tmp_path, small)
  (folder / "train-00001-of-00002.parquet").unlink()
  with pytest.raises(DataError, match="1 shards where train-00000-of-00002.* says 2"):
    load_small(tmp_path)


def test_unreadable_file(small, tmp_path):
  path = write_binary(tmp_path, small) / "data_batch_1.bin"
  path.unlink()
  path.mkdir()
  with pytest.raises(DataError, match="data_batch_1.bin: cannot be read"):
    load_small(tmp_path)


@pytest.mark.parametrize("split, shards", [("train", 2), ("test", 1)])
def test_missing_split(split, shards, small, tmp_path):
  folder = write_parquet(tmp_path, small)
  for i in range(shards):
    (folder / f"{split}-0000{i}-of-0000{shards}.parquet").unlink()
  with pytest.raises(DataError, match=rf"cifar10: no {split}\*.parquet in it"):
    load_small(tmp_path)


ONE_IMAGE = np.zeros((32, 32, 3), np.uint8)


def images_column(encoded):
  return pa.table({"img": encoded, "label": [0] * len(encoded)})


@pytest.mark.parametrize(
  "content, message",
  [
    (pa.table({"img": [1], "fine_label": [0]}), "columns are .*expected one"),
    (pa.table({"picture": [1], "label": [0]}), "columns are .*expected one"),
    (images_column([encode(ONE_IMAGE, "PNG")]), "'img' is binary, expected struct"),
    (images_column([{"path": "x"}]), "'img' is struct.*expected struct"),
    (table([ONE_IMAGE], [0]).set_column(1, "label", [["cat"]]), "labels are missing"),
    (
      table([ONE_IMAGE] * 20, [0] * 20).set_column(
        1, "label", pa.array([0] * 19 + [None], pa.int64())
      ),
      r"labels are missing \(1 of them\)",
    ),
    (images_column([{"bytes": None}] * 20), "'img' is struct<bytes: null>, expected"),
    (images_column([{"bytes": None}] * 19 + [{"bytes": b""}]), "neither PNG nor WebP"),
    (images_column([{"bytes": encode(ONE_IMAGE, "JPEG")}] * 20), "neither PNG nor"),
    (
      images_column([{"bytes": halve(encode(ONE_IMAGE, "PNG"))}] * 20),
      "image 0: neither PNG nor WebP, or damaged",
    ),
    (table([ONE_IMAGE[1:]] * 20, [0] * 20), "has 32 x 31 pixels, expected 32 x 32"),
  ],
)
def test_shard_of_something_else(content, message, small, tmp_path):
  folder = write_parquet(tmp_path, small)
  pq.write_table(content, folder / "test-00000-of-00001.parquet")
  with pytest.raises(DataError, match=f"test-00000-of-00001.parquet: .*{message}"):
    load_small(tmp_path)


# Decoded images, kept.


def test_decodes_shards_only_once(small, tmp_path, monkeypatch):
  folder = write_parquet(tmp_path, small)
  load_small(tmp_path)
  with pytest.raises(DataError, match="80 train images in its shards, expected 50,000"):
    load("cifar10", tmp_path)
  monkeypatch.setattr(cifar_files, "_decode_shards", None)
  assert_equal(load_small(tmp_path), small)
  os.utime(folder / "test-00000-of-00001.parquet", ns=(0, 0))
  with pytest.raises(TypeError):  # changed, so decoded again
    load_small(tmp_path)


@pytest.mark.parametrize("change", [halve, lambda content: b"", bytes.swapcase])
def test_replaces_a_damaged_cache(change, small, tmp_path):
  write_parquet(tmp_path, small)
  load_small(tmp_path)
  (kept,) = cache_dir().iterdir()
  intact = kept.read_bytes()
  damage(kept, change)
  assert_equal(load_small(tmp_path), small)
  assert list(cache_dir().iterdir()) == [kept]
  assert len(kept.read_bytes()) == len(intact)
  assert_equal(load_small(tmp_path), small)


def test_works_without_a_cache(small, tmp_path, monkeypatch):
  write_parquet(tmp_path, small)
  (tmp_path / "file").touch()
  monkeypatch.setenv("ALRAO_CACHE_DIR", str(tmp_path / "file"))
  with pytest.warns(UserWarning, match="could not keep the decoded images"):
    assert_equal(load_small(tmp_path), small)


# Download.


@pytest.fixture
def server(small, tmp_path, monkeypatch):
  """Serves a small archive in place of the official one."""
  served = write_archive(tmp_path, small, write_pickles, "cifar-10-python.tar.gz")
  handler = functools.partial(QuietHandler, directory=served.parent)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/{served.name}"
    monkeypatch.setattr(download, "URL", url)
    monkeypatch.setattr(download, "MD5", hashlib.md5(served.read_bytes()).hexdigest())
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield
    server.shutdown()
    thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
  def log_message(self, format, *args):
    pass


def test_downloads_where_there_is_nothing(server, small, tmp_path, monkeypatch):
  data_dir = tmp_path / "new" / "folder"
  with pytest.raises(DataError, match="no CIFAR-10 below"):
    load_small(data_dir)
  assert_equal(load_small(data_dir, download=True), small)
  assert [path.name for path in data_dir.iterdir()] == ["cifar-10-python.tar.gz"]
  monkeypatch.setattr(download, "URL", "http://127.0.0.1:9/gone.tar.gz")
  assert_equal(load_small(data_dir, download=True), small)


def test_keeps_no_download_with_another_checksum(server, tmp_path, monkeypatch):
  monkeypatch.setattr(download, "MD5", "0" * 32)
  with pytest.raises(DataError, match="could not be downloaded into .* hash"):
    load_small(tmp_path / "new", download=True)
  assert list((tmp_path / "new").iterdir()) == []


def test_says_what_to_do_without_a_connection(server, tmp_path, monkeypatch):
  url = download.URL.replace("cifar-10-python", "missing")
  monkeypatch.setattr(download, "URL", url)
  with pytest.raises(DataError, match="404.*Put missing.tar.gz there yourself"):
    load_small(tmp_path / "new", download=True)


# What a data set offers.


def test_digits_are_enlarged_and_complete():
  dataset = load("digits", "no/such/folder")
  assert dataset.train_images.shape == (1500, 32, 32, 3)
  assert dataset.test_images.shape == (297, 32, 32, 3)
  assert (dataset.train_images.dtype, dataset.train_labels.dtype) == (
    np.uint8,
    np.int32,
  )
  small = dataset.train_images[:, ::4, ::4, :1]
  large = np.ones((1, 4, 1, 4, 3), np.uint8) * small[:, :, None, :, None, 0, None]
  np.testing.assert_array_equal(dataset.train_images, large.reshape(-1, 32, 32, 3))
  # 17 levels of grey, from black to white.
  np.testing.assert_array_equal(np.unique(small), np.round(np.arange(17) * 255 / 16))
  assert set(dataset.train_labels) == set(range(10)) == set(dataset.test_labels)
  assert not dataset.can_flip


def test_split_is_the_papers_by_default(small, tmp_path):
  write_binary(tmp_path, small)
  dataset = load_small(tmp_path)
  train, validation, test = dataset.split()
  np.testing.assert_array_equal(train.images, dataset.train_images[:64])
  np.testing.assert_array_equal(validation.images, dataset.train_images[64:])
  np.testing.assert_array_equal(validation.labels, dataset.train_labels[64:])
  assert test.images is not None and len(test.labels) == 20


def test_split_takes_fewer_from_the_ends(small, tmp_path):
  write_binary(tmp_path, small)
  dataset = load_small(tmp_path)
  train, validation, test = dataset.split(num_train=10, num_validation=7, num_test=3)
  np.testing.assert_array_equal(train.labels, dataset.train_labels[:10])
  np.testing.assert_array_equal(validation.labels, dataset.train_labels[-7:])
  np.testing.assert_array_equal(test.images, dataset.test_images[:3])


@pytest.mark.parametrize(
  "sizes",
  [
    {"num_train": 0},
    {"num_train": 70},
    {"num_validation": 80},
    {"num_validation": 0},
    {"num_test": 21},
  ],
)
def test_split_refuses_what_is_not_there(sizes, small, tmp_path):
  write_binary(tmp_path, small)
  dataset = load_small(tmp_path)
  with pytest.raises(ValueError, match=r"split\(\) takes .* from 80 training"):
    dataset.split(**sizes)


def test_channel_statistics_are_numpys(small):
  images = np.concatenate([small[0]] * 6)  # more than one chunk
  mean, std = channel_statistics(images)
  floats = images / 255
  np.testing.assert_allclose(mean, floats.mean(axis=(0, 1, 2)), rtol=1e-12)
  np.testing.assert_allclose(std, floats.std(axis=(0, 1, 2)), rtol=1e-12)


# Augmentation.


def test_normalize_is_numpys(small):
  images, _ = small
  mean, std = channel_statistics(images)
  result = jax.jit(normalize)(images, mean.astype(np.float32), std.astype(np.float32))
  assert result.dtype == jnp.float32
  # Values up to 2 after a division, a difference and a division.
  np.testing.assert_allclose(result, (images / 255 - mean) / std, rtol=0, atol=1e-6)
  assert normalize(images[:2], mean, std, jnp.bfloat16).dtype == jnp.bfloat16


def test_crop_and_flip_is_numpys_for_every_shift():
  rows, columns, flips = (x.ravel() for x in np.mgrid[:9, :9, :2])
  images = np.random.default_rng(0).integers(0, 256, (162, 12, 10, 3), dtype=np.uint8)
  padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
  cut = [
    image[row : row + 12, column : column + 10]
    for image, row, column in zip(padded, rows, columns, strict=True)
  ]
  expected = [
    image[:, ::-1] if flip else image for image, flip in zip(cut, flips, strict=True)
  ]
  corners = np.stack([rows, columns], axis=1)
  result = jax.jit(crop_and_flip, static_argnums=3)(images, corners, flips > 0, 4)
  assert result.dtype == jnp.uint8
  np.testing.assert_array_equal(result, np.stack(expected))


@pytest.mark.parametrize("flip", [False, True])
def test_augment_draws_shifts_and_flips_uniformly(flip):
  # An image whose white pixel tells how it was moved: right half of the middle row.
  count, padding = 16_200, 1
  image = np.zeros((7, 7, 1), np.uint8)
  image[3, 5] = 255
  images = jnp.broadcast_to(image, (count, *image.shape))
  result = np.asarray(
    augment(jax.random.key(0), images, padding=padding, flip=flip)[..., 0]
  )
  assert np.all(result.astype(int).sum(axis=(1, 2)) == 255)
  _, rows, columns = np.nonzero(result)
  flipped = columns < 3
  places = (2 if flip else 1) * 9
  codes = 9 * flipped + 3 * (rows - 2) + np.where(flipped, columns - 0, columns - 4)
  counts = np.bincount(codes)
  assert len(counts) == places
  sigma = np.sqrt(count / places * (1 - 1 / places))
  assert np.abs(counts - count / places).max() < 5 * sigma


def test_augment_follows_its_key(small):
  images = jnp.asarray(small[0])
  first, again = (augment(jax.random.key(0), images) for _ in range(2))
  np.testing.assert_array_equal(first, again)
  assert np.any(first != augment(jax.random.key(1), images))


# The real data.


@pytest.mark.data
@pytest.mark.slow
def test_real_cifar10_is_complete(cifar10_dir):
  dataset = load("cifar10", cifar10_dir.parent)
  assert dataset.train_images.shape == (50_000, 32, 32, 3)
  assert dataset.test_images.shape == (10_000, 32, 32, 3)
  np.testing.assert_array_equal(np.bincount(dataset.train_labels), [5_000] * 10)
  np.testing.assert_array_equal(np.bincount(dataset.test_labels), [1_000] * 10)
  mean, std = channel_statistics(dataset.train_images)
  np.testing.assert_allclose(mean, [0.49140, 0.48216, 0.44653], atol=5e-6)
  np.testing.assert_allclose(std, [0.24703, 0.24349, 0.26159], atol=5e-6)
  train, validation, test = dataset.split()
  assert [len(part.labels) for part in (train, validation, test)] == [
    40_000,
    10_000,
    10_000,
  ]
