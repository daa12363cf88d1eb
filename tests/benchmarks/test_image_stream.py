"""Training on streamed images: networks, evaluation, damage, resume, the command."""

import dataclasses
import functools
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import image_stream_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from imagenet_cases import write_parquet
from training_cases import ScriptedWorkload, make_plan, quiet, without_times

from benchmarks import __main__ as command
from benchmarks import records, training
from benchmarks.console import OptionError
from benchmarks.data import DataError
from benchmarks.data.image_files import ImageFiles
from benchmarks.methods import METHODS
from benchmarks.models import IMAGENET_BODIES, build_model, fast_init
from benchmarks.models.alexnet import adaptive_average_pool
from benchmarks.suites import _suite, imagenet
from benchmarks.suites.imagenet import ImageNet, Machine, StreamOptions, StreamPlace
from benchmarks.workloads import devices, image_stream
from benchmarks.workloads.image_stream import MEAN, STD

ROOT = Path(__file__).resolve().parents[2]
KEY = jax.random.key(0)


@functools.cache
def shapes(name, num_classes=1000, num_heads=None, width=1.0):
  """Shapes of a network's variables; tracing a deep one takes a second."""
  model = build_model(name, num_classes, num_heads, width)
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  return jax.eval_shape(functools.partial(model.init, train=False), KEY, images)


def count(variables):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


# Networks.


@pytest.mark.parametrize(
  "name, plain, with_heads",
  [
    ("alexnet", 61_100_840, 97_973_840),
    pytest.param("densenet121", 7_978_856, 17_203_856, marks=pytest.mark.slow),
    ("resnet50", 25_557_032, 43_998_032),
  ],
)
def test_parameter_counts_are_those_of_the_well_known_networks(name, plain, with_heads):
  assert count(shapes(name)) == plain
  heads = shapes(name, num_heads=10)
  assert count(heads) == with_heads
  assert heads["params"]["body"] == shapes(name)["params"]["body"]


@pytest.mark.parametrize(
  "name, size, shape",
  [
    ("alexnet", 63, (1, 1, 1024)),
    ("alexnet", 224, (1, 1, 1024)),
    pytest.param("densenet121", 64, (2, 2, 256), marks=pytest.mark.slow),
    ("resnet50", 128, (4, 4, 512)),
  ],
)
def test_bodies_take_images_of_any_size(name, size, shape):
  body, norm = IMAGENET_BODIES[name]
  images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)

  def apply(images):
    return body(1 / 4, norm=norm).init_with_output(KEY, images, train=False)[0]

  assert jax.eval_shape(apply, images).shape == (2, *shape)


def test_networks_refuse_images_that_are_too_small():
  with pytest.raises(ValueError, match="62x62 pixels are too small for AlexNet"):
    jax.eval_shape(
      functools.partial(build_model("alexnet", width=1 / 64).init, train=False),
      KEY,
      jax.ShapeDtypeStruct((1, 62, 62, 3), jnp.float32),
    )


@pytest.mark.parametrize(
  "name", ["alexnet", pytest.param("densenet121", marks=pytest.mark.slow), "resnet50"]
)
def test_widths_need_not_be_round(name):
  model = build_model(name, 10, 2, width=0.013)
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  variables = fast_init(model, KEY, images)
  expected = jax.eval_shape(functools.partial(model.init, train=False), KEY, images)
  assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, expected)


@pytest.mark.parametrize("size", [1, 3, 6, 7, 13])
def test_adaptive_pooling_is_the_mean_over_each_part(size):
  images = np.random.default_rng(0).normal(size=(2, size, size, 3))
  with jax.enable_x64(True):
    pooled = adaptive_average_pool(jnp.asarray(images), 6)
  for row in range(6):
    for column in range(6):
      edges = [
        slice(math.floor(i * size / 6), math.ceil((i + 1) * size / 6))
        for i in (row, column)
      ]
      part = images[:, edges[0], edges[1]].mean(axis=(1, 2))
      # Sums of at most nine terms of order one.
      np.testing.assert_allclose(pooled[:, row, column], part, atol=1e-14)


