"""Records of runs: written whole, folded into archives, and read back."""

import json
import math

import numpy as np
import pytest

from benchmarks import records
from benchmarks.records import RecordError, Run

ENVIRONMENT = {"device": "cpu", "jax": "1.2.3", "commit": "0123456789abcdef"}


def make_epoch(number: int, loss: float | None = 0.5, **more) -> dict:
  return {
    "kind": "epoch",
    "epoch": number,
    "train_loss": 1.0 / 3.0,
    "validation_loss": loss,
    "nonfinite_steps": 0,
    "steps": [0, 1, 2],
    "head_weights": [[0.5, 0.5], [0.25, 0.75], [1 / 3, 2 / 3]],
    "examples_per_second": 100.0 * number,
    "seconds": 2.0,
    **more,
  }


def make_summary(name="run", best=2, num_epochs=2, config=None, **more) -> dict:
  return {
    "kind": "summary",
    "name": name,
    "config": {"suite": "cifar10", "rate": 0.1234567891, "seed": 0, **(config or {})},
    "ending": "maximum",
    "epochs": num_epochs,
    "best_epoch": best,
    "train_loss": 1.0 / 3.0,
    "validation_loss": 0.25,
    "test_loss": 2.0 / 3.0,
    "examples_per_second": 200.0,
    "seconds": 4.0,
    "peak_memory": {"host": 123456789, "device": None},
    "date": "2020-01-02",
    "environment": ENVIRONMENT,
    **more,
  }


def make_run(name="run", **more) -> list[dict]:
  return [make_epoch(1), make_epoch(2, 0.25), make_summary(name, **more)]


def make_cost(**more) -> dict:
  return {
    "kind": "cost",
    "suite": "arena",
    "task": "gru",
    "optimizer": "adam",
    "ratio": 1.23456789,
    "environment": ENVIRONMENT,
    "date": "2020-01-02",
    **more,
  }


def folded(tmp_path, *files: list[dict]) -> list[dict]:
  """The lines of an archive of some files."""
  for i, lines in enumerate(files):
    records.write(tmp_path / "out" / f"{i:02d}.jsonl", lines)
  records.collect(tmp_path / "out", tmp_path / "archive.jsonl")
  return lines_of(tmp_path / "archive.jsonl")


def lines_of(path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


# --- One run's own file


def test_records_are_valid_json_whatever_the_numbers(tmp_path):
  epoch = make_epoch(1, x=[float("nan"), 1.0])
  records.write(tmp_path / "run.jsonl", [epoch])
  assert records.read(tmp_path / "run.jsonl") == [{**epoch, "x": [None, 1.0]}]
  assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / "run.jsonl"
  records.write(path, make_run())
  before = path.read_text()
  with pytest.raises(TypeError, match="not JSON serializable"):
    records.write(path, [make_epoch(1), {"x": object()}])
  assert path.read_text() == before
  assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]


def test_only_a_run_that_has_ended_has_a_summary(tmp_path):
  path = tmp_path / "run.jsonl"
  assert records.read_summary(path) is None
  records.write(path, make_run()[:-1])
  assert records.read_summary(path) is None
  records.write(path, make_run())
  assert records.read_summary(path) == make_summary()


ENDED = "\n".join(map(json.dumps, make_run())) + "\n"


@pytest.mark.parametrize(
  ("content", "what"),
  [
    (b"\xff\xfe\x00", "not text"),
    (ENDED[:-20].encode(), "line 3 is not JSON"),
    (b'{"kind": "epoch"', "line 1 is not JSON"),
    (b"[1, 2]\n", "line 1 is not a JSON object"),
    (b'{"kind": "nonsense"}\n', "line 1 is neither an epoch nor a summary"),
    (b'{"kind": "epoch", "epoch": 1}\n', "line 1 is epoch without train_loss"),
    (b'{"kind": "summary"}\n', "line 1 is summary without config, date, environment"),
    (json.dumps(make_epoch(2)).encode(), "line 1 is not epoch 1"),
    ((ENDED + ENDED).encode(), "line 3 is a summary, with more lines behind it"),
    (
      json.dumps(make_summary(config=None) | {"config": 7}).encode(),
      "line 1 is summary without options",
    ),
    (
      json.dumps(make_cost(environment="cpu")).encode(),
      "line 1 is cost without an environment",
    ),
  ],
)
def test_damaged_records_are_named_with_what_to_do(tmp_path, content, what):
  path = tmp_path / "run.jsonl"
  path.write_bytes(content)
  for read in (records.read, records.read_summary, lambda p: records.load([p])):
    with pytest.raises(RecordError) as error:
      read(path)
    text = str(error.value)
    assert str(path) in text and what in text
    assert "Delete it" in text and "\n" not in text


