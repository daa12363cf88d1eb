"""Pages and pictures made from records: current, and made from records of one's own."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from test_tables import make_run, make_runs

pytest.importorskip("matplotlib", reason="pictures need the extra 'bench'")

from benchmarks import records, report, studies
from benchmarks.__main__ import main
from benchmarks.console import OptionError
from benchmarks.records import RESULTS, ROOT, RecordError, Run
from benchmarks.tables import Table, by_size


def write_runs(folder: Path, runs: list[Run]) -> None:
  """Writes runs as a sweep does, a file each."""
  for run in runs:
    records.write(folder / f"{run.name}.jsonl", [*run.epochs, run.summary])


def refusal(capsys, *arguments: str) -> str:
  """What a command that exits with 2 says, which is one line."""
  with pytest.raises(SystemExit) as stopped:
    main(arguments)
  assert stopped.value.code == 2
  error = capsys.readouterr().err.strip()
  assert "Traceback" not in error
  return error


# --- What is generated is current


@pytest.fixture(scope="module")
def pages() -> dict[Path, str]:
  return report.pages()


def test_every_generated_page_and_part_is_current(pages):
  stale = [
    str(path.relative_to(ROOT))
    for path, text in pages.items()
    if not path.exists() or path.read_text(encoding="utf-8") != text
  ]
  assert not stale, f"run `{report.COMMAND}`: {', '.join(stale)}"


def test_the_page_has_every_archive_and_every_study(pages):
  text = pages[report.PAGE]
  for name in studies.names():
    assert f"\n### {name}\n" in text
  counted = sum(int(n) for n in re.findall(r"^(\d+) runs, \d+ of which", text, re.M))
  runs = [run for path in RESULTS.glob("*.jsonl") if path.stem != "costs"
          for run in records.load([path])]  # fmt: skip
  of_suites = [r for r in runs if "study" not in r.config
               and r.config["suite"] not in report.SHORT]  # fmt: skip
  assert counted == len(of_suites)


def test_parts_of_all_names_are_shown_somewhere(pages):
  shown = {name for text in pages.values() for name in report.BEGIN.findall(text)}
  assert shown == set(report.PARTS)


def test_pictures_that_the_docs_show_are_those_that_are_made():
  shown = {
    name
    for path in (ROOT / "docs").glob("*.md")
    for name in re.findall(r"\(pictures/(\w+)\.png\)", path.read_text())
  }
  made = {path.stem for path in report.PICTURES.glob("*.png")}
  assert shown == made == set(report._pictures())


def test_links_to_headings_of_the_pages_lead_somewhere(pages):
  headings = {}
  for path in [*pages, *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md"]:
    text = path.read_text(encoding="utf-8")
    lines = re.findall(r"^#+ (.*)$", text, re.M)
    headings[path.resolve()] = {
      re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines
    }
  for path in headings:
    for name, anchor in re.findall(
      r"\]\(([^)#:\s]*)#([^)]*)\)", path.read_text(encoding="utf-8")
    ):
      target = (path.parent / name).resolve() if name else path
      if target in headings:
        assert anchor in headings[target], f"{path}: {name}#{anchor}"


def test_update_writes_to_a_checkout_and_changes_nothing_that_is_current(
  pages, tmp_path, monkeypatch
):
  monkeypatch.setattr(report, "pages", lambda root: {root / "a.md": "text\n"})
  drawn = []
  monkeypatch.setattr(report, "_pictures", lambda: {"one": drawn.append})
  assert report.update(tmp_path) == [
    tmp_path / "a.md",
    tmp_path / "docs" / "pictures" / "one.png",
  ]
  assert (tmp_path / "a.md").read_text() == "text\n"
  assert drawn == [tmp_path / "docs" / "pictures" / "one.png"]


def test_a_generated_part_is_renewed_and_the_rest_is_kept(monkeypatch):
  monkeypatch.setitem(report.PARTS, "bounds", lambda: ["| new |"])
  text = "before\n<!-- begin: bounds -->\n\n| old |\n\n<!-- end: bounds -->\nafter\n"
  expected = text.replace("old", "new")
  assert report.fill(text, Path("page.md")) == expected
  assert report.fill(expected, Path("page.md")) == expected


@pytest.mark.parametrize(
  ("text", "what"),
  [
    ("<!-- begin: nonsense -->\n<!-- end: nonsense -->\n", "no generated part"),
    ("<!-- begin: bounds -->\n", "lacks <!-- end: bounds -->"),
  ],
)
def test_marks_that_do_not_fit_are_named(text, what):
  with pytest.raises(RecordError, match=rf"page\.md.*{what}"):
    report.fill(text, Path("page.md"))


# --- The commands


def test_records_of_ones_own_make_a_page_with_pictures(tmp_path, capsys):
  runs = [*make_runs(), make_run("adam", max_epochs=3)]
  write_runs(tmp_path / "runs", runs[:-1])
  write_runs(tmp_path / "runs" / "longer", runs[-1:])
  out = tmp_path / "report"
  main(["report", "--results", str(tmp_path / "runs"), "--out", str(out)])
  text = (out / "README.md").read_text()
  assert "| **SGD 0.01, best rate** | 3 | 3 |" in text
  names = sorted(path.name for path in (out / "pictures").iterdir())
  assert names == ["vgg19-width-1-2.png", "vgg19-width-1.png"]
  assert all(f"(pictures/{name})" in text for name in names)
  assert all((out / "pictures" / n).stat().st_size > 10_000 for n in names)
  assert str(out / "README.md") in capsys.readouterr().out
  # Once more, the same.
  main(["report", "--results", str(tmp_path / "runs"), "--out", str(out)])
  assert (out / "README.md").read_text() == text


def test_an_archive_is_reported_by_its_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  main(["report", "ptb_words"])
  text = (tmp_path / "out" / "report" / "README.md").read_text()
  assert "18 runs, 18 of which hit the maximum of epochs." in text
  assert "### lstm, words, softmax" in text


def test_collected_runs_give_the_tables_of_their_own_files(tmp_path, capsys):
  write_runs(tmp_path / "runs", make_runs())
  main(["collect", "mine", "--out", str(tmp_path / "runs"), "--results", str(tmp_path)])
  assert "11 added, 0 replaced; 0 runs that have not" in capsys.readouterr().out
  both = []
  for place in ("runs", "mine.jsonl"):
    out = str(tmp_path / "report")
    main(["report", "--results", str(tmp_path / place), "--out", out])
    both.append((tmp_path / "report" / "README.md").read_text())
  assert both[0] == both[1]


def test_nothing_is_written_into_tracked_results_by_default(tmp_path, monkeypatch):
  before = {path: path.read_bytes() for path in RESULTS.iterdir()}
  monkeypatch.chdir(tmp_path)
  main(["report", "rl_pendulum"])
  assert {path: path.read_bytes() for path in RESULTS.iterdir()} == before
  assert report.ReportCommand().out == Path("out/report")


def test_what_can_not_be_reported_is_refused_in_a_line(tmp_path, capsys):
  missing = str(tmp_path / "nowhere")
  assert f"no run that has ended below {missing}" in refusal(
    capsys, "report", "--results", missing
  )
  assert "report knows all, ablation" in refusal(capsys, "report", "nonsense")
  assert "not both" in refusal(capsys, "report", "arena", "--results", missing)
  assert "--update is for all" in refusal(capsys, "report", "arena", "--update")
  assert "nothing to collect" in refusal(capsys, "collect", "x", "--out", missing)
  damaged = tmp_path / "runs" / "a.jsonl"
  damaged.parent.mkdir()
  damaged.write_text('{"kind"')
  for command in (["report", "--results"], ["collect", "x", "--results", missing,
                                            "--out"]):  # fmt: skip
    assert f"{damaged} is damaged" in refusal(capsys, *command, str(damaged.parent))
  study = make_run("adam", study="width")
  write_runs(tmp_path / "studied", [study])
  assert "python -m benchmarks study NAME" in refusal(
    capsys, "report", "--results", str(tmp_path / "studied")
  )


def test_a_folder_that_can_not_be_written_is_refused_in_a_line(tmp_path, capsys):
  write_runs(tmp_path / "runs", make_runs())
  (tmp_path / "file").write_text("")
  place, runs = str(tmp_path / "file" / "below"), str(tmp_path / "runs")
  assert f"{place} can't be written" in refusal(
    capsys, "report", "--results", runs, "--out", place
  )
  assert f"{place} can't be written" in refusal(
    capsys, "collect", "x", "--out", runs, "--results", place
  )


def test_an_unknown_archive_has_no_section():
  with pytest.raises(OptionError, match="not 'nonsense'"):
    report.section("nonsense")


# --- Pictures


def tables_of(name: str) -> list[Table]:
  """The tables of one committed archive."""
  runs = records.load([records.archive(name)])
  return [table for size in by_size(runs, report._kinds()) for table in size]


def drawn(table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
  """The axes of a table's picture."""
  made = []
  with monkeypatch.context() as patch:
    patch.setattr(report.pictures.plt, "close", made.append)
    report.learning_curves(table, tmp_path / "new" / "picture.png")
  report.pictures.plt.close(made[0])
  return made[0].axes


