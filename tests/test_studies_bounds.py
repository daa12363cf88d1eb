"""The study of upper bounds: its table, its errors, a tiny run."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks.planning import OptionError
from benchmarks.studies.arms import Images
from benchmarks.studies.bounds import Bounds, table

TINY = Images("digits", num_train=64, num_held_out=32, epochs=1)


def test_the_best_bound_of_each_row_stands_out():
  means = np.array([[0.1, 0.3, 0.2], [0.5, 0.4, 0.1]])
  # Two seeds that far from their mean deviate by the root of two times that.
  accuracies = {"SGD": np.stack([means - 0.01, means + 0.01], axis=2)}
  *_, small, large = table(accuracies, (8, 32), (0.1, 1.0, 10.0))
  assert small == "| SGD | 8 | 10.0 ± 1.4 | **30.0 ± 1.4** | 20.0 ± 1.4 |"
  assert large == "| SGD | 32 | **50.0 ± 1.4** | 40.0 ± 1.4 | 10.0 ± 1.4 |"


@pytest.mark.slow
def test_every_base_trains_at_every_bound_and_batch_size(tmp_path):
  study = Bounds(TINY, batch_sizes=(16, 32), uppers=(0.1, 1.0), seeds=2, out=tmp_path)
  with jax.numpy_dtype_promotion("standard"):  # optax.scale_by_adam's arithmetic
    study()
  names = {path.name for path in tmp_path.iterdir()}
  assert {"bounds.md", "bounds.png"} <= names
  paths = sorted(tmp_path.glob("*.jsonl"))
  assert len(paths) == 3 * 2 * 2 * 2
  summary = json.loads(paths[0].read_text().splitlines()[-1])
  assert summary["config"]["study"] == "bounds"
  text = (tmp_path / "bounds.md").read_text()
  assert "1 epoch, batches of 16, 32" in text
  assert "steps: 4 (batches of 16), 2 (batches of 32)" in text


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"uppers": (1e-6,)}, r"--uppers must .* above 1e-05, got \(1e-06,\)"),
    ({"uppers": ()}, r"--uppers must have at least one, .* got \(\)"),
    ({"batch_sizes": ()}, r"--batch-sizes must have at least one, got \(\)"),
    (
      {"images": dataclasses.replace(TINY, batch_size=16)},
      "--batch-size must be left out, for --batch-sizes, got 16",
    ),
  ],
)
def test_bad_options_say_what_to_write(options, message, tmp_path):
  with pytest.raises(OptionError, match=message):
    Bounds(**{"images": TINY, "out": tmp_path, **options}).measure()
