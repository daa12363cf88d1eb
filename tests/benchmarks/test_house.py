"""The house of the benchmarks: arrows point down, and a name has one meaning."""

import ast
import collections
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "benchmarks"
# From the roof to the ground; a file imports from its own floor or from below.
FLOORS = (
  ("__main__",),
  ("report",),
  ("studies", "costs"),
  ("suites",),
  ("workloads",),
  ("training", "standings", "tables"),
  ("methods", "records", "console", "pictures", "timing"),
  ("models", "data"),
)
FILES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[tuple[str, ...]]:
  """What a file imports from the benchmarks, as paths of names."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
      "benchmarks"
    ):
      parts = tuple((node.module or "").split("."))[1:]
      found |= {parts + (alias.name,) for alias in node.names}
    if isinstance(node, ast.Import):
      names = [alias.name.split(".") for alias in node.names]
      found |= {tuple(parts[1:]) for parts in names if parts[0] == "benchmarks"}
  return {parts for parts in found if parts}


def room(path: Path) -> str:
  return path.relative_to(ROOT).with_suffix("").parts[0]


def test_every_file_stands_in_a_room():
  known = {name for floor in FLOORS for name in floor} | {"__init__"}
  assert {room(path) for path in FILES} <= known


def test_arrows_point_down():
  floor = {name: i for i, floor in enumerate(FLOORS) for name in floor}
  wrong = {
    (path.relative_to(ROOT).as_posix(), ".".join(parts))
    for path in FILES
    if room(path) != "__init__"
    for parts in imports(path)
    if floor.get(parts[0], 99) < floor[room(path)]
  }
  assert not wrong


def test_no_circles():
  modules = {path.relative_to(ROOT).with_suffix("").parts: path for path in FILES}
  modules = {
    parts[:-1] if parts[-1] == "__init__" else parts: path
    for parts, path in modules.items()
  }
  arrows = {
    one: {
      next((p for p in (parts, parts[:-1]) if p in modules), ())
      for parts in imports(path)
    }
    - {(), one}
    for one, path in modules.items()
  }
  done: set[tuple[str, ...]] = set()

  def visit(one: tuple[str, ...], above: tuple[tuple[str, ...], ...]) -> None:
    assert one not in above, " -> ".join(map(".".join, (*above, one)))
    if one not in done:
      for other in arrows[one]:
        visit(other, (*above, one))
      done.add(one)

  for one in arrows:
    visit(one, ())


def test_a_name_has_one_meaning():
  classes, names = collections.Counter(), collections.Counter()
  for path in FILES:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes.update(node.name for node in tree.body if isinstance(node, ast.ClassDef))
    names[path.stem] += 1
  names.update(path.name for path in ROOT.rglob("*") if any(path.glob("*.py")))
  del names["__init__"]
  assert [name for name, count in classes.items() if count > 1] == []
  assert [name for name, count in names.items() if count > 1] == []