# --- Archives


def test_an_environment_is_written_once_and_a_run_is_one_line(tmp_path):
  other = make_run("c", environment={**ENVIRONMENT, "jax": "1.2.4"})
  lines = folded(tmp_path, make_run("a"), make_run("b"), other)
  assert [line["kind"] for line in lines] == ["environment"] * 2 + ["run"] * 3
  assert [line["environment"] for line in lines[2:]] == [0, 0, 1]
  assert lines[1]["jax"] == "1.2.4"


def test_curves_are_columns_of_six_digits_and_posteriors_one_an_epoch(tmp_path):
  line = folded(tmp_path, make_run())[-1]
  assert line["curves"]["train_loss"] == [0.333333, 0.333333]
  assert line["curves"]["validation_loss"] == [0.5, 0.25]
  assert line["posteriors"] == [[0.333, 0.667]] * 2
  assert line["steps"] == [2, 2]
  assert line["test_loss"] == 0.666667
  # Options tell runs apart: they stay as they are.
  assert line["config"]["rate"] == 0.1234567891


def test_what_follows_from_the_epochs_is_left_out_and_comes_back(tmp_path):
  line = folded(tmp_path, make_run())[-1]
  left_out = {"epochs", "train_loss", "validation_loss", "examples_per_second"}
  assert not (left_out | {"seconds"}) & set(line)
  (run,) = records.load([tmp_path / "archive.jsonl"])
  expected = {**make_summary(), "train_loss": 0.333333, "test_loss": 0.666667}
  assert run.summary == expected
  assert [epoch["epoch"] for epoch in run.epochs] == [1, 2]


def test_what_does_not_follow_from_the_epochs_is_kept(tmp_path):
  folded(tmp_path, make_run(validation_loss=0.5, seconds=10.0))
  (run,) = records.load([tmp_path / "archive.jsonl"])
  assert (run.summary["validation_loss"], run.summary["seconds"]) == (0.5, 10.0)


def test_losses_that_are_not_finite_come_back_as_none_and_nan(tmp_path):
  failed = [make_epoch(1, None), make_summary(best=None, num_epochs=1, ending="failed")]
  failed[-1] |= {"train_loss": None, "validation_loss": None, "test_loss": None}
  folded(tmp_path, failed)
  (run,) = records.load([tmp_path / "archive.jsonl"])
  assert run.failed
  assert run.summary["validation_loss"] is None
  assert run.epochs[0]["validation_loss"] is None
  assert math.isnan(run.curve("validation_loss")[0])


def test_archives_and_runs_own_files_read_alike(tmp_path):
  """But for digits, and for posteriors within an epoch."""
  exact = {"train_loss": 0.25, "steps": [2], "head_weights": [[0.25, 0.75]]}
  lines = [make_epoch(1, **exact), make_epoch(2, 0.25, **exact)]
  lines.append(make_summary(train_loss=0.25, test_loss=0.75))
  folded(tmp_path, lines)
  (archived,) = records.load([tmp_path / "archive.jsonl"])
  (own,) = records.load([tmp_path / "out"])
  assert archived == own == Run(lines[-1], lines[:-1])


def test_a_study_of_the_posterior_keeps_all_of_it(tmp_path):
  config = {"study": "posterior"}
  folded(tmp_path, make_run(config=config))
  (run,) = records.load([tmp_path / "archive.jsonl"])
  for epoch in run.epochs:
    assert epoch["steps"] == [0, 1, 2]
    expected = [[0.5, 0.5], [0.25, 0.75], [0.33333, 0.66667]]
    np.testing.assert_allclose(epoch["head_weights"], expected, atol=1e-12)


