"""The command line: what it starts, and what it says of what can't be."""

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from training_cases import quiet

from benchmarks import __main__ as command
from benchmarks import costs, records, suites, training
from benchmarks.console import OutputError, writing_to
from benchmarks.costs import memory
from benchmarks.suites import _suite
from benchmarks.suites.cifar10 import Cifar10, ImageOptions

ROOT = Path(__file__).resolve().parents[2]
TINY = (
  "--dataset digits --network mlp --width 0.0625 --num-train 64 --num-validation 16 "
  "--num-test 16 --max-epochs 2"
).split()
OPTIONS = ImageOptions(
  dataset="digits",
  network="mlp",
  width=1 / 16,
  num_train=64,
  num_validation=16,
  num_test=16,
  max_epochs=2,
)
MAKE_WORKLOAD = Cifar10._make_workload


@pytest.fixture(autouse=True)
def _standard_promotion():
  # Other libraries' optimizers are not written for strict promotion.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture(autouse=True)
def _one_workload(monkeypatch):
  """All runs share their workloads: tracing one takes seconds, training it none."""
  monkeypatch.setattr(Cifar10, "_make_workload", make_workload)


@functools.cache
def made(options):
  return MAKE_WORKLOAD(Cifar10(), options)


def make_workload(suite, options):
  return made(dataclasses.replace(options, seed=0, rate=None))


@pytest.fixture
def run_main(monkeypatch, tmp_path, capsys):
  """Runs the command line in this process; returns its exit code and what it said."""
  monkeypatch.setenv("ALRAO_CACHE_DIR", str(tmp_path / "cache"))
  monkeypatch.chdir(tmp_path)
  before = jax.config.jax_compilation_cache_dir

  def run(*arguments: str) -> tuple[int, str]:
    code = 0
    try:
      command.main(arguments)
    except SystemExit as stopped:
      assert isinstance(stopped.code, int)
      code = stopped.code
    finally:
      jax.config.update("jax_compilation_cache_dir", before)
    found = capsys.readouterr()
    return code, found.err if code else found.out

  return run


def one_line(said: str) -> bool:
  return said.startswith("error: ") and said.count("\n") == 1


def test_every_name_is_listed(run_main):
  code, said = run_main("list")
  assert code == 0
  for name in (*suites.names(), *costs.names()):
    assert f"  {name} " in said
  assert "The papers' main table" in said


def test_without_a_command_there_is_help(run_main):
  assert run_main()[1] == run_main("--help")[1]
  assert "python -m benchmarks sweep SUITE" in run_main()[1]


@pytest.mark.parametrize(
  ("arguments", "text"),
  [
    (["train"], "the command must be one of list, run, sweep, study, cost, report"),
    (["run"], "run must be followed by one of arena, cifar10, imagenet, ptb"),
    (["sweep", "chess"], "q_learning, got chess."),
    (["run", "cifar10", "--width", "0"], "--width must be positive, got 0.0."),
    (["run", "cifar10", "--optimizer", "sgd"], "--rate must be positive for --opt"),
    (["run", "cifar10", "--rate", "0.1"], "--rate must be left out for --optimizer al"),
    (["run", "cifar10", *TINY, "--num-train", "9999"], "--num-train"),
    (["run", "cifar10", *TINY, "--batch-size", "9999"], "--batch-size must be at most"),
    (
      ["run", "cifar10", *TINY, "--seed", "9" * 27],
      "--seed must be from 0 to 2^32 - 1",
    ),
    (["run", "cifar10", "--data-dir", "/nowhere"], "no CIFAR-10 below /nowhere"),
    (["sweep", "cifar10", "--networks", "nonsense"], "nonsense"),
    (["sweep", "arena", "--seeds", str(2**32 + 1)], "--seeds must be at least 1, at m"),
    (["study", "width", "--seeds", "1"], "--seeds must be at least 2, at most 2^32"),
    (["run", "arena", "--seed", "-1"], "--seed must be from 0 to 2^32 - 1, got -1."),
  ],
)
def test_bad_options_and_data_are_a_line_and_exit_with_2(run_main, arguments, text):
  code, said = run_main(*arguments)
  assert code == 2
  assert text in said
  assert one_line(said)