def test_alexnet_drops_out_in_training_alone():
  model = build_model("alexnet", width=1 / 64)
  images = jax.random.normal(KEY, (2, 63, 63, 3))
  variables = fast_init(model, KEY, images)

  @jax.jit
  def logits(key):
    return model.apply(variables, images, train=True, rngs={"dropout": key})

  first, second = jax.random.split(KEY)
  np.testing.assert_array_equal(logits(first), logits(first))
  assert not np.array_equal(logits(first), logits(second))
  # Without a key, it could not.
  evaluated = functools.partial(model.apply, train=False)
  assert jax.eval_shape(evaluated, variables, images).shape == (2, 10)


# The workload.


@pytest.fixture(autouse=True)
def _standard_promotion():
  # Other libraries' optimizers are not written for strict promotion.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write_parquet(tmp_path_factory.mktemp("data") / "imagenette")


LOOPS = {}  # by the options that what is compiled depends on


def make_workload(data, **changes):
  """A workload, which shares what is compiled with those before of its kind."""
  workload = image_stream_cases.make_workload(data, **changes)
  kind = tuple(sorted((k, v) for k, v in changes.items() if k != "max_corrupt"))
  if "mesh" not in changes:
    loops = workload.step, workload._forward, workload._evaluate
    loops = LOOPS.setdefault(kind, loops)
    workload.step, workload._forward, workload._evaluate = loops
  return workload


def interrupted_after(workload, steps):
  """Makes a workload read no further than so many steps; returns what it reads."""
  read, seen = workload._on_devices, []

  def stop(batch):
    if "valid" not in batch:
      seen.append(batch["index"].tolist())
      if len(seen) > steps:
        raise KeyboardInterrupt
    return read(batch)

  workload._on_devices = stop
  return seen


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
  """A run that nothing interrupts: its records, and the images of each step."""
  plan = make_plan(tmp_path_factory.mktemp("whole"), max_epochs=2)
  workload = make_workload(data)
  seen = interrupted_after(workload, math.inf)
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    training.train(workload, plan, quiet())
  return without_times(records.read(plan.path)), seen


def test_records_have_what_those_of_other_images_have(whole):
  found, seen = whole
  assert [record["kind"] for record in found] == ["epoch", "epoch", "summary"]
  for record in found[:2]:
    assert math.isfinite(record["train_loss"])
    assert 0 <= record["validation_accuracy"] <= 1
    assert np.shape(record["head_weights"]) == (len(record["steps"]), 4)
    assert record["skipped"] == []
  assert found[2]["test_loss"] is not None
  # Six steps of four images an epoch: all 24, once.
  for epoch in (seen[:6], seen[6:]):
    assert sorted(sum(epoch, [])) == list(range(24))


@pytest.mark.parametrize(
  "steps, lost",
  [
    (3, 1),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((8, 0), (11, 1))),
  ],
)
def test_interrupted_within_an_epoch_a_run_reads_and_records_the_same(
  data, whole, steps, lost, tmp_path
):
  plan = make_plan(tmp_path, max_epochs=2)
  workload = make_workload(data)
  seen = interrupted_after(workload, steps)
  with pytest.raises(KeyboardInterrupt):
    training.train(workload, plan, quiet())
  workload.close()
  resumed = make_workload(data)
  rest = interrupted_after(resumed, math.inf)
  training.train(resumed, plan, quiet())
  # Two steps are a segment: of what the run had read, a begun one is read again.
  assert seen[: steps - lost] + rest == whole[1]
  assert without_times(records.read(plan.path)) == whole[0]
  assert [path.name for path in plan.out.iterdir()] == [plan.path.name]


def test_a_run_killed_while_it_validates_repeats_no_step(data, whole, tmp_path):
  plan = make_plan(tmp_path, max_epochs=2)
  workload = make_workload(data)

  def stop(snapshot, part):
    raise KeyboardInterrupt

  workload.evaluate = stop
  seen = interrupted_after(workload, math.inf)
  with pytest.raises(KeyboardInterrupt):
    training.train(workload, plan, quiet())
  assert workload._stream is None  # nothing is read any more
  resumed = make_workload(data)
  rest = interrupted_after(resumed, math.inf)
  training.train(resumed, plan, quiet())
  assert len(seen) == 6
  assert seen + rest == whole[1]
  assert without_times(records.read(plan.path)) == whole[0]


def test_only_what_is_trained_in_segments_names_what_it_left_out(tmp_path):
  closed = []
  workload = ScriptedWorkload([1.0] * 10)
  workload.close = lambda: closed.append(True)
  plan = make_plan(tmp_path, max_epochs=1)
  training.train(workload, plan, quiet())
  assert closed == [True]
  assert all("skipped" not in record for record in records.read(plan.path))


