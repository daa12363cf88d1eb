"""The README's code runs as it stands there."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


def code_blocks() -> list[str]:
  return re.findall(r"^```python\n(.*?)^```", README.read_text(), re.S | re.M)


def test_quick_start_runs_and_learns(capsys):
  blocks = code_blocks()
  assert blocks
  names: dict = {}
  for block in blocks:
    exec(compile(block, str(README), "exec"), names)
  (accuracy,) = re.findall(r"training accuracy: (\S+)", capsys.readouterr().out)
  assert float(accuracy) > 0.95


def test_files_that_the_readme_names_exist():
  linked = re.findall(r"\]\(([^)#:]+)\)", README.read_text())
  assert linked
  for name in linked:
    assert (README.parent / name).exists(), name


@pytest.mark.parametrize("target", re.findall(r"`make (\w+)", README.read_text()))
def test_commands_that_the_readme_names_are_make_targets(target):
  makefile = (README.parent / "Makefile").read_text()
  assert re.search(rf"^{target}:", makefile, re.M)
