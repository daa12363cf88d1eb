"""The study of upper bounds: its table, its errors, a tiny run."""

import json

import jax
import numpy as np
import pytest

from benchmarks.planning import OptionError
from benchmarks.studies.arms import Images
from benchmarks.studies.bounds import Bounds, table

TINY = Images("digits", num_train=64, num_held_out=32, epochs=1)


def test_the_best_bound_of_each_row_stands_out():
  means = {"SGD": np.array([[0.1, 0.3, 0.2], [0.5, 0.4, 0.1]])}
  *_, small, large = table(means, (8, 32), (0.1, 1.0, 10.0))
  assert small == "| SGD | 8 | 10.0 | **30.0** | 20.0 |"
  assert large == "| SGD | 32 | **50.0** | 40.0 | 10.0 |"


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
  assert "batches of 16, 32" in (tmp_path / "bounds.md").read_text()


def test_bounds_below_the_lower_one_are_an_error(tmp_path):
  with pytest.raises(OptionError, match="--uppers must be given"):
    Bounds(TINY, uppers=(1e-6,), out=tmp_path).measure()