def test_evaluation_is_the_mean_over_all_images(data, monkeypatch):
  monkeypatch.setattr(image_stream, "EVALUATION_BATCH", 4)
  workload = make_workload(data, optimizer="sgd")
  snapshot = workload.snapshot(workload.init(0, 0.1), 0, 0)
  measured = workload.evaluate(snapshot, "test")  # 11 images, in batches of four
  part = workload._parts["test"]
  batch = image_stream.EvaluationBatches(part, batch_size=11, image_size=32)[0]
  images = (batch["images"] / 255 - np.array(MEAN)) / np.array(STD)
  logits = workload._model.apply(
    {"params": snapshot.params, "batch_stats": snapshot.batch_stats},
    jnp.asarray(images, jnp.float32),
    train=False,
  )
  log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
  labels = batch["labels"]
  # The same float32 network in batches of other sizes: rounding of a few layers.
  loss = -log_probs[np.arange(11), labels].mean()
  assert measured["loss"] == pytest.approx(loss, rel=1e-5)
  assert measured["accuracy"] == np.mean(log_probs.argmax(axis=1) == labels)


def test_damaged_images_are_named_in_the_records(tmp_path):
  folder = write_parquet(tmp_path / "imagenette", damaged=(3,))  # in either split
  workload = make_workload(folder, max_corrupt=2, max_epochs=1)
  summary = training.train(workload, make_plan(tmp_path, max_epochs=1), quiet())
  names = [name.rpartition("imagenette/")[2] for name in summary["skipped"]]
  assert names == [
    "train-00000-of-00002.parquet: image 3 (003.jpg)",
    "validation-00000-of-00002.parquet: image 3 (003.jpg)",
  ]
  assert math.isfinite(summary["test_loss"])


def test_too_many_damaged_images_end_a_run(tmp_path):
  folder = write_parquet(tmp_path / "imagenette", damaged=(3, 5))
  workload = make_workload(folder, max_corrupt=1)
  message = r"parquet: image \d \(00\d.jpg\): damaged, .* as are 1 images before it.*"
  with pytest.raises(DataError, match=message + "--max-corrupt, now 1"):
    training.train(workload, make_plan(tmp_path), quiet())


def test_damaged_images_of_before_a_resume_count_too(tmp_path):
  folder = write_parquet(tmp_path / "imagenette", damaged=(3, 5))
  workload = make_workload(folder, max_corrupt=1)
  workload.begin_skipped(["another"])
  with pytest.raises(DataError, match="as are 1 images before it"):
    list(workload.segment(0, 1, 0)), list(workload.segment(0, 1, 2))
    list(workload.segment(0, 1, 4))


@pytest.mark.slow
def test_averaged_weights_are_evaluated_with_their_own_statistics(data):
  workload = make_workload(data, optimizer="dog")
  state = workload.init(0, None)
  state, _ = workload.step(state, workload.data, workload.segment(0, 1, 0))
  params = METHODS["dog"].averaged_params(state.opt_state, state.params)
  zeros = jax.tree.map(jnp.zeros_like, state.batch_stats)
  each = []
  for batch in make_workload(data, optimizer="dog").batches(0, 1):
    images = workload._normalize(batch["images"])
    variables = {"params": params, "batch_stats": zeros}
    _, updated = workload._model.apply(
      variables, images, train=True, mutable=["batch_stats"]
    )
    each.append(updated["batch_stats"])
  # From zeros, a step leaves a tenth of its batch's statistics.
  batch_stats = jax.tree.map(lambda *xs: sum(xs) / len(xs) / 0.1, *each)
  found = workload.snapshot(state, 0, 1).batch_stats
  for a, b in zip(*map(jax.tree.leaves, (batch_stats, found)), strict=True):
    # Compiled or not: roundings of float32 in sums over a batch's pixels.
    np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
  first = jax.tree.leaves(found)[0]
  assert not np.allclose(first, jax.tree.leaves(state.batch_stats)[0], rtol=1e-3)