def test_an_unknown_method_exits_with_2(run_main):
  code, said = run_main("run", "cifar10", "--optimizer", "nonsense")
  assert code == 2
  assert "nonsense" in said


def test_interrupt_says_how_to_go_on(run_main, monkeypatch):
  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(_suite, "sweep", interrupted)
  code, said = run_main("sweep", "cifar10")
  assert code == 130
  assert "goes on after the last checkpoint" in said


@pytest.mark.slow
def test_a_cost_is_measured_written_and_shown(run_main):
  options = (
    "--features 2 --num-classes 3 --batch-size 4 --chunks 1 2 --rounds 1".split()
  )
  code, said = run_main("cost", "memory", *options)
  assert code == 0
  assert "### Output layer of 3 classes on 2 features, batch 4" in said
  (record,) = records.load_costs([Path("out/costs")])
  assert costs.table(record) in said
  code, said = run_main("cost", "memory", "--chunks", "3")
  assert code == 2
  assert one_line(said)
  assert "--chunks must divide --batch-size 128" in said


def test_an_interrupted_cost_has_no_checkpoint(run_main, monkeypatch):
  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(memory, "compare", interrupted)
  code, said = run_main("cost", "memory")
  assert code == 130
  assert "measures anew" in said


# --- Where results go


@pytest.mark.parametrize(
  ("out", "reason"),
  [
    ("file", "File exists"),
    ("file/below", "Not a directory"),
    ("/proc/nope", "No such file or directory"),
    ("x" * 300, "File name too long"),
    pytest.param(
      "/sys/kernel/nope",
      "",
      marks=pytest.mark.skipif(sys.platform != "linux", reason="of Linux"),
    ),
  ],
)
@pytest.mark.parametrize("name", ["run", "sweep"])
def test_out_that_can_not_be_written_is_a_line(run_main, name, out, reason):
  Path("file").write_text("x")
  arguments = TINY if name == "run" else []
  code, said = run_main(name, "cifar10", *arguments, "--out", out)
  assert code == 2
  assert one_line(said)
  assert said.startswith(f"error: --out {out[:200]}")
  assert reason in said and "give another folder" in said
  assert len(said) < 400


