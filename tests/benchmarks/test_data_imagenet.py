"""ImageNet-like files: finding and reading them, damage, batches, order, crops."""

import concurrent.futures
import functools
import shutil

import numpy as np
import pytest
from imagenet_cases import (
  CLASSES,
  COUNTS,
  DAMAGED,
  make_images,
  write_folders,
  write_parquet,
  write_shard,
)

from benchmarks.data import DataError, image_batches, image_files
from benchmarks.data.image_batches import (
  EvaluationBatches,
  Stream,
  TrainBatches,
  shuffle,
)
from benchmarks.data.image_crops import (
  AREAS,
  RATIOS,
  centre_box,
  decode,
  random_box,
)
from benchmarks.data.image_files import Part, find_images, mixed_order

LAYOUTS = {
  "shards": write_parquet,
  "shards in two folders": functools.partial(write_parquet, name="{}/{:04}.parquet"),
  "shards without names of classes": functools.partial(write_parquet, info=False),
  "folders": write_folders,
  "folders called validation": functools.partial(write_folders, val="validation"),
}

# Finding and reading.


@pytest.mark.parametrize(
  "place", [".", "imagenette128", "hub/datasets--x--Imagenette/snapshots/0123/data"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images(layout, place, tmp_path):
  folder = LAYOUTS[layout](tmp_path / place)
  files = find_images("imagenette", tmp_path)
  assert files.source == str(folder)
  assert files.num_classes == 3
  for source, split in ((files.train, "train"), (files.held_out, "validation")):
    expected = make_images(split)
    found = source.read(np.arange(COUNTS[split]))
    pairs = [(encoded, label) for _, encoded, label in expected]
    if not layout.startswith("shards"):
      pairs.sort(key=lambda pair: pair[1])  # folders come class by class
    assert list(zip(found, source.labels.tolist(), strict=True)) == pairs
    assert source.labels.dtype == np.int32


def test_images_are_read_in_any_order(tmp_path):
  files = find_images("imagenette", write_parquet(tmp_path))
  indices = np.random.default_rng(0).permutation(COUNTS["train"])[:20]
  expected = make_images("train")
  assert files.train.read(indices) == [expected[index][1] for index in indices]


def test_images_are_read_by_several_threads_at_once(tmp_path, monkeypatch):
  monkeypatch.setattr(image_files, "MAX_KEPT", 1)  # so that all is read anew
  files = find_images("imagenette", write_parquet(tmp_path))
  expected = [encoded for _, encoded, _ in make_images("train")]

  def read(seed):
    order = np.random.default_rng(seed).permutation(COUNTS["train"])
    return files.train.read(order) == [expected[index] for index in order]

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert all(pool.map(read, range(100)))


def test_an_image_is_named_by_shard_row_and_path(tmp_path):
  files = find_images("imagenette", write_parquet(tmp_path / "a"))
  # Forty images in two shards of 26 and 14, in row groups of seven.
  assert files.train.name(35).endswith(
    "train-00001-of-00002.parquet: image 9 (035.jpg)"
  )
  files = find_images("imagenette", write_folders(tmp_path / "b"))
  assert files.train.name(0).endswith("train/hen/000.jpg")


def test_other_data_of_other_names_is_left_alone(tmp_path):
  write_parquet(tmp_path / "imagenette")
  with pytest.raises(DataError, match="no imagenet below"):
    find_images("imagenet", tmp_path)
  write_parquet(tmp_path / "imagenet-1k")
  assert find_images("imagenet", tmp_path).source.endswith("imagenet-1k")
  assert find_images("imagenette", tmp_path).source.endswith("imagenette")


def test_a_folder_that_names_another_data_set_is_not_taken(tmp_path):
  write_parquet(tmp_path / "imagenet" / "imagenette" / "data")
  for place in (tmp_path, tmp_path / "imagenet" / "imagenette"):
    with pytest.raises(DataError, match="no imagenet below"):
      find_images("imagenet", place)
  found = find_images("imagenette", tmp_path / "imagenet")
  assert found.source.endswith("imagenette/data")


def test_the_number_of_classes_of_another_data_set_is_refused(tmp_path, monkeypatch):
  write_parquet(tmp_path)
  monkeypatch.setitem(image_files.NUM_CLASSES, "imagenette", 3)
  assert find_images("imagenette", tmp_path).num_classes == 3
  with pytest.raises(DataError, match="3 classes, as imagenette has, .* 1,000. Write"):
    find_images("imagenet", tmp_path)


def truncate(folder):
  shard = folder / "train-00001-of-00002.parquet"
  shard.write_bytes(shard.read_bytes()[:-100])


def damage_in_the_middle(folder):
  shard = folder / "train-00001-of-00002.parquet"
  shard.write_bytes(shard.read_bytes()[:4] + bytes(50) + shard.read_bytes()[54:])


def wrong_labels(folder):
  write_shard(folder / "train-00001-of-00002.parquet", [("x.jpg", b"", 3)])


def no_images(folder):
  for shard in folder.glob("train*"):
    write_shard(shard, [])


def no_folders_of_classes(folder):
  shutil.rmtree(folder)
  write_folders(folder)
  shutil.rmtree(folder / "val")
  (folder / "val").mkdir()
  (folder / "val" / "1.jpg").write_bytes(b"")


def other_classes(folder):
  shutil.rmtree(folder)
  write_folders(folder)
  (folder / "val" / "owl").rename(folder / "val" / "wren")


def empty_class(folder):
  shutil.rmtree(folder)
  write_folders(folder)
  (folder / "train" / "wren").mkdir()


@pytest.mark.parametrize(
  "damage, message",
  [
    (truncate, "00001-of-00002.parquet: truncated, or no Parquet file"),
    (wrong_labels, r"00001-of-00002.parquet: label 3 of image 0 is not in 0..2"),
    (no_images, "no train images in its shards"),
    (
      lambda folder: (folder / "train-00000-of-00002.parquet").unlink(),
      "1 shards where train-00001-of-00002.parquet says 2",
    ),
    (
      lambda folder: (folder / "train-00000-of-00002.parquet").write_bytes(b""),
      "truncated, or no Parquet file",
    ),
    (
      lambda folder: [shard.unlink() for shard in folder.glob("validation*")],
      "training images, but none of validation, val, test beside them",
    ),
    (no_folders_of_classes, "val: no folders of classes in it"),
    (other_classes, r"not the same ones \(owl, wren\)"),
    (empty_class, r"wren: no \.jpg"),
    (shutil.rmtree, r"no imagenette below .* \(no such folder\)"),
  ],
)
def test_what_is_wrong_with_the_data_is_said(damage, message, tmp_path):
  folder = write_parquet(tmp_path / "imagenette")
  damage(folder)
  with pytest.raises(DataError, match=message):
    find_images("imagenette", folder)


def test_a_shard_damaged_in_the_middle_is_named_when_it_is_read(tmp_path):
  folder = write_parquet(tmp_path)
  damage_in_the_middle(folder)
  files = find_images("imagenette", folder)
  with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet: truncated"):
    files.train.read(np.arange(COUNTS["train"]))


# Splitting.


@pytest.mark.parametrize("order", ["mixed", "sorted"])
def test_parts_do_not_overlap_and_have_all_classes(order, tmp_path):
  files = find_images("imagenette", write_parquet(tmp_path, order=order))
  parts = files.split(num_validation=12)
  assert [len(part.indices) for part in parts.values()] == [28, 12, 11]
  used = [parts[name].indices for name in ("train", "validation")]
  assert sorted(np.concatenate(used)) == list(range(40))
  for part in parts.values():
    assert set(part.source.labels[part.indices]) == {0, 1, 2}
  # As in the papers, the last images validate; sorted by class they would be of one.
  assert (used[1].tolist() == list(range(28, 40))) == (order == "mixed")


def test_sizes_that_cannot_be_are_refused(tmp_path):
  files = find_images("imagenette", write_parquet(tmp_path))
  for sizes in ((40, 1), (0,), (1, 1, 12)):
    with pytest.raises(ValueError, match="at least one image for each part"):
      files.split(*sizes)
  assert [len(part.indices) for part in files.split().values()] == [32, 8, 11]


def test_mixed_order_is_always_the_same_permutation():
  labels = np.repeat(np.arange(5), 4)
  np.testing.assert_array_equal(mixed_order(labels), mixed_order(labels))
  assert sorted(mixed_order(labels)) == list(range(20))


# Batches.


@pytest.fixture
def files(tmp_path):
  return find_images("imagenette", write_parquet(tmp_path / "imagenette"))


def train_batches(part, seed=0, batch_size=8, share=(0, 1)):
  return TrainBatches(
    part,
    batch_size=batch_size,
    image_size=16,
    max_epochs=3,
    seed=seed,
    share=share,
  )


def assert_same(first, second):
  assert first.keys() == second.keys()
  for name, array in first.items():
    np.testing.assert_array_equal(array, second[name])


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own(files):
  part = files.split(32)["train"]
  batches = train_batches(part)
  assert len(batches) == 12
  epochs = [
    np.concatenate([batches[4 * epoch + step]["index"] for step in range(4)])
    for epoch in range(3)
  ]
  for order in epochs:
    assert sorted(order) == sorted(part.indices)
  assert len({tuple(order) for order in epochs}) == 3


def test_batches_depend_on_seed_and_number_alone(files):
  part = files.split(32)["train"]
  batches = train_batches(part)
  late, early = batches[9], batches[2]
  again = train_batches(part)
  assert_same(again[2], early)
  assert_same(again[9], late)
  other = train_batches(part, seed=1)[2]
  assert not np.array_equal(other["index"], early["index"])


def test_an_image_is_cropped_anew_in_every_epoch(files):
  part = Part(files.train, np.array([5]))
  batches = train_batches(part, batch_size=1)
  first, second = (batches[number]["images"] for number in (0, 1))
  assert first.shape == (1, 16, 16, 3)
  assert not np.array_equal(first, second)


def test_labels_stay_with_their_images(files):
  batch = train_batches(files.split(32)["train"])[0]
  # The class is the brightest colour, in every crop.
  brightest = batch["images"].mean(axis=(1, 2)).argmax(axis=-1)
  np.testing.assert_array_equal(brightest, batch["labels"])
  np.testing.assert_array_equal(batch["labels"], files.train.labels[batch["index"]])


def test_hosts_load_the_parts_of_one_batch(files):
  part = files.split(32)["train"]
  whole = train_batches(part)[3]
  shares = [train_batches(part, share=(index, 4))[3] for index in range(4)]
  joined = {name: np.concatenate([s[name] for s in shares]) for name in whole}
  assert_same(whole, joined)


def evaluation_batches(part, batch_size=4, share=(0, 1)):
  return EvaluationBatches(part, batch_size=batch_size, image_size=16, share=share)


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_counts_every_image_once(files, hosts):
  part = files.split()["test"]
  seen = []
  for host in range(hosts):
    batches = evaluation_batches(part, share=(host, hosts))
    assert len(batches) == 3
    for number in range(3):
      batch = batches[number]
      assert batch["images"].shape == (4 // hosts, 16, 16, 3)
      seen += batch["index"][batch["valid"]].tolist()
  assert sorted(seen) == list(range(11))


def test_evaluation_shows_the_centre(files):
  part = files.split()["test"]
  image = decode(part.source.read(np.array([4]))[0])
  assert image is not None
  box = centre_box(*image.size)
  batch = evaluation_batches(part)[1]
  np.testing.assert_array_equal(
    batch["images"][0], np.asarray(image.resize((16, 16), 2, box))
  )


@pytest.mark.slow
def test_workers_read_the_same_batches(files):
  batches = train_batches(files.split(32)["train"])
  here, there = Stream(batches, 0), Stream(batches, 2)
  for start, stop in ((0, 5), (5, 7), (2, 4)):  # the last one goes back
    pairs = zip(here.read(start, stop), there.read(start, stop), strict=True)
    for first, second in pairs:
      assert_same(first, second)
  there.close()


def test_a_stream_goes_on_from_any_batch(files):
  batches = train_batches(files.split(32)["train"])
  whole = list(Stream(batches, 0).read(0, len(batches)))
  for start in (0, 5, len(batches) - 1):
    for first, second in zip(
      Stream(batches, 0).read(start, len(batches)), whole[start:], strict=True
    ):
      assert_same(first, second)


# Damaged images.


@pytest.mark.parametrize("write", [write_parquet, write_folders])
def test_a_damaged_image_is_replaced_by_another_of_its_batch(write, tmp_path):
  files = find_images("imagenette", write(tmp_path, damaged=(1, 17)))
  part = files.split(40 - 8, 8)["train"]
  part = Part(part.source, np.arange(40))
  seen = []
  for step in range(5):
    batch = train_batches(part)[step]
    is_corrupt = batch["is_corrupt"]
    seen += [files.train.name(index) for index in batch["index"][is_corrupt]]
    assert batch["images"].any(axis=(1, 2, 3)).all()
    brightest = batch["images"].mean(axis=(1, 2)).argmax(axis=-1)
    np.testing.assert_array_equal(brightest, batch["labels"])
  assert len(seen) == 2
  assert {name[-8:-4] for name in seen} <= {"/001", "/017", "001.", "017."}


def test_hosts_replace_damaged_images_alike(tmp_path):
  damaged = (1, 2, 3, 5, 8, 13, 21)
  files = find_images("imagenette", write_parquet(tmp_path, damaged=damaged))
  part = Part(files.train, np.arange(40))
  corrupt = 0
  for number in range(5):
    whole = train_batches(part)[number]
    shares = [train_batches(part, share=(index, 4))[number] for index in range(4)]
    assert_same(whole, {x: np.concatenate([s[x] for s in shares]) for x in whole})
    corrupt += whole["is_corrupt"].sum()
  assert corrupt == len(damaged)


def test_a_batch_of_damaged_images_alone_is_an_error(tmp_path):
  files = find_images("imagenette", write_parquet(tmp_path, damaged=range(40)))
  with pytest.raises(DataError, match="as are all images of its batch"):
    train_batches(files.split(32)["train"])[0]


def test_a_damaged_image_is_not_evaluated(tmp_path):
  files = find_images("imagenette", write_parquet(tmp_path, damaged=(2,)))
  batch = evaluation_batches(files.split()["test"])[0]
  assert batch["is_corrupt"].tolist() == [False, False, True, False]
  assert batch["valid"].tolist() == [True, True, False, True]


@pytest.mark.parametrize("encoded", [None, b"", DAMAGED, b"GIF89a"])
def test_what_is_no_image_decodes_to_none(encoded):
  assert decode(encoded) is None


def test_grey_images_become_rgb(tmp_path):
  import io

  from PIL import Image

  file = io.BytesIO()
  Image.new("L", (4, 3), 7).save(file, "PNG")
  image = decode(file.getvalue())
  assert image is not None
  assert (np.asarray(image) == 7).all() and np.asarray(image).shape == (3, 4, 3)


# Order and crops.


def test_windows_mix_groups_and_lose_nothing(files):
  part = Part(files.train, np.arange(3, 40))
  order = shuffle(part, np.random.default_rng(0), window=14)
  assert sorted(order) == list(range(3, 40))
  groups = np.searchsorted(files.train.bounds, order, side="right") - 1
  # Groups have at most seven images: a window spans at most the ends of two of them
  # beside whole ones, so four.
  assert all(len(set(groups[i : i + 14])) <= 4 for i in (0, 14, 28))
  other = shuffle(part, np.random.default_rng(1), window=14)
  assert not np.array_equal(order, other)


def test_an_epoch_reads_hardly_any_row_group_twice(tmp_path, monkeypatch):
  source = find_images("imagenette", write_parquet(tmp_path)).train
  part = Part(source, np.arange(40))  # in six groups, of seven images at most
  monkeypatch.setattr(image_batches, "WINDOW", 14)  # images of four groups at most
  kept = [source.read(np.array([start])) and None for start in source.bounds[:-1]]
  sizes = [column.nbytes for column in source._kept.values()]
  assert len(sizes) == len(kept) == 6
  monkeypatch.setattr(image_files, "MAX_KEPT", 4 * max(sizes))
  source._open_none()
  reads, read = [], source._read_group

  def count(group):
    reads.append(group)
    return read(group)

  monkeypatch.setattr(source, "_read_group", count)
  batches = train_batches(part, batch_size=4)
  for number in range(10):
    batches[number]
  # Each of the six once, and what three windows share at most once more.
  assert set(reads) == set(range(6))
  assert len(reads) <= 6 + 2


def test_the_groups_of_a_window_of_imagenet_fit_in_memory():
  # 1,281,167 images in 147.9 GB, in groups of about 100: two stick out of a window.
  size = 147.9e9 / 1_281_167
  assert (image_batches.WINDOW + 2 * 100) * size < image_files.MAX_KEPT


@pytest.mark.parametrize("width, height", [(500, 375), (64, 64), (20, 300)])
def test_random_boxes_lie_within_the_image(width, height):
  rng = np.random.default_rng(0)
  boxes = np.array([random_box(rng, width, height) for _ in range(300)])
  left, upper, right, lower = boxes.T
  assert (left >= 0).all() and (upper >= 0).all()
  assert (right <= width).all() and (lower <= height).all()
  wide, high = right - left, lower - upper
  # Sides are rounded to pixels, by half a pixel at most.
  slack = 1 + 0.5 / np.minimum(wide, high)
  assert (wide / high <= RATIOS[1] * slack**2).all()
  assert (wide / high >= RATIOS[0] / slack**2).all()
  if width < 4 * height and height < 4 * width:
    assert (wide * high * slack**2 >= AREAS[0] * width * height).all()
    assert len(np.unique(boxes, axis=0)) > 250


# Real data.


@pytest.mark.data
def test_imagenette_is_found_whole(imagenette_dir):
  files = find_images("imagenette", imagenette_dir)
  assert files.num_classes == 10
  assert (len(files.train.labels), len(files.held_out.labels)) == (9469, 3925)
  parts = files.split()
  # Its shards are mixed, so that the papers' split is in their order.
  assert parts["validation"].indices.tolist() == list(range(9469 - 1893, 9469))
  batch = evaluation_batches(parts["test"], batch_size=16)[0]
  assert batch["valid"].all()
  assert len(CLASSES) < len(set(batch["labels"]))