@pytest.mark.slow
def test_what_one_device_began_a_mesh_ends_with_about_the_same_losses(
  data, whole, tmp_path
):
  if jax.device_count() < 4:
    pytest.skip("needs four simulated devices")
  plan = make_plan(tmp_path, max_epochs=2)
  mesh = devices.make_mesh(2, 2)
  first = make_workload(data)
  seen = interrupted_after(first, 3)
  with pytest.raises(KeyboardInterrupt):
    training.train(first, plan, quiet())
  assert len(seen) == 4
  # What one device has begun, four end.
  summary = training.train(make_workload(data, mesh=mesh), plan, quiet())
  for name in ("validation_loss", "test_loss"):
    # Ten steps that differ by rounding.
    assert summary[name] == pytest.approx(whole[0][-1][name], rel=1e-3)


@pytest.mark.slow
def test_resume_after_sigkill_within_an_epoch_is_bit_exact(data, tmp_path):
  def run(out, result, kill_at):
    script = Path(__file__).with_name("image_stream_cases.py")
    environment = {
      **os.environ,
      "PYTHONPATH": str(ROOT),
      "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
    }
    command = [sys.executable, str(script), *map(str, (data, out, result, kill_at))]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode

  one, other = tmp_path / "one.npz", tmp_path / "other.npz"
  assert run(tmp_path / "a", one, 0) == 0
  # Epochs have six steps, segments two: killed in the second epoch's second segment.
  assert run(tmp_path / "b", other, 9) == -signal.SIGKILL
  assert run(tmp_path / "b", other, 0) == 0
  with np.load(one) as a, np.load(other) as b:
    assert sorted(a) == sorted(b)
    assert str(a["records"]) == str(b["records"])
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


# The command.


def test_every_preset_is_made_of_valid_experiments():
  for preset in imagenet.PRESETS.values():
    for base in preset.bases:
      base.check()
    assert set(preset.optimizers) <= set(METHODS)
  widths = {(b.network, b.width) for b in imagenet.PRESETS["paper"].bases}
  assert ("resnet50", 3.0) in widths


TINY = StreamOptions(
  dataset="imagenette",
  network="alexnet",
  width=1 / 32,
  image_size=63,
  batch_size=8,
  max_epochs=1,
  num_train=16,
)


@pytest.mark.slow
@pytest.mark.parametrize("network", IMAGENET_BODIES)
def test_every_network_trains(network, data, tmp_path):
  suite = ImageNet(StreamPlace(data))
  options = dataclasses.replace(TINY, network=network)
  plan = suite.plan(options, tmp_path)
  summary = training.train(suite.workload(options), plan, quiet())
  assert summary["epochs"] == 1
  assert summary["config"]["num_classes"] == 3
  assert summary["config"]["norm"] == ("none" if network == "alexnet" else "batch")
  assert not summary["config"]["real_data"]


def test_one_program_serves_all_rates_and_seeds(data):
  suite = ImageNet(StreamPlace(data))
  sgd = dataclasses.replace(TINY, optimizer="sgd", rate=0.1)
  workload = suite.workload(sgd)
  assert suite.workload(dataclasses.replace(sgd, rate=1.0, seed=3)) is workload
  assert suite.workload(TINY) is not workload


def test_options_out_of_range_are_refused(data, tmp_path):
  for machine, text in (
    (Machine(workers=-1), "--workers must not be negative, got -1."),
    (Machine(checkpoint_steps=0), "--checkpoint-steps must be at least 1, got 0."),
  ):
    with pytest.raises(OptionError, match=text):
      ImageNet(StreamPlace(data, machine))
  for changes, text in (
    ({"batch_size": 99}, "--batch-size must be at most 16, got 99."),
    ({"num_train": 99}, "--num-train, --num-validation, --num-test: at least one"),
    ({"batch_size": 7}, "--batch-size must be a multiple of --mesh-data, 2, got 7."),
    ({"norm_parts": 2}, "--norm-parts must be 1 without batch normalisation"),
    (
      {"norm_parts": 3, "norm": "batch"},
      "--batch-size must be a multiple of --norm-parts, 3, got 8.",
    ),
  ):
    with pytest.raises(OptionError, match=text):
      suite = ImageNet(StreamPlace(data, Machine(mesh_data=2)))
      suite.plan(dataclasses.replace(TINY, **changes), tmp_path)