def with_runs(table: Table, change) -> Table:
  rows = [
    dataclasses.replace(row, runs=[change(run) for run in row.runs])
    for row in table.rows
  ]
  return dataclasses.replace(table, rows=rows)


def labels(axes) -> list[str]:
  return [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_picture_is_written_and_nothing_else(tmp_path, monkeypatch):
  drawn(tables_of("tier_a")[0], tmp_path, monkeypatch)
  (path,) = (tmp_path / "new").iterdir()
  assert path.name == "picture.png"
  assert path.read_bytes().startswith(b"\x89PNG")


def test_curves_are_means_as_far_as_the_shortest_run_goes(tmp_path, monkeypatch):
  def shorten(run):
    return dataclasses.replace(run, epochs=run.epochs[: 3 + run.config["seed"]])

  table = with_runs(tables_of("tier_a")[0], shorten)
  axes = drawn(table, tmp_path, monkeypatch)[0]
  line = next(line for line in axes.lines if line.get_label() == "Alrao")
  assert table.alrao is not None
  losses = [
    [record["validation_loss"] for record in run.epochs[:3]] for run in table.alrao.runs
  ]
  assert line.get_marker() in ("", "None")
  assert line.get_xdata().tolist() == [1, 2, 3]
  np.testing.assert_allclose(line.get_ydata(), np.mean(losses, axis=0))


def test_a_single_epoch_is_a_point(tmp_path, monkeypatch):
  def shorten(run):
    return dataclasses.replace(run, epochs=run.epochs[:1])

  table = with_runs(tables_of("tier_a")[0], shorten)
  axes = drawn(table, tmp_path, monkeypatch)[0]
  assert len(axes.lines) == len(table.rows)
  assert {line.get_marker() for line in axes.lines} == {"o"}


@pytest.mark.parametrize("place", [0, 3])
def test_other_rates_have_one_label_whichever_is_best(place, tmp_path, monkeypatch):
  table = tables_of("tier_a")[0]
  best = table.sgd[place]

  def change(run):
    loss = (
      0.1 if (run.config["optimizer"], run.config["rate"]) == ("sgd", best.rate) else 9
    )
    return dataclasses.replace(run, summary={**run.summary, "validation_loss": loss})

  table = with_runs(table, change)
  assert table.best_sgd is not None
  assert table.best_sgd.rate == best.rate
  found = labels(drawn(table, tmp_path, monkeypatch)[0])
  assert found.count("SGD, other rates") == 1
  assert sum(label.startswith("SGD") for label in found) == 2


def test_what_diverges_does_not_hide_the_others(tmp_path, monkeypatch):
  """Text is cut off a little above the loss of a uniform guess."""
  table = tables_of("ptb_chars")[0]
  guess = table.rows[0].runs[0].config["chance"]
  assert guess == pytest.approx(math.log2(50))
  axes = drawn(table, tmp_path, monkeypatch)[0]
  low, high = axes.get_ylim()
  assert max(np.nanmax(line.get_ydata()) for line in axes.lines) > 1.5 * high
  assert axes.get_ylabel() == f"validation {table.kind.curve.label}"
  assert high == pytest.approx(table.kind.curve_limit * guess)
  assert low < min(np.nanmin(line.get_ydata()) for line in axes.lines)


def test_an_archives_posterior_begins_at_even_weights(tmp_path, monkeypatch):
  table = tables_of("tier_b")[0]
  axes = drawn(table, tmp_path, monkeypatch)[-1]
  assert len(axes.lines) == 10
  steps = axes.lines[0].get_xdata()
  assert steps[0] == 0 and len(steps) == 11
  assert [line.get_ydata()[0] for line in axes.lines] == [0.1] * 10
  assert np.all(np.diff(steps)[1:] == np.diff(steps)[1])


def test_a_table_is_drawn_from_runs_own_files_with_all_their_posteriors(
  tmp_path, monkeypatch
):
  ((table,),) = by_size(json_round_trip(make_runs(), tmp_path), report._kinds())
  axes = drawn(table, tmp_path, monkeypatch)[-1]
  assert axes.lines[0].get_xdata().tolist() == [0, 3, 4, 7]


def json_round_trip(runs: list[Run], tmp_path: Path) -> list[Run]:
  write_runs(tmp_path / "runs", runs)
  found = records.load([tmp_path / "runs"])
  assert json.loads(json.dumps(found[0].summary)) == found[0].summary
  return found
