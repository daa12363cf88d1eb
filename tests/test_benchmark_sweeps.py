"""Tables of runs, the command line, and the report made from canned records."""

import sys

import jax
import pytest
from benchmark_cases import quiet

from benchmarks import cifar10, commands, engine, papers, report, results, sweeps
from benchmarks.data import DataError
from benchmarks.experiments import Experiment, Workshop
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.planning import OptionError
from benchmarks.progress import sparkline
from benchmarks.records import RecordError, read, write

BASE = Experiment(
  dataset="digits", network="vgg19", num_train=64, num_validation=16, num_test=16
)


def canned(plan, validation_loss, accuracy, ending="maximum") -> list[dict]:
  """Records of two epochs and a summary."""
  heads = [[0.5, 0.5], [0.1, 0.9]] if plan.config["num_heads"] else []
  epochs = [
    {
      "kind": "epoch",
      "epoch": epoch,
      "train_loss": validation_loss,
      "validation_loss": validation_loss,
      "validation_accuracy": accuracy,
      "nonfinite_steps": 0,
      "steps": [0, 3],
      "head_weights": heads,
      "examples_per_second": 100.0,
      "seconds": 1.0,
    }
    for epoch in (1, 2)
  ]
  names = ("device", "cores", "jax", "flax", "optax", "alrao_jax", "commit")
  summary = {
    "kind": "summary",
    "name": plan.name,
    "config": plan.config,
    "num_parameters": 20_086_692 if plan.config["num_heads"] else 20_040_522,
    "ending": ending,
    "epochs": 2,
    "best_epoch": None if accuracy is None else 1,
    "train_loss": validation_loss,
    "validation_loss": validation_loss,
    "validation_accuracy": accuracy,
    "test_loss": validation_loss,
    "test_accuracy": accuracy,
    "examples_per_second": 50.0 if plan.config["num_heads"] else 100.0,
    "seconds": 2.0,
    "peak_memory": {"host": 1, "device": None},
    "date": "2020-01-02",
    "environment": dict.fromkeys(names, "x"),
  }
  return [*epochs, summary]


@pytest.fixture
def trained(monkeypatch):
  """Replaces training by canned records; returns the names of the runs trained."""
  names = []

  def train(program, plan, display, *, resume=True):
    del program, display, resume
    names.append(plan.name)
    optimizer, rate = plan.config["optimizer"], plan.config["rate"]
    outcome = {
      ("sgd", 0.1): (0.5, 0.90),
      ("sgd", 0.01): (0.4, 0.80),  # the best by validation loss
      ("sgd", 10.0): (None, None),
      ("alrao", None): (0.6, 0.70 + 0.05 * plan.seed),
      ("adam", None): (2.3, 0.10),
    }[optimizer, rate]
    ending = "failed" if outcome[0] is None else "maximum"
    records = canned(plan, *outcome, ending)
    write(plan.path, records)
    return read(plan.path)[-1]

  monkeypatch.setattr(engine, "train", train)
  monkeypatch.setattr(Workshop, "program", lambda self, experiment: None)
  return names


PRESET = sweeps.Preset(
  bases=(BASE,), optimizers=("alrao", "sgd", "adam"), rates=(0.1, 0.01, 10.0)
)


def test_sweep_repeats_the_best_rate_by_validation_loss(trained, tmp_path):
  summaries = sweeps.sweep(PRESET, Workshop(), tmp_path, quiet())
  runs = [
    tuple(s["config"][k] for k in ("optimizer", "rate", "seed")) for s in summaries
  ]
  assert runs == [
    *(("alrao", None, seed) for seed in range(3)),
    *(("sgd", rate, 0) for rate in (0.1, 0.01, 10.0)),
    *(("sgd", 0.01, seed) for seed in (1, 2)),
    *(("adam", None, seed) for seed in range(3)),
  ]


def test_sweep_skips_what_is_done(trained, tmp_path):
  first = sweeps.sweep(PRESET, Workshop(), tmp_path, quiet())
  assert len(trained) == len(first) == 11
  next(tmp_path.glob("*-adam-s1-*.jsonl")).unlink()
  again = sweeps.sweep(PRESET, Workshop(), tmp_path, quiet())
  assert again == first
  assert len(trained) == 12


def test_other_options_never_take_the_place_of_results(tmp_path):
  workshop = Workshop()
  names = {
    workshop.plan(experiment, tmp_path).name
    for experiment in (
      BASE,
      Experiment(**{**vars(BASE), "max_epochs": 3}),
      Experiment(**{**vars(BASE), "num_heads": 5}),
    )
  }
  assert len(names) == 3


