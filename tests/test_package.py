"""What importing the package does and does not do."""

import ast
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "alrao_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAY_IMPORT_FLAX = {"linen.py", "nnx.py"}


def imported_packages(path: Path) -> set[str]:
  """Top-level names of all packages that a file imports, in functions too."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
      names.add(node.module.split(".")[0])
  return names


def run_python(code: str) -> str:
  """Runs code in a fresh interpreter on CPU; returns what it printed."""
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(PACKAGE.parent),
  }
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", code],
    capture_output=True,
    text=True,
    env=environment,
    cwd=PACKAGE.parent,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout + done.stderr


@pytest.mark.parametrize(
  "path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_only_the_flax_modules_import_flax(path):
  imports_flax = "flax" in imported_packages(path)
  assert not imports_flax or path.relative_to(PACKAGE).parts[0] in MAY_IMPORT_FLAX


def test_core_depends_on_jax_optax_and_numpy_only():
  allowed = {"jax", "optax", "numpy", "alrao_jax", "flax"} | sys.stdlib_module_names
  found = {name for path in MODULES for name in imported_packages(path)}
  assert found <= allowed


def test_import_prints_nothing():
  assert run_python("import alrao_jax") == ""


def test_import_does_not_import_flax():
  run_python("import alrao_jax, sys; assert 'flax' not in sys.modules")


def test_import_loads_nothing_beyond_jax_and_optax():
  found = run_python(
    "import sys, jax, optax\n"
    "before = set(sys.modules)\n"
    "import alrao_jax\n"
    "new = set(sys.modules) - before\n"
    "print(sorted(n for n in new if n.partition('.')[0] != 'alrao_jax'))"
  )
  assert found == "[]\n"


def test_import_leaves_the_jax_configuration_alone():
  run_python(
    "import jax, optax\n"
    "before = dict(jax.config.values)\n"
    "import alrao_jax\n"
    "assert dict(jax.config.values) == before"
  )


def test_import_starts_no_backend_and_so_allocates_nothing_on_a_device():
  # The number of CPU devices may only be set while no backend has been started.
  run_python(
    "import alrao_jax, alrao_jax.linen, alrao_jax.nnx, jax\n"
    "jax.config.update('jax_num_cpu_devices', 3)\n"
    "assert len(jax.devices()) == 3 and not jax.live_arrays()"
  )


def test_names_exported_are_public_and_documented():
  import alrao_jax

  names = [name for name in vars(alrao_jax) if not name.startswith("_")]
  missing = [
    name
    for name in names
    if callable(getattr(alrao_jax, name)) and not getattr(alrao_jax, name).__doc__
  ]
  assert not missing


def test_version_is_the_distributions():
  import alrao_jax

  try:
    installed = metadata.version("alrao-jax")
  except metadata.PackageNotFoundError:
    pytest.skip("alrao-jax is not installed here, only on the path")
  assert alrao_jax.__version__ == installed
