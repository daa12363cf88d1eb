"""Seeds on the command line: no two of them draw the same numbers."""

import sys

import jax
import numpy as np
import pytest

from benchmarks import (
  cifar10,
  commands,
  experiments,
  imagenet_experiments,
  text_experiments,
)
from benchmarks.arena.__main__ import Run as Arena
from benchmarks.planning import NUM_SEEDS, OptionError
from benchmarks.rl import experiments as rl_experiments
from benchmarks.studies.width import Width

EXPERIMENTS = {
  "images": experiments.Experiment,
  "imagenet": imagenet_experiments.Experiment,
  "text": text_experiments.Experiment,
  "rl": rl_experiments.Experiment,
}


def test_a_key_has_32_bits_of_its_seed():
  # Why larger ones are refused: they would repeat a smaller one's run.
  largest, too_large = (
    jax.random.key_data(jax.random.key(np.int64(seed)))
    for seed in (NUM_SEEDS - 1, NUM_SEEDS)
  )
  assert largest.tolist() == [0, NUM_SEEDS - 1]
  assert too_large.tolist() == jax.random.key_data(jax.random.key(0)).tolist()


@pytest.mark.parametrize("seed", [-1, 2**32, 2**32 + 2, 2**64])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_seed_that_is_another_ones_twin_is_refused(name, seed):
  with pytest.raises(OptionError, match=f"--seed must be from 0 to {2**32 - 1}, got"):
    EXPERIMENTS[name](seed=seed).check()


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_all_other_seeds_are_taken(name, seed):
  EXPERIMENTS[name](seed=seed).check()


@pytest.mark.parametrize("command", [Arena, Width])
def test_no_command_runs_more_seeds_than_there_are(command, tmp_path):
  with pytest.raises(OptionError, match=f"--seeds must be .* at most {2**32}, got"):
    command(seeds=2**32 + 1, out=tmp_path)()


def test_the_command_line_exits_with_2(monkeypatch, tmp_path, capsys):
  monkeypatch.setenv("ALRAO_CACHE_DIR", str(tmp_path))
  arguments = ["run", "--dataset", "digits", "--seed", str(2**32)]
  monkeypatch.setattr(sys, "argv", ["benchmarks.cifar10", *arguments])
  before = jax.config.jax_compilation_cache_dir
  with pytest.raises(SystemExit) as stopped:
    commands.main(cifar10.Run | cifar10.Sweep | commands.Report, cifar10.__doc__)
  jax.config.update("jax_compilation_cache_dir", before)
  assert stopped.value.code == 2
  assert capsys.readouterr().err.splitlines() == [
    f"error: --seed must be from 0 to {2**32 - 1}, got {2**32}."
  ]