def test_every_preset_is_made_of_valid_experiments():
  for preset in cifar10.PRESETS.values():
    for base in preset.bases:
      base.check()
    assert set(preset.optimizers) <= set(OPTIMIZERS)


def test_sweep_goes_on_without_cifar10_where_the_preset_says_so(trained, tmp_path):
  preset = PRESET._replace(optimizers=("adam",), without_data={"dataset": "digits"})
  workshop = Workshop(tmp_path / "nothing")
  summaries = sweeps.sweep(preset, workshop, tmp_path / "out", quiet())
  assert {s["config"]["dataset"] for s in summaries} == {"digits"}
  assert not any(s["config"]["real_data"] for s in summaries)
  base = Experiment(network="vgg19")
  with pytest.raises(DataError, match="no CIFAR-10 below"):
    sweeps.sweep(PRESET._replace(bases=(base,)), workshop, tmp_path / "out", quiet())


def test_selecting_what_a_preset_does_not_hold_is_an_error():
  picked = sweeps.select(PRESET, ("vgg19",), ("adam",))
  assert (len(picked.bases), picked.optimizers) == (1, ("adam",))
  with pytest.raises(OptionError, match="googlenet"):
    sweeps.select(PRESET, ("googlenet",), ())


@pytest.fixture
def run_main(monkeypatch, tmp_path):
  """Runs the command line in this process; returns its exit code."""
  monkeypatch.setenv("ALRAO_CACHE_DIR", str(tmp_path))
  before = jax.config.jax_compilation_cache_dir

  def run(*arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks.cifar10", *arguments])
    with pytest.raises(SystemExit) as stopped:
      commands.main(cifar10.Run | cifar10.Sweep | commands.Report, cifar10.__doc__)
    return stopped.value.code

  yield run
  jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
  ("arguments", "text"),
  [
    (["run", "--width", "0"], "--width must be positive, got 0.0."),
    (["run", "--optimizer", "sgd"], "--rate must be positive for --optimizer sgd"),
    (["run", "--rate", "0.1"], "--rate must be left out for --optimizer alrao"),
    (["run", "--dataset", "digits", "--num-train", "9999"], "--num-train"),
    (["run", "--dataset", "digits", "--batch-size", "9999"], "--batch-size"),
    (["run", "--data-dir", "/nowhere"], "no CIFAR-10 below /nowhere"),
    (["run", "--optimizer", "nonsense"], "nonsense"),
    (["sweep", "--networks", "nonsense"], "nonsense"),
    (["report", "--results", "/nowhere"], "no run that has ended below /nowhere"),
  ],
)
def test_bad_options_and_data_exit_with_2(run_main, arguments, text, capsys):
  assert run_main(*arguments) == 2
  assert text in capsys.readouterr().err


def test_interrupt_says_how_to_go_on(run_main, monkeypatch, capsys):
  def interrupted(self):
    raise KeyboardInterrupt

  monkeypatch.setattr(cifar10.Sweep, "__call__", interrupted)
  assert run_main("sweep") == 130
  assert "goes on after the last checkpoint" in capsys.readouterr().err


@pytest.fixture
def table_text(trained, tmp_path, monkeypatch) -> str:
  figures = {("digits", *key[1:]): found for key, found in papers.TABLE_1.items()}
  monkeypatch.setattr(papers, "TABLE_1", figures)
  sweeps.sweep(PRESET, Workshop(), tmp_path / "runs", quiet())
  path = report.write([tmp_path / "runs"], tmp_path / "report")
  (picture,) = (tmp_path / "report" / "figures").iterdir()
  assert picture.stat().st_size > 10_000
  assert picture.name in path.read_text()
  return path.read_text()


def rows_of(text, label):
  return [
    [cell.strip() for cell in line.strip("| ").split(" | ")]
    for line in text.splitlines()
    if line.startswith(f"| {label}")
  ]


def test_report_has_ours_beside_the_papers(table_text):
  (alrao,) = rows_of(table_text, "Alrao")
  assert alrao[:5] == ["Alrao", "3", "3", "0.600 ± 0.000", "75.00 ± 5.00"]
  assert alrao[6:8] == ["0.45 ± 0.03", "87.5 ± 0.4"]
  (best,) = rows_of(table_text, "**SGD 0.01, best rate**")
  assert best[3:] == ["0.400 ± 0.000", "80.00 ± 0.00", "-5.00",
                      "0.42 ± 0.02", "89.5 ± 0.2", "-2.0"]  # fmt: skip
  (other,) = rows_of(table_text, "SGD 0.1")
  assert other[:6] == ["SGD 0.1", "1", "1", "0.500", "90.00", "-15.00"]
  (vgg,) = rows_of(table_text, "vgg19, width 1")
  assert vgg[1:] == ["20,040,522", "20,086,692 (10)", "20,040,522", "20,086,692"]


