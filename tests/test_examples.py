"""The programs under examples/ run, for a few steps."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro
from sklearn.datasets import load_digits

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def quickstart(monkeypatch):
  monkeypatch.syspath_prepend(str(EXAMPLES))
  import quickstart

  return quickstart


@pytest.fixture
def few_steps(quickstart, tmp_path):
  return quickstart.Config(epochs=1, seeds=2, batch_size=500, out=tmp_path / "out")


@pytest.mark.slow
def test_quickstart_writes_table_results_and_picture(quickstart, few_steps, capsys):
  # optax.adam raises a float to an integer power, which strict promotion forbids.
  with jax.numpy_dtype_promotion("standard"):
    quickstart.main(few_steps)

  printed = capsys.readouterr().out
  assert "Alrao" in printed and "SGD, best rate" in printed
  assert sorted(path.name for path in few_steps.out.iterdir()) == [
    "quickstart.png",
    "results.json",
  ]
  assert (few_steps.out / "quickstart.png").read_bytes().startswith(b"\x89PNG")

  # Strictly JSON: a run that diverged has null, not NaN.
  results = json.loads(
    (few_steps.out / "results.json").read_text(), parse_constant=pytest.fail
  )
  assert len(results["summary"]) == 9 and len(results["runs"]) == 18
  alrao = results["runs"][0]
  assert len(alrao["head_weights"]) == 2 and len(alrao["head_rates"]) == 10
  assert alrao["head_weights"][0] == pytest.approx([0.1] * 10, abs=1e-5)
  assert len(alrao["unit_rates"]) == 2 * (16 + 32 + 64)
  assert 1e-5 <= min(alrao["unit_rates"]) <= max(alrao["unit_rates"]) <= 10.0


@pytest.mark.slow
def test_quickstart_is_reproducible(quickstart, few_steps):
  data = quickstart.load_data()
  method = quickstart.make_methods()[0]
  first, second = (
    quickstart.train(method, 0, few_steps, data, lambda _: None) for _ in range(2)
  )
  assert first["curve"] == second["curve"]
  assert first["head_weights"] == second["head_weights"]


def test_quickstart_splits_hold_every_image_once(quickstart):
  images, labels = quickstart.load_data()
  assert len(images) == len(labels) == sum(quickstart.SPLITS.values()) == 1797
  digits = load_digits()
  assert images.sum() * 16 == digits.data.sum()
  assert (np.bincount(labels) == np.bincount(digits.target)).all()


def test_quickstart_chooses_sgd_by_validation_loss(quickstart, few_steps):
  import quickstart_report

  def run(rate, validation_loss, test_loss):
    scores = {"validation_loss": validation_loss, "test_loss": test_loss}
    return {"method": "SGD", "rate": rate, "seed": 0, "curve": [scores, scores]}

  runs = [run(0.1, 1.0, 9.0), run(1.0, 2.0, 0.0), run(10.0, float("nan"), 0.0)]
  results = quickstart_report.summarize(runs, few_steps, 0.0)
  assert results["best_sgd_rate"] == 0.1


@pytest.mark.parametrize(
  "option", [{"epochs": 0}, {"seeds": -1}, {"batch_size": 0}, {"batch_size": 2000}]
)
def test_quickstart_refuses_a_bad_option_in_words(quickstart, option, tmp_path):
  name = next(iter(option)).replace("_", "-")
  with pytest.raises(SystemExit, match=f"--{name}.* must be at"):
    quickstart.main(quickstart.Config(**option, out=tmp_path / "out"))
  assert not (tmp_path / "out").exists()


def test_quickstart_describes_every_option(quickstart, capsys):
  with pytest.raises(SystemExit):
    tyro.cli(quickstart.Config, args=["--help"])
  printed = capsys.readouterr().out
  for option in ("--epochs", "--seeds", "--batch-size", "--out"):
    assert option in printed


# --- The regression example


@pytest.fixture
def regression(monkeypatch):
  monkeypatch.syspath_prepend(str(EXAMPLES))
  import regression

  return regression


@pytest.mark.slow
@pytest.mark.parametrize("learn_noise", [True, False])
def test_regression_writes_table_and_picture(regression, learn_noise, tmp_path, capsys):
  config = regression.Config(1, 2, learn_noise, tmp_path / "out")
  # optax.adam raises a float to an integer power, which strict promotion forbids.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    rows = regression.main(config)

  assert len(rows) == 2 * 9
  printed = capsys.readouterr().out
  assert "Alrao" in printed and printed.count("SGD, best rate") == 2
  assert [path.name for path in config.out.iterdir()] == ["regression.png"]
  assert (config.out / "regression.png").read_bytes().startswith(b"\x89PNG")


def test_regression_predicts_the_mixture_of_believed_heads(regression):
  means = np.array([[0.5, -1.0], [1.5, 0.0], [1e20, np.nan]], np.float32)
  log_scales = np.log(np.array([[0.5, 1.0], [1.0, 0.5], [1.0, 1.0]], np.float32))
  outputs = (jax.numpy.array(means), jax.numpy.array(log_scales))
  heads = regression.alrao.HeadOutputs(outputs, outputs)
  # The third head has diverged, and holds less than half an even share.
  log_weights = jax.numpy.log(jax.numpy.array([0.3, 0.6, 0.1]))
  mean, deviation, density = regression.predict(heads, log_weights, 1.0)

  a, mu, sigma = np.array([[1 / 3], [2 / 3]]), means[:2], np.exp(log_scales[:2])
  expected = (a * mu).sum(0)
  spread = np.sqrt((a * (sigma**2 + (mu - expected) ** 2)).sum(0))
  # Differences of squares of order 1 in float32, a few rounding errors of 1e-7.
  np.testing.assert_allclose(mean, expected, atol=1e-6)
  np.testing.assert_allclose(deviation, spread, rtol=1e-5)
  y = regression.TARGETS[None, :, None]
  normal = np.exp(-0.5 * ((y - mu[:, None]) / sigma[:, None]) ** 2)
  normal /= np.sqrt(2 * np.pi) * sigma[:, None]
  np.testing.assert_allclose(density, (a[..., None] * normal).sum(0).T, rtol=1e-4)


def test_regression_chooses_epoch_and_rate_by_validation_loss(regression):
  import regression_report

  problem = regression.make_sine()
  targets = problem.targets["test"]
  sgd = regression.METHODS[-1]

  def row(rate, validation_losses, test_losses):
    prediction = regression.Prediction(0.5 * targets[None], None, None)
    run = regression.Run(
      np.array([validation_losses]), np.array([test_losses]), None, prediction
    )
    return regression_report.make_row(problem, sgd, rate, run)

  rows = [
    row(0.1, [2.0, 1.0, 3.0], [0.0, 7.0, 0.0]),
    row(1.0, [np.nan, 1.5, -np.inf], [0.0, 8.0, 0.0]),
    row(10.0, [np.nan, np.nan, np.nan], [0.0, 0.0, 0.0]),
  ]
  assert [r.validation_loss[0] for r in rows] == [1.0, 1.5, np.inf]
  assert [r.test_loss[0] for r in rows[:2]] == [7.0, 8.0]
  # Halves of the targets: a quarter of the squares is left, less that of the mean.
  left = 0.25 * np.mean(targets**2) / targets.var()
  np.testing.assert_allclose(rows[0].explained, 1 - left, rtol=1e-5)
  assert regression_report.best_rows(rows[::-1], "sine")[0].rate == 0.1


def test_regression_scales_by_the_training_part(regression):
  for problem, sizes in (
    (regression.make_sine(), (200, 100, 100)),
    (regression.load_patients(), (242, 100, 100)),
  ):
    assert tuple(map(len, problem.targets.values())) == sizes
    for values in (problem.inputs["train"], problem.targets["train"]):
      # Rounding of a mean of a few hundred float32 numbers of order 1.
      np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-5)
      np.testing.assert_allclose(values.std(axis=0), 1, atol=1e-5)
    assert abs(problem.targets["test"].mean()) > 1e-4


@pytest.mark.parametrize("option", [{"epochs": 0}, {"seeds": 0}])
def test_regression_refuses_a_bad_option_in_words(regression, option, tmp_path):
  with pytest.raises(SystemExit, match="--epochs and --seeds must be at least 1"):
    regression.main(regression.Config(**option, out=tmp_path / "out"))
  assert not (tmp_path / "out").exists()


# Some steps in the fast tests, the stated accuracy in the slow ones.
SHORT = ["linen_train_state", "nnx_classifier", "equinox_classifier", "mixed_precision"]
# What their docstrings state; three standard deviations of .97 on 500 images are .023.
ACCURACIES = {
  "linen_train_state": 0.95,
  "nnx_classifier": 0.99,
  "equinox_classifier": 0.96,
  "mixed_precision": 0.98,
}


@pytest.fixture
def load_example(monkeypatch):
  monkeypatch.syspath_prepend(str(EXAMPLES))

  def load(name):
    if name == "equinox_classifier":
      pytest.importorskip("equinox", reason="equinox is no dependency")
    return importlib.import_module(name)

  return load


@pytest.mark.parametrize("name", [*SHORT, "checkpointing", "fine_tuning"])
@pytest.mark.parametrize("seed", [2**32, 2**64, -1])
def test_examples_refuse_seeds_that_jax_takes_for_others(
  load_example, name, seed, capsys
):
  config = load_example(name).Config
  with pytest.raises(SystemExit) as stopped:
    tyro.cli(config, args=["--seed", str(seed)])
  assert stopped.value.code == 2
  printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
  assert f"--seed must be from 0 to 2**32 - 1, got {seed}." in printed
  assert tyro.cli(config, args=["--seed", str(2**32 - 1)]).seed == 2**32 - 1


@pytest.mark.parametrize(
  "name",
  [SHORT[0], *(pytest.param(name, marks=pytest.mark.slow) for name in SHORT[1:])],
)
def test_short_examples_learn_within_two_epochs(load_example, name):
  example = load_example(name)
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    assert example.main(example.Config(epochs=2)) > 0.2  # chance is .1


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_short_examples_reach_the_accuracy_they_state(load_example, name):
  example = load_example(name)
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    accuracy = example.main(example.Config())
  stated = f"about {100 * ACCURACIES[name]:.0f} %"
  assert stated in " ".join(example.__doc__.split())
  assert accuracy > ACCURACIES[name] - 0.025


@pytest.mark.slow
def test_checkpointing_goes_on_bit_for_bit(load_example, tmp_path, monkeypatch):
  example = load_example("checkpointing")
  _, whole = example.main(example.Config(epochs=4, out=tmp_path / "whole"))
  config = example.Config(epochs=4, out=tmp_path / "killed")
  batches = example.digits.batches

  def killed_in_the_third_epoch(split, epochs, seed):
    if seed == (config.seed, 3):
      raise KeyboardInterrupt
    return batches(split, epochs, seed=seed)

  with monkeypatch.context() as patch:
    patch.setattr(example.digits, "batches", killed_in_the_third_epoch)
    with pytest.raises(KeyboardInterrupt):
      example.main(config)
  _, resumed = example.main(config)
  assert jax.tree.structure(whole) == jax.tree.structure(resumed)
  for one, two in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
    np.testing.assert_array_equal(one, two)
  assert float(resumed.opt_state.hyperparams["max_learning_rate"]) == 1.0


def test_bounds_change_without_compiling_anew(load_example, tmp_path, monkeypatch):
  example = load_example("checkpointing")
  traces, loss = [], example.alrao.classification_loss

  def counted(*args):
    traces.append(args)
    return loss(*args)

  monkeypatch.setattr(example.alrao, "classification_loss", counted)
  _, state = example.main(example.Config(epochs=2, out=tmp_path))
  assert float(state.opt_state.hyperparams["max_learning_rate"]) == 1.0
  assert len(traces) == 1


def test_mixed_precision_computes_in_half_and_keeps_single(load_example):
  example = load_example("mixed_precision")
  model, images = example.Classifier(), np.zeros((2, 8, 8, 1), np.float32)
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    program = str(jax.make_jaxpr(lambda p: model.apply({"params": p}, images))(params))
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
  convolutions = [line for line in program.splitlines() if "conv_general" in line]
  assert convolutions and all("bf16[" in line for line in convolutions)
  assert "checkpoint" in program or "remat" in program


@pytest.mark.slow
def test_fine_tuning_on_a_narrow_interval_forgets_less(load_example):
  example = load_example("fine_tuning")
  with jax.numpy_dtype_promotion("standard"):  # optax.adam's own arithmetic
    rows = example.main(example.Config(epochs=10))
  moved = [row["moved"] for row in rows]
  assert moved == sorted(moved, reverse=True)
  assert rows[1]["old_accuracy"] > rows[0]["old_accuracy"]
  assert max(row["accuracy"] for row in rows) > 0.6  # chance is .2