def test_a_study_of_averaging_keeps_the_heaviest_heads_changes(tmp_path):
  weights = [[0.6, 0.4], [0.7, 0.3], [0.4, 0.6], [0.1, 0.9], [0.2, 0.8], [0.9, 0.1]]
  epoch = make_epoch(1, 0.25, steps=[0, 1, 2, 3, 4, 5], head_weights=weights)
  folded(
    tmp_path, [epoch, make_summary(best=1, num_epochs=1, config={"study": "averaging"})]
  )
  (run,) = records.load([tmp_path / "archive.jsonl"])
  assert run.epochs[0]["steps"] == [1, 2, 4, 5]
  leaders = np.argmax(run.epochs[0]["head_weights"], axis=1)
  assert np.count_nonzero(np.diff(leaders)) == 2


def test_an_optimizer_without_heads_has_no_posteriors(tmp_path):
  plain = make_epoch(1, 0.25, steps=[], head_weights=[])
  line = folded(tmp_path, [plain, make_summary(best=1, num_epochs=1)])[-1]
  assert "posteriors" not in line
  (run,) = records.load([tmp_path / "archive.jsonl"])
  assert run.epochs[0]["head_weights"] == []


def test_images_left_out_are_kept(tmp_path):
  lines = [make_epoch(1, skipped=[]), make_epoch(2, 0.25, skipped=["a.png"])]
  folded(tmp_path, [*lines, make_summary(skipped=["a.png"])])
  (run,) = records.load([tmp_path / "archive.jsonl"])
  assert [epoch["skipped"] for epoch in run.epochs] == [[], ["a.png"]]
  assert run.summary["skipped"] == ["a.png"]


def test_a_run_without_epochs_keeps_its_summary(tmp_path):
  """A block of draws, of which only accuracies are known."""
  summary = make_summary(accuracies=[0.25, None])
  folded(tmp_path, [summary])
  (run,) = records.load([tmp_path / "archive.jsonl"])
  assert run.epochs == []
  assert run.summary["accuracies"] == [0.25, None]
  assert run.summary["seconds"] == 4.0


# --- Collecting


def test_collecting_again_replaces_runs_of_one_name_and_keeps_the_others(tmp_path):
  path = tmp_path / "archive.jsonl"
  records.write(tmp_path / "one" / "a.jsonl", make_run("a"))
  records.write(tmp_path / "one" / "b.jsonl", make_run("b"))
  assert records.collect(tmp_path / "one", path) == (2, 0, 0)
  records.write(tmp_path / "two" / "b.jsonl", make_run("b", test_loss=9.0))
  records.write(tmp_path / "two" / "c.jsonl", make_run("c"))
  assert records.collect(tmp_path / "two", path) == (1, 1, 0)
  found = {run.name: run.summary["test_loss"] for run in records.load([path])}
  assert found == {"a": 0.666667, "b": 9.0, "c": 0.666667}
  assert list(found) == ["a", "b", "c"]
  text = path.read_text()
  records.collect(tmp_path / "two", path)
  assert path.read_text() == text


def test_runs_that_have_not_ended_are_left_out_and_counted(tmp_path):
  records.write(tmp_path / "out" / "a.jsonl", make_run("a"))
  records.write(tmp_path / "out" / "b.jsonl", make_run("b")[:-1])
  counts = records.collect(tmp_path / "out", tmp_path / "archive.jsonl")
  assert counts == (1, 0, 1)


def test_nothing_to_collect_is_an_error(tmp_path):
  records.write(tmp_path / "out" / "b.jsonl", make_run("b")[:-1])
  with pytest.raises(RecordError, match="nothing to collect"):
    records.collect(tmp_path / "out", tmp_path / "archive.jsonl")
  with pytest.raises(RecordError, match="nothing to collect"):
    records.collect(tmp_path / "nowhere", tmp_path / "archive.jsonl")
  assert not (tmp_path / "archive.jsonl").exists()


