"""Where a study's runs come from: its archive, its folder, or the one loop."""

import dataclasses
import json

import numpy as np
import pytest
from training_cases import quiet

pytest.importorskip("matplotlib", reason="pictures need the extra 'bench'")

from benchmarks import data, records, studies, training
from benchmarks.console import OptionError
from benchmarks.methods import METHODS, SGD
from benchmarks.records import RESULTS, RecordError
from benchmarks.studies import granularity
from benchmarks.studies._study import (
  Archived,
  Arm,
  ImageRunner,
  Images,
  Study,
  Trained,
  run_name,
)
from benchmarks.studies.granularity import TextRunner, Texts
from benchmarks.studies.guard import WatchedWorkload
from benchmarks.studies.ranking import DIGITS
from benchmarks.studies.width import WidthStudy

TINY = Images("digits", num_train=96, num_held_out=32, epochs=2)
# Those that are not runs of arms have tests of their own.
OTHERS = ("long", "probe", "recipe", "recipe_search")
NAMES = [name for name in studies.names() if name not in OTHERS]


def runner_in(folder, images=TINY, **options):
  return ImageRunner(Trained("test", folder, quiet()), images, **options)


@pytest.fixture
def trained(monkeypatch):
  """The names of the runs that are trained."""
  names, train = [], training.train

  def counting(workload, plan, display, **options):
    names.append(plan.name)
    return train(workload, plan, display, **options)

  monkeypatch.setattr(training, "train", counting)
  return names


@pytest.fixture
def nothing_loaded(monkeypatch):
  """No data is loaded and nothing is trained."""
  for owner, call in (
    (data, "load"),
    (granularity, "load_text"),
    (training, "train"),
  ):
    monkeypatch.setattr(owner, call, None)


# --- Archives


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("nothing_loaded")
def test_the_published_table_is_derived_from_the_archive_alone(name):
  page = (RESULTS / "README.md").read_text(encoding="utf-8")
  lines = studies.load(name).derive()
  section = page[page.index(f"\n### {name}\n") :]
  for line in lines:
    assert line.lstrip("# ") in section
  assert sum(line.startswith("| ") for line in lines) > 2
  assert lines[-1].startswith(f"`python -m benchmarks study {name}`; device ")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("nothing_loaded")
def test_the_picture_is_drawn_from_the_archive_alone(name, tmp_path):
  path = tmp_path / f"{name}.png"
  studies.load(name).picture(RESULTS, path)
  assert path.stat().st_size > 10_000


@pytest.mark.parametrize("name", NAMES)
def test_archived_runs_have_the_names_that_they_would_get_today(name):
  for run in records.load([records.archive(name)]):
    known = {key: value for key, value in run.config.items() if key != "chance"}
    assert run.name == run_name(known)


def test_runs_of_other_options_are_not_taken():
  study = WidthStudy()
  other = dataclasses.replace(study.images, epochs=7)
  with pytest.raises(RecordError, match="lacks the run of alrao-small_cnn-x1, seed 0"):
    dataclasses.replace(study, images=other).derive()


def test_a_run_that_an_archive_lacks_is_named_with_the_command_that_trains_it(tmp_path):
  lines = records.archive("width").read_text(encoding="utf-8").splitlines()
  kept = [line for line in lines if '"arm":"sgd-10-mlp-x3"' not in line]
  assert len(kept) == len(lines) - 3
  (tmp_path / "width.jsonl").write_text("\n".join(kept))
  with pytest.raises(RecordError, match="sgd-10-mlp-x3, seed 0.* study width"):
    WidthStudy().derive(tmp_path)


def test_an_archive_that_is_missing_is_named(tmp_path):
  with pytest.raises(RecordError, match=r"width\.jsonl"):
    WidthStudy().derive(tmp_path)


def test_times_of_other_settings_are_not_taken():
  source = Archived("guard", RESULTS)
  with pytest.raises(RecordError, match="lacks times of steps with {'rounds': 7}"):
    source.cost({"rounds": 7}, lambda: [])


# --- Training


@pytest.mark.slow
def test_arms_share_programs_and_no_run_is_repeated(tmp_path, trained):
  arms = [Arm(f"sgd-{rate:g}", SGD, "sgd", rate, width=1 / 8) for rate in (0.1, 0.01)]
  runner = runner_in(tmp_path)
  first = runner.run(arms, range(2))
  assert runner.workload(arms[-1]).step.num_traces == 1
  assert len(trained) == 4
  again = runner_in(tmp_path).run(arms, range(2))
  assert len(trained) == 4
  assert [run.summary for run in again] == [run.summary for run in first]
  assert [run.config["arm"] for run in first] == ["sgd-0.1"] * 2 + ["sgd-0.01"] * 2


