"""The programs under examples/ run, for a few steps."""

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
