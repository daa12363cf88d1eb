"""The arena: its networks, its short trainings, its records and standings."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alrao_jax
from benchmarks import records
from benchmarks.arena import runs, sources
from benchmarks.arena.__main__ import Run
from benchmarks.arena.methods import METHODS, Method
from benchmarks.arena.models import Perceptron, Predictor, ResNet
from benchmarks.arena.problem import Data, Part, Task
from benchmarks.arena.program import NUM_POINTS, Program, Start
from benchmarks.arena.standings import geometric_mean, relative, result
from benchmarks.arena.table import tables
from benchmarks.arena.tasks import LENGTH, TASKS, VOCABULARY
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.planning import OptionError
from benchmarks.studies.optimizers import ADAM


@pytest.fixture(autouse=True)
def _standard_promotion():
  # Other libraries' optimizers are not written for strict promotion.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


INPUTS = {
  "vgg": jnp.zeros((2, 32, 32, 3)),
  "resnet": jnp.zeros((2, 32, 32, 3)),
  "mixer": jnp.zeros((2, 32, 32, 3)),
  "vit": jnp.zeros((2, 32, 32, 3)),
  "gru": jnp.zeros((2, LENGTH), jnp.int32),
  "words": jnp.zeros((2, 4), jnp.int32),
  "diabetes": jnp.zeros((2, 10)),
  "digits": jnp.zeros((2, 64)),
}


@pytest.mark.parametrize("name", TASKS)
def test_the_units_of_every_network_are_known_without_a_guess(name):
  model = TASKS[name].model(7, 3)
  init = functools.partial(model.init, train=False)
  shapes = jax.eval_shape(init, jax.random.key(0), INPUTS[name])
  specs = alrao_jax.unit_specs(shapes["params"], alrao_jax.UnitOptions(strict=True))
  assert len(specs) == len(jax.tree.leaves(shapes["params"]))
  apply = functools.partial(model.apply, train=False)
  heads = jax.eval_shape(apply, shapes, INPUTS[name])
  batch = INPUTS[name].shape[:2] if name == "gru" else (2,)
  assert heads.shared.shape == (3, *batch, 7)


def make_task(load, model, **options):
  return Task("toy", "toy", lambda data_dir: load(), model, **options)


def perceptron(num_outputs, num_heads):
  return Predictor(Perceptron((8,)), num_outputs, num_heads)


DIGITS = make_task(
  lambda: sources.digits(None), perceptron, num_steps=16, batch_size=16
)
DIABETES = make_task(
  lambda: sources.diabetes(None), perceptron, num_steps=16, batch_size=16
)


def test_runs_side_by_side_are_those_one_by_one():
  data = DIGITS.load(None)
  starts = [Start(0, 1e-2), Start(1, 1e-2), Start(0, 1e-1)]
  together = Program(DIGITS, data, ADAM).run(starts)
  alone = Program(DIGITS, data, ADAM, side_by_side=False).run(starts)
  for one, other in zip(together, alone, strict=True):
    # Sums in another order, carried through 16 steps of at most .1.
    np.testing.assert_allclose(one["test_loss"], other["test_loss"], rtol=1e-3)
    assert (one["seed"], one["rate"]) == (other["seed"], other["rate"])
  assert len({run["test_loss"][-1] for run in together}) == 3


def test_a_run_repeats_itself_and_records_its_curve():
  program = Program(
    DIABETES, DIABETES.load(None), METHODS["schedule_free_alrao"].optimizer
  )
  (first,), (second,) = program.run([Start(3)]), program.run([Start(3)])
  del first["seconds"], second["seconds"]
  assert first == second
  assert first["steps"] == list(range(2, 17, 2))
  assert {len(first[f"{x}_loss"]) for x in ("train", "validation", "test")} == {
    NUM_POINTS
  }
  assert first["chance"] == 1.0
  assert math.isclose(sum(first["head_weights"]), 1, rel_tol=1e-5)


def test_a_diverged_run_records_no_number():
  sgd = OPTIMIZERS["sgd"]
  (run,) = Program(DIABETES, DIABETES.load(None), sgd).run([Start(0, 1e30)])
  assert run["test_loss"][-1] is None


def test_predicting_the_mean_has_the_loss_of_chance():
  data = DIABETES.load(None)
  targets = np.concatenate([part.targets for part in data[:3]])
  np.testing.assert_allclose(np.square(targets).mean(), 1.0, rtol=1e-5)


def noise_images():
  generator = np.random.default_rng(0)
  images = generator.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
  part = Part(images, generator.integers(0, 3, 24).astype(np.int32))
  return Data(part, part, part, 3)


def test_averaged_weights_are_evaluated_with_their_own_statistics():
  def model(num_outputs, num_heads):
    return Predictor(ResNet((2,)), num_outputs, num_heads)

  data = noise_images()
  task = make_task(
    noise_images, model, num_steps=8, batch_size=4, has_convolutions=True
  )
  optimizer = OPTIMIZERS["schedule_free_adamw"]
  program = Program(task, data, optimizer)
  states, batches = program._begin([Start(0)])
  states, _ = program._steps(states, program._parts["train"], batches)
  snapshot = program._snapshot(states, program._parts["train"].inputs)
  # The whole data is one batch: statistics of training are those to evaluate with.
  inputs = (data.train.inputs.astype(np.float32) / 255 - 0.5) / 0.25
  variables = {"params": snapshot.params, "batch_stats": snapshot.batch_stats}
  network = task.model(3, None)
  trained, _ = network.apply(variables, inputs, train=True, mutable=["batch_stats"])
  evaluated = network.apply(variables, inputs, train=False)
  np.testing.assert_allclose(trained, evaluated, rtol=1e-3, atol=1e-4)


def make_run(seed, rate, validation, test, chance=2.0):
  return {
    "kind": "summary",
    "date": "2020-01-02",
    "environment": records.environment(),
    "seed": seed,
    "rate": rate,
    "steps": [50, 100],
    "validation_loss": validation,
    "test_loss": test,
    "chance": chance,
  }


def test_the_rate_is_chosen_on_held_out_data():
  kept = [
    make_run(0, 0.1, [1.0, 0.9], [1.0, 0.5]),
    make_run(0, 0.2, [1.0, 0.8], [1.0, 0.7]),
  ]
  found = result(kept)
  assert (found.rate, found.losses, found.failures) == (0.2, (0.7,), 0)


def test_failures_count_with_the_loss_of_knowing_nothing():
  kept = [
    make_run(0, None, [None, None], [None, None]),
    make_run(1, None, [1.0, 9.0], [1.0, 9.0]),
    make_run(2, None, [1.0, 1.0], [1.0, 1.0]),
  ]
  found = result(kept)
  assert found.losses == (2.0, 2.0, 1.0)
  assert found.failures == 2


def test_at_equal_compute_the_curve_is_read_when_the_budget_is_spent():
  kept = [make_run(0, None, [1.0, 0.5], [1.0, 0.6])]
  assert result(kept, cost=2.0).losses == (1.0,)
  assert math.isclose(result(kept, cost=4.0).losses[0], 1.5)  # from chance, 2
  assert math.isclose(result(kept, cost=100 / 75).losses[0], 0.8)
  assert result(kept, cost=0.5).losses == (0.6,)


def test_losses_are_relative_to_the_better_of_the_tuned():
  of = lambda loss: [make_run(0, None, [1, loss], [1, loss])]  # noqa: E731
  found = relative({"a": of(0.4), "sgd": of(0.8), "adam": of(0.5)}, ("sgd", "adam"))
  assert found == {"a": 0.8, "sgd": 1.6, "adam": 1.0}


def test_tables_rank_by_the_geometric_mean():
  found = {
    task: {
      name: [
        make_run(0, rate, [1, 0.5], [1, 0.5 if name == "adam" else 1.0])
        for rate in method.rates
      ]
      for name, method in METHODS.items()
    }
    for task in ("vgg", "gru")
  }
  measured = {"environment": records.environment(), "date": "2021-03-04"}
  rows = [{"method": name, "ratio": 2.0, **measured} for name in METHODS]
  text = tables(TASKS, found, dict.fromkeys(found, rows))
  first = text.split("## Equal steps")[1].splitlines()[4]
  assert first.startswith("| Adam, best of 7 rates | 1.000 | 1.000 | 1.000 | 1.000 | 0")
  assert "## Equal compute" in text
  runs_line, times_line = text.splitlines()[-2:]
  assert runs_line.startswith("`python -m benchmarks.arena run`; device ")
  assert runs_line.endswith("; 2020-01-02.")
  assert times_line.startswith("Times of steps: device ")
  assert times_line.endswith("; 2021-03-04.")
  assert geometric_mean([2.0, 8.0]) == 4.0


def test_tables_without_runs_say_so():
  assert "No task" in tables(TASKS, {}, {})


class FakeProgram:
  """Records what it is asked to train, and whether at once."""

  asked: list = []
  together: list = []

  def __init__(self, *_, side_by_side, **__):
    self.side_by_side = side_by_side

  def run(self, starts):
    FakeProgram.asked += starts
    FakeProgram.together.append((self.side_by_side, len(starts)))
    return [{**make_run(*start, [1, 1], [1, None]), "seconds": 0.0} for start in starts]


def test_only_missing_runs_are_trained_a_few_at_a_time(tmp_path, monkeypatch):
  monkeypatch.setattr(runs, "Program", FakeProgram)
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  FakeProgram.asked, FakeProgram.together = [], []
  task = DIGITS._replace(num_steps=100)
  method = Method(ADAM, (0.1, 0.2))
  train = functools.partial(
    runs.train, task, None, "adam", method, out=tmp_path, say=lambda line: None
  )
  train(seeds=range(2))
  assert FakeProgram.asked == [Start(s, r) for s in range(2) for r in method.rates]
  train(seeds=range(3))
  assert FakeProgram.asked[4:] == [Start(2, 0.1), Start(2, 0.2)]
  # One at a time on a CPU, where several at once gain nothing; a kill loses one run.
  assert FakeProgram.together == [(False, 1)] * 6
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  train(seeds=range(8))
  assert FakeProgram.together[6:] == [(True, runs.LANES), (True, 3)]
  kept = runs.load(tmp_path / "toy" / "adam.jsonl", task)
  assert len(kept) == 16 and kept[0]["test_loss"] == [1, None]


def test_records_of_another_length_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(runs, "Program", FakeProgram)
  task = DIGITS._replace(num_steps=100)
  method = Method(ADAM, (0.1,))
  runs.train(task, None, "adam", method, [0], tmp_path, lambda line: None)
  with pytest.raises(OptionError, match="another --out"):
    runs.load(tmp_path / "toy" / "adam.jsonl", task._replace(num_steps=50))


def test_costs_are_ratios_to_sgd_and_measured_once(tmp_path):
  lines = []
  methods = {"sgd": Method(OPTIMIZERS["sgd"], (0.1,)), "adam": Method(ADAM, (0.1,))}
  measure = functools.partial(
    runs.measure_costs, DIGITS, DIGITS.load(None), methods, tmp_path, lines.append
  )
  measure()
  measure()
  assert len(lines) == 1 and "sgd 1.00" in lines[0]


@pytest.mark.parametrize(
  ("options", "text"),
  [
    ({"tasks": ("chess",)}, "--tasks must be some of vgg"),
    ({"methods": ("magic",)}, "--methods must be some of schedule_free_alrao"),
    ({"seeds": 0}, "--seeds must be at least 1"),
  ],
)
def test_unknown_options_are_refused(options, text, tmp_path):
  with pytest.raises(OptionError, match=text):
    Run(out=tmp_path, **options)()


@pytest.mark.data
def test_images_and_texts_are_cut_as_the_tasks_expect(
  cifar10_dir, ptb_dir, imagenette_dir
):
  cifar = sources.cifar10(cifar10_dir.parent)
  assert [len(part.targets) for part in cifar[:3]] == [10_000, 2_000, 2_000]
  nette = sources.imagenette(imagenette_dir.parent)
  assert nette.train.inputs.shape == (8_469, 32, 32, 3)
  assert set(nette.test.targets) == set(range(10))
  text = sources.characters(LENGTH, ptb_dir.parent)
  np.testing.assert_array_equal(
    text.train.inputs[:, 1:].ravel(), text.train.targets[:, :-1].ravel()
  )
  words = sources.words(4, VOCABULARY, ptb_dir.parent)
  assert words.train.targets.max() < VOCABULARY == words.train.inputs.max()
  np.testing.assert_array_equal(words.train.inputs.shape[1:], (4,))