@pytest.mark.usefixtures("nothing_loaded")
def test_runs_that_have_ended_need_no_data_and_tell_their_day(tmp_path):
  runner = runner_in(tmp_path)
  arm = Arm("sgd", SGD, "sgd", 0.1)
  plan = runner.plan(arm, 0, tmp_path)
  summary = {"name": plan.name, "config": plan.config, "date": "2026-01-02"}
  summary = {"kind": "summary", **summary, "environment": {}}
  records.write(plan.path, [summary])
  plan.checkpoints.mkdir(parents=True)  # of a run killed at its very end
  (run,) = runner.run([arm], [0])
  assert run.summary == summary and run.epochs == []
  assert runner._source.used == [summary]
  assert not plan.checkpoints.exists()


def test_a_damaged_checkpoint_begins_the_run_anew(tmp_path, capsys):
  arm = Arm("sgd", SGD, "sgd", 0.1, network="mlp", width=1 / 32)
  runner = runner_in(tmp_path)
  checkpoints = runner.plan(arm, 0, tmp_path).checkpoints
  (checkpoints / "4").mkdir(parents=True)
  (checkpoints / "4" / "_CHECKPOINT_METADATA").write_text("{")
  (run,) = runner.run([arm], [0])
  assert len(run.epochs) == 2


def test_test_images_have_no_part(tmp_path):
  _, images = runner_in(tmp_path).load()
  held_out = data.load("digits").train_labels[-32:]
  for part in ("validation", "test"):
    labels = np.asarray(images.labels)[images.parts[part]]
    np.testing.assert_array_equal(labels, held_out)


def test_halves_of_the_held_out_images_choose_and_score(tmp_path):
  _, images = runner_in(tmp_path, halve=True).load()
  parts, labels = images.parts, np.asarray(images.labels)
  assert [len(parts[name]) for name in ("train", "validation", "test")] == [96, 16, 16]
  held_out = data.load("digits").train_labels[-32:]
  np.testing.assert_array_equal(labels[parts["validation"]], held_out[0::2])
  np.testing.assert_array_equal(labels[parts["test"]], held_out[1::2])


def test_workloads_are_shared_by_equal_arms_only(tmp_path):
  runner = runner_in(tmp_path)
  arm = Arm("sgd", SGD, "same", 0.1, network="mlp", width=1 / 32)
  first = runner.workload(arm)
  assert runner.workload(arm._replace(name="other", rate=0.2)) is first
  watched = runner.workload(arm._replace(workload=WatchedWorkload))
  assert isinstance(watched, WatchedWorkload)
  body = runner.workload(arm._replace(body=DIGITS[0]))
  assert body.num_parameters != first.num_parameters


def test_a_share_of_the_text_trains(tmp_path):
  file = tmp_path / "text.txt"
  file.write_text("ab ba\n" * 500)
  texts = Texts(0.5, num_held_out=100, batch_size=2, length=5, files=(file,))
  runner = TextRunner(Trained("test", tmp_path, quiet()), texts)
  arm = Arm("a", METHODS["adam"], "a", network="lstm")
  config = runner.plan(arm, 0, tmp_path).config
  assert config["num_train"] == 0.5 * 0.8 * 3000
  assert runner.workload(arm).steps_per_epoch == 1199 // 2 // 5
  json.dumps(config)  # as records are written
  with pytest.raises(ValueError, match=r"Arm\(width=...\) must be left at 1.0"):
    runner.workload(arm._replace(compiled="b", width=2.0))
  with pytest.raises(ValueError, match="small_cnn"):
    runner.workload(arm._replace(compiled="b", network="small_cnn"))


# --- Pages


def test_a_study_tells_what_its_records_were_measured_on(tmp_path, capsys):
  def record(commit, date):
    names = ("device", "cores", "jax", "flax", "optax", "alrao_jax")
    environment = {**dict.fromkeys(names, "1.0"), "commit": commit}
    return {"environment": environment, "date": date}

  class Two(Study):
    name, images, seeds, out = "two", TINY, 2, tmp_path

    def find(self, source):
      source.used.append(record("b" * 40 + "+", "2026-02-03"))
      source.used.append(record("a" * 40, "2026-01-02"))
      source.used.append(record("a" * 40, "2026-01-02"))

    def table(self, found):
      return []

    def draw(self, found, path):
      path.touch()

  study = Two()
  for _ in range(2):  # the second call forgets the first one's records
    study()
  last = (tmp_path / "two.md").read_text().splitlines()[-1]
  commits = f"commit {'a' * 12} and {'b' * 12}+"
  assert last.endswith(f"alrao_jax 1.0, {commits}; 2026-01-02 and 2026-02-03.")


def test_counts_are_in_the_right_number():
  assert (
    dataclasses.replace(TINY, epochs=1).describe().endswith("1 epoch, batches of 32")
  )
  assert TINY.describe().endswith("2 epochs, batches of 32")


def test_one_seed_is_refused(tmp_path):
  with pytest.raises(OptionError, match="--seeds must be at least 2"):
    WidthStudy(TINY, 1, out=tmp_path)()