def test_costs_are_collected_beside_runs_and_replaced_by_what_they_are_of(tmp_path):
  lines = folded(tmp_path, make_run(), [make_cost(), make_cost(task="vgg")])
  assert [line["kind"] for line in lines] == ["environment", "run", "cost", "cost"]
  assert lines[2]["ratio"] == 1.23457
  again = [make_cost(ratio=2.0, milliseconds=3.0)]
  records.write(tmp_path / "again" / "costs.jsonl", again)
  assert records.collect(tmp_path / "again", tmp_path / "archive.jsonl") == (0, 1, 0)
  found = records.load_costs([tmp_path / "archive.jsonl"])
  assert {cost["task"]: cost["ratio"] for cost in found} == {"gru": 2.0, "vgg": 1.23457}
  assert all(cost["environment"] == ENVIRONMENT for cost in found)
  assert len(records.load([tmp_path / "archive.jsonl"])) == 1


def test_what_a_kill_left_behind_is_not_read(tmp_path):
  records.write(tmp_path / "out" / "a.jsonl", make_run("a"))
  hidden = tmp_path / "out" / ".part-x" / "b.jsonl"
  hidden.parent.mkdir()
  hidden.write_text('{"kind"')
  assert [run.name for run in records.load([tmp_path / "out"])] == ["a"]


def test_without_any_run_that_has_ended_there_is_nothing_to_read(tmp_path):
  with pytest.raises(RecordError, match="no run that has ended below"):
    records.load([tmp_path / "nowhere"])
  assert records.load_costs([tmp_path / "nowhere"]) == []


@pytest.mark.parametrize(
  "line",
  [
    {"kind": "run", "name": "a", "environment": 5, "curves": {}},
    {"kind": "run", "name": "a", "curves": {}},
    {"kind": "run", "name": "a", "environment": 0},
    {"kind": "run", "environment": 0, "curves": {"train_loss": 7}},
    {"kind": "cost"},
    {"kind": "epoch", "environment": 0},
  ],
)
def test_damaged_archives_are_named(tmp_path, line):
  path = tmp_path / "archive.jsonl"
  head = {"kind": "environment", **ENVIRONMENT}
  path.write_text("\n".join(map(json.dumps, (head, line))) + "\n")
  with pytest.raises(RecordError, match=r"archive\.jsonl is damaged: line 2"):
    records.load([path])


def test_a_damaged_committed_archive_is_to_be_restored(monkeypatch, tmp_path):
  monkeypatch.setattr(records, "ROOT", tmp_path)
  monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
  path = tmp_path / "results" / "tier_a.jsonl"
  path.parent.mkdir()
  path.write_text('{"kind": "environment"}\n{"kind"')
  with pytest.raises(RecordError, match=r"git checkout results/tier_a\.jsonl"):
    records.load([path])


# --- The committed archives

ARCHIVES = sorted(records.RESULTS.glob("*.jsonl"))


def test_the_committed_archives_are_few_and_small():
  assert len(ARCHIVES) <= 30
  assert sum(path.stat().st_size for path in ARCHIVES) < 4.2e6
  others = {path.name for path in records.RESULTS.iterdir()} - {"README.md"}
  assert others == {path.name for path in ARCHIVES}


@pytest.mark.parametrize("path", ARCHIVES, ids=lambda path: path.stem)
def test_a_committed_archive_reads_and_folds_to_itself(path, tmp_path):
  if path.stem != "costs":
    names = [run.name for run in records.load([path])]
    assert len(names) == len(set(names))
  again = tmp_path / path.name
  records.collect(path, again)
  assert again.read_bytes() == path.read_bytes()
  kinds = [line["kind"] for line in lines_of(path)]
  assert len(
    set(map(str, lines_of(path)[: kinds.count("environment")]))
  ) == kinds.count("environment")


def test_an_environment_tells_the_cores_that_the_process_may_use(monkeypatch):
  monkeypatch.setattr("os.sched_getaffinity", lambda _: {3}, raising=False)
  assert records._num_cores() == 1