def test_report_counts_what_did_not_learn_and_what_failed(table_text):
  # Learned: above 10 % plus half of the best rate's 70 points, 45 %.
  assert [row[2] for row in rows_of(table_text, "Adam")] == ["0"]
  (failed,) = rows_of(table_text, "SGD 10")
  assert failed[1:5] == ["1", "0", "none", "10.00"]
  assert "2 of 3 SGD rates learn. 2 of 3 beat Alrao." in table_text
  assert "Methods with a better mean score than Alrao's: SGD 0.01." in table_text
  assert "not finite: SGD 10 (1 of 1)." in table_text
  assert "One run of Alrao took 2 epochs; one of each SGD rate, 6." in table_text
  assert "**Not CIFAR-10**" in table_text


def test_best_rate_is_compared_on_the_seeds_that_all_rates_have(tmp_path):
  # Rate 0.1 is best on seed 0, as the sweep saw it, and worse on average.
  for rate, seed, loss in ((0.1, 0, 0.5), (0.1, 1, 0.9), (0.01, 0, 0.6)):
    options = {**vars(BASE), "optimizer": "sgd", "rate": rate, "seed": seed}
    plan = Workshop().plan(Experiment(**options), tmp_path)
    write(plan.path, canned(plan, loss, 0.5))
  ((table,),) = results.by_size(results.load([tmp_path]))
  assert table.best_sgd.label == "SGD 0.1"
  assert len(table.best_sgd.runs) == 2


def test_tables_of_one_network_have_a_picture_each(tmp_path):
  for max_epochs in (2, 3):
    options = {**vars(BASE), "max_epochs": max_epochs}
    plan = Workshop().plan(Experiment(**options), tmp_path / "runs")
    write(plan.path, canned(plan, 0.5, 0.5))
  text = report.write([tmp_path / "runs"], tmp_path).read_text()
  names = [path.name for path in sorted((tmp_path / "figures").iterdir())]
  assert names == ["vgg19-width-1-2.png", "vgg19-width-1.png"]
  _, *sections = text.split("### vgg19, width 1\n")
  for section, name in zip(sections, reversed(names), strict=True):
    assert f"(figures/{name})" in section


def test_parameters_are_given_for_each_number_of_heads(tmp_path):
  for num_heads in (10, 6):
    options = {**vars(BASE), "num_heads": num_heads}
    plan = Workshop().plan(Experiment(**options), tmp_path / "runs")
    *epochs, summary = canned(plan, 0.5, 0.5)
    write(plan.path, [*epochs, {**summary, "num_parameters": 1_000 * num_heads}])
  text = report.write([tmp_path / "runs"], tmp_path).read_text()
  (vgg,) = rows_of(text, "vgg19, width 1")
  assert vgg[1:3] == ["", "6,000 (6), 10,000 (10)"]


def test_report_names_runs_that_went_on_after_losses_that_were_not_finite(tmp_path):
  for seed, nonfinite_steps in ((0, 0), (1, 3)):
    plan = Workshop().plan(Experiment(**{**vars(BASE), "seed": seed}), tmp_path)
    *epochs, summary = canned(plan, 0.5, 0.5)
    epochs[-1] = {**epochs[-1], "nonfinite_steps": nonfinite_steps}
    write(plan.path, [*epochs, summary])
  text = report.write([tmp_path], tmp_path / "report").read_text()
  assert "- Trained on after such losses: Alrao (1 of 2)." in text


def test_damaged_record_is_named(tmp_path):
  (tmp_path / "run.jsonl").write_text('{"kind": "epoch"}\n{"kind"')
  with pytest.raises(RecordError, match=r"run\.jsonl, line 2: not JSON"):
    results.load([tmp_path])


def test_records_are_valid_json_whatever_the_numbers(tmp_path):
  write(tmp_path / "run.jsonl", [{"kind": "epoch", "x": [float("nan"), 1.0]}])
  assert read(tmp_path / "run.jsonl") == [{"kind": "epoch", "x": [None, 1.0]}]
  assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]


def test_sparkline_shows_the_posterior():
  assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