def command_line(*arguments, cache, start=("-m", "benchmarks")):
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "ALRAO_CACHE_DIR": str(cache)}
  return subprocess.Popen(
    [sys.executable, *start, *map(str, arguments)],
    env=environment,
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


@pytest.mark.slow
@pytest.mark.parametrize("size", [100, 20_000])
def test_a_disk_that_is_full_is_a_line(tmp_path, size):
  """As files can't grow beyond a limit: the records, or the checkpoint."""

  limited = (
    "import resource, runpy\n"
    f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
    "runpy.run_module('benchmarks', run_name='__main__')"
  )
  out = tmp_path / "out"
  process = command_line(
    *("run", "cifar10", *TINY, "--out", out),
    cache=tmp_path / "cache",
    start=("-c", limited),
  )
  _, said = process.communicate(timeout=300)
  last = said.strip().splitlines()[-1]
  assert process.returncode == 2
  assert "Traceback" not in said
  assert last.startswith("error: ")
  assert "can't be written" in last and "out" in last


@pytest.mark.slow
def test_a_second_process_is_told_that_a_folder_is_in_use(tmp_path):
  out = tmp_path / "out"
  with writing_to(out):
    process = command_line("run", "cifar10", *TINY, "--out", out, cache=tmp_path / "c")
    _, said = process.communicate(timeout=300)
  assert process.returncode == 2
  assert said.strip().splitlines()[-1] == (
    f"error: --out {out} is in use by another process; wait for it, or give another "
    "folder."
  )
  assert list(out.iterdir()) == []


def test_a_folder_is_free_again_however_its_process_ended(tmp_path):
  script = (
    "import os, pathlib, sys; from benchmarks.console import writing_to\n"
    "with writing_to(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
  )
  killed = subprocess.run(
    [sys.executable, "-c", script, str(tmp_path)],
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    check=False,
  )
  assert killed.returncode == -signal.SIGKILL
  assert [path.name for path in tmp_path.iterdir()] == [".lock"]
  with writing_to(tmp_path):
    with pytest.raises(OutputError, match="is in use by another process"):
      with writing_to(tmp_path):
        pass
  assert list(tmp_path.iterdir()) == []
  with pytest.raises(ZeroDivisionError), writing_to(tmp_path):
    raise ZeroDivisionError
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_a_kill_left_half_written_is_removed(run_main):
  Path("out/.part-abc").mkdir(parents=True)
  Path("out/.part-abc/run.jsonl").write_text("{")
  Path("out/mine").mkdir()
  assert run_main("run", "cifar10", *TINY, "--out", "out")[0] == 0
  names = sorted(path.name for path in Path("out").iterdir())
  assert len(names) == 2 and names[1] == "mine"


def test_errors_of_other_files_are_not_those_of_the_folder(tmp_path):
  with pytest.raises(FileNotFoundError), writing_to(tmp_path / "out"):
    (tmp_path / "elsewhere" / "file").write_text("")
  with pytest.raises(OutputError, match="No such file"), writing_to(tmp_path / "out"):
    (tmp_path / "out" / "nowhere" / "file").write_text("")


# --- What is read to go on


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
  """The folder of a run interrupted after its first epoch."""
  plan = Cifar10().plan(OPTIONS, tmp_path_factory.mktemp("begun") / "out")
  workload = made(OPTIONS)
  batches = workload.batches

  def interrupt(seed, epoch):
    if epoch == 2:
      raise KeyboardInterrupt
    return batches(seed, epoch)

  workload.batches = interrupt
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    with pytest.raises(KeyboardInterrupt):
      training.train(workload, plan, quiet())
  workload.batches = batches
  return plan.out


@pytest.fixture
def begun(tmp_path, interrupted):
  """A run interrupted after its first epoch: the suite, its plan, its checkpoint."""
  suite = Cifar10()
  plan = suite.plan(OPTIONS, tmp_path / "out")
  shutil.copytree(interrupted, plan.out)
  return suite, plan, plan.checkpoints


def halve(path: Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0xFF
  path.write_bytes(content)


def largest(folder: Path) -> Path:
  files = [path for path in folder.rglob("*") if path.is_file()]
  return max((p for p in files if "leaves" in str(p)), key=lambda p: p.stat().st_size)


def notes_of(folder: Path) -> Path:
  (notes,) = [p for p in folder.rglob("metadata") if "notes" in str(p) and p.is_file()]
  return notes


DAMAGES = {
  "half a file": lambda folder: halve(largest(folder)),
  "an empty file": lambda folder: largest(folder).write_bytes(b""),
  "a missing file": lambda folder: largest(folder).unlink(),
  "no description": lambda folder: next(folder.rglob("_METADATA")).unlink(),
  "another byte": lambda folder: flip(largest(folder)),
  "notes that are empty": lambda folder: notes_of(folder).write_text("{}"),
  "notes that are no JSON": lambda folder: notes_of(folder).write_text("{"),
  "notes of another run": lambda folder: notes_of(folder).write_text(
    notes_of(folder).read_text().replace("1", "2")
  ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_a_line_that_says_what_to_do(begun, damage, run_main):
  suite, plan, folder = begun
  DAMAGES[damage](folder)
  code, said = run_main("run", "cifar10", *TINY, "--out", str(plan.out), "--resume")
  assert code == 2
  assert one_line(said)
  assert str(folder) in said
  assert "delete this folder, or run without --resume" in said
  assert records.read_summary(plan.path) is None


@pytest.mark.parametrize("damage", ["half a file", "notes that are no JSON"])
def test_a_sweep_starts_a_run_with_a_damaged_checkpoint_anew(begun, damage, capsys):
  suite, plan, folder = begun
  DAMAGES[damage](folder)
  preset = _suite.Preset((OPTIONS,), ("alrao",), num_seeds=1)
  from benchmarks.console import Display

  (summary,) = _suite.sweep(preset, suite, plan.out, Display())
  assert summary["epochs"] == 2
  said = capsys.readouterr().out
  assert str(folder) in said and "Starting this run anew." in said
  assert [path.name for path in plan.out.iterdir()] == [plan.path.name]


def test_a_checkpoint_of_another_network_is_told(begun):
  suite, plan, folder = begun
  other = suite.workload(ImageOptions(**{**vars(OPTIONS), "width": 1 / 8}))
  with pytest.raises(training.CheckpointError, match="of another network or optimizer"):
    training.train(other, plan, quiet())


def test_without_resume_a_damaged_checkpoint_is_no_matter(begun, run_main):
  suite, plan, folder = begun
  DAMAGES["half a file"](folder)
  assert run_main("run", "cifar10", *TINY, "--out", str(plan.out))[0] == 0


@pytest.mark.parametrize(
  "content", [b"\xff\xfe{}\n", b'{"kind": "summary"}\n', b'{"kind"', b"[1]\n"]
)
def test_damaged_records_are_a_line(run_main, content, tmp_path):
  path = Cifar10().plan(OPTIONS, tmp_path / "out").path
  path.parent.mkdir()
  path.write_bytes(content)
  code, said = run_main("run", "cifar10", *TINY, "--out", "out", "--resume")
  assert code == 2
  assert path.name in said
  assert one_line(said)
  assert run_main("run", "cifar10", *TINY, "--out", "out")[0] == 0


def test_the_checkpoint_of_a_run_that_had_ended_is_removed(begun, run_main):
  suite, plan, folder = begun
  kept = plan.out / "kept"
  folder.rename(kept)
  training.train(suite.workload(OPTIONS), plan, quiet())
  folder.parent.mkdir(exist_ok=True)
  kept.rename(folder)  # as a kill between the summary and the end leaves it
  code, _ = run_main("run", "cifar10", *TINY, "--out", str(plan.out), "--resume")
  assert code == 0
  assert [path.name for path in plan.out.iterdir()] == [plan.path.name]


def swallows(then):
  """Work that loses an interrupt, as a finaliser that runs just then does."""
  with contextlib.suppress(KeyboardInterrupt):
    signal.raise_signal(signal.SIGINT)
  then()


@pytest.mark.parametrize(
  "then", [lambda: [time.sleep(0.01) for _ in range(3000)], lambda: None]
)
def test_an_interrupt_that_was_swallowed_comes_again(monkeypatch, capsys, then):
  monkeypatch.setattr(command._Interrupt, "again", 0.1)
  cache = jax.config.jax_compilation_cache_dir
  before = signal.getsignal(signal.SIGINT)
  with pytest.raises(SystemExit) as error:
    command._run(lambda *_: lambda: swallows(then), "run", [])
  jax.config.update("jax_compilation_cache_dir", cache)
  assert error.value.code == 130
  assert "interrupted" in capsys.readouterr().err
  assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.7, 1.5, 2.5])
def test_an_interrupt_while_it_starts_is_a_line(tmp_path, seconds):
  # A job in the background ignores interrupts, and so would its children.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  process = command_line(
    "run", "cifar10", *TINY, "--out", tmp_path / "out", cache=tmp_path / "cache"
  )
  signal.signal(signal.SIGINT, before)
  time.sleep(seconds)
  process.send_signal(signal.SIGINT)
  _, said = process.communicate(timeout=300)
  assert process.returncode == 130
  assert "Traceback" not in said
  assert "interrupted" in said.strip().splitlines()[-1]