def test_heads_that_a_machine_can_not_split_are_refused_before_a_sweep(data, tmp_path):
  suite = ImageNet(StreamPlace(data, Machine(mesh_heads=4)))
  four = dataclasses.replace(TINY, num_heads=4)
  suite.plan(four, tmp_path)
  with pytest.raises(OptionError, match="must divide the number of heads, 10, got 4."):
    suite.plan(TINY, tmp_path)
  sgd = dataclasses.replace(four, optimizer="sgd", rate=0.1)
  with pytest.raises(OptionError, match="must be 1 for --optimizer sgd, which has no"):
    suite.plan(sgd, tmp_path)
  halves = ImageNet(StreamPlace(data, Machine(mesh_heads=2)))
  with pytest.raises(OptionError, match="must be 1 for --optimizer sgd, which has no"):
    _suite.sweep(imagenet.PRESETS["reduced"], halves, tmp_path / "out", quiet())
  assert not (tmp_path / "out").exists()


def test_only_all_of_imagenet_is_called_real(data, tmp_path, monkeypatch):
  monkeypatch.setattr(imagenet, "NUM_IMAGENET", 40)
  monkeypatch.setattr(ImageFiles, "num_classes", 1000)

  def is_real(**sizes):
    options = dataclasses.replace(TINY, **{"num_train": None, **sizes})
    return ImageNet(StreamPlace(data)).plan(options, tmp_path).config["real_data"]

  assert is_real()
  for sizes in ({"num_train": 16}, {"num_validation": 4, "num_train": 30}):
    assert not is_real(**sizes)
  assert not is_real(num_test=10)


@pytest.mark.slow
def test_two_hosts_train_as_one(data, tmp_path):
  """The whole command; each host has two of a mesh's four devices."""
  with socket.socket() as sock:
    sock.bind(("localhost", 0))
    port = sock.getsockname()[1]
  options = dataclasses.replace(TINY, num_heads=4, norm="batch", num_train=24)
  command = [sys.executable, "-m", "benchmarks", "run", "imagenet"]
  for name in ("dataset", "network", "width", "norm", "image_size", "batch_size"):
    command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
  command += "--max-epochs 1 --num-train 24 --num-heads 4 --checkpoint-steps 2".split()
  command += "--mesh-data 2 --mesh-heads 2 --num-hosts 2".split()
  command += ["--data-dir", str(data), "--out", str(tmp_path / "out")]
  command += ["--coordinator", f"localhost:{port}", "--host"]
  environment = {
    **os.environ,
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "JAX_PLATFORMS": "cpu",
    "ALRAO_CACHE_DIR": str(tmp_path / "cache"),
  }
  hosts = [
    subprocess.Popen([*command, str(host)], cwd=ROOT, env=environment)
    for host in range(2)
  ]
  try:
    assert [host.wait(timeout=500) for host in hosts] == [0, 0]
  finally:
    for host in hosts:
      host.kill()
  suite = ImageNet(StreamPlace(data))
  plan = suite.plan(options, tmp_path / "one")
  one = training.train(suite.workload(options), plan, quiet())
  (found,) = (tmp_path / "out").iterdir()
  assert found.name == plan.path.name
  two = records.read_summary(found)
  assert two is not None
  for name in ("train_loss", "validation_loss", "test_loss"):
    # Three steps that differ by rounding.
    assert two[name] == pytest.approx(one[name], rel=1e-3)


@pytest.mark.parametrize(
  "arguments, text",
  [
    (["run", "--width", "0"], "--width must be positive, got 0.0."),
    (["run", "--image-size", "32"], "--image-size must be at least 63, got 32."),
    (["run", "--optimizer", "sgd"], "--rate must be positive for --optimizer sgd"),
    (["run", "--data-dir", "/nowhere"], "no imagenet below /nowhere (no such folder)"),
    (["run", "--num-hosts", "2"], "--coordinator must be given with --num-hosts 2"),
    (["run", "--host", "1"], "--coordinator must be given with --host 1, got none."),
    (["run", "--coordinator", "localhost"], "--coordinator must be an address and a p"),
    (["sweep", "--networks", "vgg19"], "vgg19"),
  ],
)
def test_bad_options_and_data_exit_with_2(
  arguments, text, monkeypatch, tmp_path, capsys
):
  monkeypatch.setenv("ALRAO_CACHE_DIR", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  before = jax.config.jax_compilation_cache_dir
  with pytest.raises(SystemExit) as stopped:
    command.main([arguments[0], "imagenet", *arguments[1:]])
  jax.config.update("jax_compilation_cache_dir", before)
  assert stopped.value.code == 2
  assert text in capsys.readouterr().err
