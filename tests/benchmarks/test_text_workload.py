"""Training on text: carry, dropout, chunks, clipping, evaluation, resuming."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import make_plan, quiet, without_times

from alrao_jax import alrao
from benchmarks import __main__ as command
from benchmarks import records, training
from benchmarks.console import OptionError
from benchmarks.data.text_files import Text
from benchmarks.methods import METHODS, Method
from benchmarks.models.decoder import Decoder
from benchmarks.models.language import LanguageModel
from benchmarks.models.lstm import LSTM
from benchmarks.suites import ptb
from benchmarks.suites.ptb import PennTreebank, TextOptions, TextPlace
from benchmarks.workloads.text import TextWorkload

SIZE, BATCH, LENGTH = 5, 3, 4


@pytest.fixture(autouse=True)
def _standard_promotion():
  # Other libraries' optimizers are not written for strict promotion.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def make_text(num_train=60, num_validation=40):
  """Symbols by chance; 60 of them are 4 segments of 3 streams."""
  rng = np.random.default_rng(0)
  parts = [
    rng.integers(SIZE, size=n).astype(np.int32)
    for n in (num_train, num_validation, num_validation)
  ]
  return Text("test", "characters", tuple("abcde"), *parts, source="test")


def make_workload(name="alrao", network="lstm", dropout=0.0, text=None, **options):
  optimizer = options.pop("optimizer", METHODS[name])
  lstm = LSTM(SIZE, features=3, units=4, num_layers=1)
  body = lstm if network == "lstm" else Decoder(SIZE, LENGTH, width=8, num_layers=1)
  output_layer = options.pop("output_layer", "softmax")
  model = LanguageModel(
    body, SIZE, output_layer, 2 if optimizer.has_heads else None, dropout
  )
  defaults = {
    "batch_size": BATCH,
    "length": LENGTH,
    "epoch_steps": 4,
    "max_epochs": 3,
    "num_validation": 40,
    "num_test": 40,
  }
  text = make_text() if text is None else text
  return TextWorkload(model, optimizer, text, **{**defaults, **options})


def train(workload, rate=None, epochs=1, state=None):
  state = workload.init(0, rate) if state is None else state
  for epoch in range(1, epochs + 1):
    batches = workload.batches(0, epoch)
    state, outputs = workload.step(state, workload.data, batches)
  return jax.tree.map(np.array, state), outputs


def assert_trees_close(a, b, **tolerances):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, **tolerances)


def test_short_epochs_go_on_where_the_one_before_ended():
  whole = make_workload("sgd")
  short = make_workload("sgd", epoch_steps=3)
  segments = [short.batches(0, epoch)["segment"].tolist() for epoch in (1, 2, 3)]
  assert segments == [[0, 1, 2], [3, 0, 1], [2, 3, 0]]
  # 12 steps both, carry included.
  ends = [train(whole, 0.5, epochs=3)[0], train(short, 0.5, epochs=4)[0]]
  assert_trees_close(*ends, rtol=0, atol=0)


def test_carry_goes_on_within_a_pass_and_starts_anew_with_the_next():
  workload = make_workload("sgd")
  start = workload.init(0, 1e-6)
  poisoned = jax.tree.map(np.array, start)
  poisoned = poisoned._replace(carry=jax.tree.map(np.ones_like, poisoned.carry))
  batches = workload.batches(0, 1)
  for first, same in ((0, True), (2, False)):
    some = jax.tree.map(lambda x, i=first: x[i : i + 1], batches)
    losses = [
      float(
        workload.step(jax.tree.map(jnp.array, s), workload.data, some)[1]["loss"][0]
      )
      for s in (start, poisoned)
    ]
    assert (losses[0] == losses[1]) == same


def test_carry_that_is_not_finite_is_dropped():
  workload = make_workload("sgd")
  state = jax.tree.map(np.array, workload.init(0, 0.1))
  state = state._replace(carry=jax.tree.map(lambda x: x * np.nan, state.carry))
  last = jax.tree.map(lambda x: x[-1:], workload.batches(0, 1))
  state, outputs = workload.step(jax.device_put(state), workload.data, last)
  assert np.isfinite(outputs["loss"]).all()
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_network_without_carry_reads_segments_in_random_order():
  workload = make_workload("sgd", "decoder", epoch_steps=2)
  batches = [workload.batches(0, epoch) for epoch in (1, 2, 3, 4)]
  passes = np.concatenate([batch["segment"] for batch in batches]).reshape(2, 4)
  assert np.sort(passes, axis=1).tolist() == [[0, 1, 2, 3]] * 2
  others = make_workload("sgd", "decoder").batches(1, 1)["segment"]
  assert len({tuple(order) for order in (*passes.tolist(), others.tolist())}) > 1


def test_dropout_is_of_training_alone():
  plain, dropping = (make_workload("sgd", dropout=dropout) for dropout in (0.0, 0.5))
  state = plain.init(0, 0.5)
  evaluated = [p.evaluate(p.snapshot(state, 0, 0), "test") for p in (plain, dropping)]
  assert evaluated[0] == evaluated[1]
  losses = [train(p, 0.5)[1]["loss"] for p in (plain, dropping)]
  assert not np.allclose(*losses)


@pytest.mark.parametrize(
  "network", ["lstm", pytest.param("decoder", marks=pytest.mark.slow)]
)
def test_evaluation_is_that_of_whole_streams(network):
  """13 targets a stream with the carry over all of it; decoders take 4 at a time."""
  workload = make_workload("alrao", network)
  state, _ = train(workload)
  snapshot = workload.snapshot(state, 0, 1)
  text, model = make_text(), workload._model

  @jax.jit
  def predict(inputs):
    carry = model.body.initial_carry(1)
    heads = model.apply({"params": snapshot.params}, inputs, carry)
    weights = jnp.exp(snapshot.log_weights)[:, None, None]
    return (weights * jax.nn.softmax(heads.shared)[:, 0]).sum(axis=0)

  losses, correct = [], 0
  for first in range(0, 39, 13):
    symbols = text.validation[None, first : first + 14]
    step = 13 if network == "lstm" else LENGTH
    for start in range(0, 13, step):
      targets = symbols[0, start + 1 : start + step + 1]
      probs = np.asarray(predict(symbols[:, start : start + len(targets)]))
      losses += [-math.log(p[t]) for p, t in zip(probs, targets, strict=True)]
      correct += int((probs.argmax(axis=-1) == targets).sum())
  found = workload.evaluate(snapshot, "validation")
  assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
  assert found["bits"] == pytest.approx(np.mean(losses) / math.log(2), rel=1e-5)
  assert found["accuracy"] == correct / 39


@pytest.mark.parametrize(
  "output_layer", ["softmax", pytest.param("class_factored", marks=pytest.mark.slow)]
)
def test_chunks_change_nothing(output_layer):
  results = []
  for chunks in (1, 4):
    workload = make_workload("alrao", chunks=chunks, output_layer=output_layer)
    state, outputs = train(workload)
    found = workload.evaluate(workload.snapshot(state, 0, 1), "test")
    results.append((state.params, outputs, found))
  # Four steps of sums in another order, with rates up to 10.
  assert_trees_close(*results, rtol=1e-3, atol=1e-5)


def test_clipping_bounds_body_and_each_head_by_itself():
  equal = Method("", "", "", lambda s: alrao(s.key, None, 1.0, 1.0), has_heads=True)
  # Less than the norms of all the gradients.
  workload = make_workload(optimizer=equal, clip=1e-3, epoch_steps=1)
  start = jax.tree.map(np.array, workload.init(0, None))
  state, _ = train(workload)
  moved = jax.tree.map(lambda a, b: (a - b) ** 2, start.params, state.params)
  body = sum(x.sum() for x in jax.tree.leaves(moved["body"]))
  heads = sum(x.reshape(2, -1).sum(axis=1) for x in jax.tree.leaves(moved["output"]))
  # In float32, steps of parts of 1e-3 from numbers of about 1.
  np.testing.assert_allclose(np.sqrt([body, *heads]), 1e-3, rtol=1e-2)


@pytest.mark.slow
def test_interrupted_run_ends_as_if_it_had_not_been(tmp_path):
  """Bit for bit, from the middle of a pass: the carry is in the checkpoint."""

  def run(out, interrupt_at=None):
    # Five steps an epoch, four a pass.
    workload = make_workload("alrao", dropout=0.2, epoch_steps=5)
    display, seen = quiet(), []
    evaluate, begin = workload.evaluate, workload.batches

    def remember(snapshot, part):
      seen.append(jax.tree.map(np.array, snapshot))
      return evaluate(snapshot, part)

    def interrupt(seed, epoch):
      if epoch == interrupt_at:
        raise KeyboardInterrupt
      return begin(seed, epoch)

    workload.evaluate, workload.batches = remember, interrupt
    plan = make_plan(out, max_epochs=3)
    training.train(workload, plan, display)
    return seen, without_times(records.read(plan.path))

  whole, whole_records = run(tmp_path / "whole")
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / "interrupted", interrupt_at=3)
  resumed, resumed_records = run(tmp_path / "interrupted")
  assert len(resumed) == 2  # the third epoch, and the test
  assert_trees_close(whole[-2:], resumed, rtol=0, atol=0)
  assert whole_records == resumed_records


def test_alrao_learns_what_repeats():
  symbols = np.tile(np.arange(SIZE, dtype=np.int32), 400)
  text = Text("test", "characters", tuple("abcde"), *[symbols] * 3, source="test")
  workload = make_workload("alrao", text=text, epoch_steps=150)
  state, _ = train(workload)
  found = workload.evaluate(workload.snapshot(state, 0, 1), "test")
  assert found["bits"] < math.log2(SIZE) / 2


@pytest.fixture
def files(tmp_path):
  text = "the cat sat on the mat\n" * 40
  path = tmp_path / "my.txt"
  path.write_text(text)
  return (path,)


def test_plan_says_what_the_defaults_mean(tmp_path, files):
  suite = PennTreebank(TextPlace(train=files[0]))
  plan = suite.plan(TextOptions(optimizer="alrao_fast", batch_size=2), tmp_path)
  expected = {
    "suite": "ptb",
    "dataset": "my",
    "num_train": 736,
    "num_validation": 92,
    "num_test": 92,
    "num_heads": 6,
    "length": 70,
    "chunks": 1,
    "epoch_steps": 5,
    "real_data": False,
    "chance": math.log2(11),
  }
  assert {name: plan.config[name] for name in expected} == expected
  words = suite.plan(TextOptions(level="words", batch_size=2, length=7), tmp_path)
  assert (words.config["chunks"], words.config["num_heads"]) == (2, 10)


def test_results_of_another_text_never_take_the_place_of_these(tmp_path, files):
  options = TextOptions(batch_size=2)
  names = {PennTreebank(TextPlace(train=files[0])).plan(options, tmp_path).name}
  files[0].write_text(files[0].read_text().replace("cat", "mat"))
  names.add(PennTreebank(TextPlace(train=files[0])).plan(options, tmp_path).name)
  assert len(names) == 2


def test_every_preset_is_made_of_valid_experiments():
  for preset in ptb.PRESETS.values():
    for base in preset.bases:
      base.check()
    assert set(preset.optimizers) <= set(METHODS)
    assert len({str(base) for base in preset.bases}) == len(preset.bases)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"length": 0}, "--length must be at least 1, got 0"),
    ({"num_test": 1}, "--num-test must be at least 2, got 1"),
    ({"num_test": 93}, "--num-test must be at most 92, got 93"),
    ({"seed": -1}, "--seed must be from 0"),
    ({"dropout": 1.0}, r"--dropout must be in \[0, 1\), got 1.0"),
    ({"clip": 0.0}, "--clip must be positive"),
    ({"optimizer": "sgd"}, "--rate must be positive for --optimizer sgd, got None"),
    ({"rate": 1.0}, "--rate must be left out for --optimizer alrao"),
    ({"optimizer": "adam", "num_heads": 3}, "--num-heads must be left out"),
    ({"chunks": 3}, r"--chunks must divide the 2 \* 70 positions"),
    ({"batch_size": 20}, r"less than the 736 characters of .*my\.txt, got 20 \* 70"),
  ],
)
def test_bad_options_are_named(tmp_path, files, changes, message):
  options = TextOptions(**{"batch_size": 2, **changes})
  with pytest.raises(OptionError, match=message):
    PennTreebank(TextPlace(train=files[0])).plan(options, tmp_path)


@pytest.fixture
def run_main(monkeypatch, tmp_path):
  """Runs the command line in this process; returns its exit code."""
  monkeypatch.setenv("ALRAO_CACHE_DIR", str(tmp_path))
  before = jax.config.jax_compilation_cache_dir

  monkeypatch.chdir(tmp_path)

  def run(name: str, *arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
      command.main([name, "ptb", *arguments])
    return stopped.value.code

  yield run
  jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["run", "--data-dir", "/nowhere"], "no Penn Treebank below /nowhere"),
    (["run", "--train", "/nowhere.txt"], "/nowhere.txt: cannot be read"),
    (["run", "--train", "a", "--test", "b"], "stands alone, or with both"),
    (["run", "--clip", "-1"], "--clip must be positive"),
    (["sweep", "--networks", "nonsense"], "nonsense"),
  ],
)
def test_bad_commands_exit_with_2(run_main, arguments, message, capsys):
  assert run_main(*arguments) == 2
  assert message in capsys.readouterr().err
