"""Settings and fixtures that all tests share."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Before JAX starts. Tests compile far more than they compute: emitting fusions through
# MLIR takes half the time of compiling, and cutting small programs into parts some of
# it. An XLA that has no other way to emit them overlooks the first.
os.environ["XLA_FLAGS"] = " ".join(
  (
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    "--xla_cpu_parallel_codegen_split_count=1",
    os.environ.get("XLA_FLAGS", ""),
  )
)

import jax  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

# Strict for the whole suite: an implicit broadcast of ranks or promotion of dtypes in
# the library is an error here, long before it is a wrong number somewhere else. Before
# any test module is imported, so that module-level code in tests obeys it too.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Several simulated devices, for the tests of sharding; all others use the first.
jax.config.update("jax_num_cpu_devices", 4)

# Without LLVM's optimizations, compiling takes half the time.
jax.config.update("jax_disable_most_optimizations", True)
# Nobody reads which line of Python an operation came from.
jax.config.update("jax_traceback_in_locations_limit", 0)

# Many tests compile the same small programs: JAX's persistent cache, shared by the
# workers of one run, saves a third of the suite's time. It is thrown away at the end,
# unless JAX_COMPILATION_CACHE_DIR names a folder to keep.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  cache = tempfile.mkdtemp(prefix="alrao-jax-tests-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = cache  # for workers and subprocesses
  atexit.register(shutil.rmtree, cache, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled():
  """Frees what a module has compiled, of which a process else gathers gigabytes."""
  yield
  jax.clear_caches()


def pytest_collection_modifyitems(items):
  """Skips tests marked `gpu` where JAX finds no accelerator."""
  marked = [item for item in items if item.get_closest_marker("gpu")]
  if marked and jax.default_backend() == "cpu":
    for item in marked:
      item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


def _existing(path: Path, what: str) -> Path:
  if not path.is_dir():
    pytest.skip(f"no {what} at {path} (set ALRAO_DATA_DIR to the folder that holds it)")
  return path


@pytest.fixture(scope="session")
def data_dir() -> Path:
  """The folder of real data sets: ALRAO_DATA_DIR, or shared/data beside the project."""
  default = ROOT.parent / "shared" / "data"
  return _existing(Path(os.environ.get("ALRAO_DATA_DIR") or default), "data folder")


@pytest.fixture(scope="session")
def cifar10_dir(data_dir: Path) -> Path:
  return _existing(data_dir / "cifar10", "CIFAR-10")


@pytest.fixture(scope="session")
def ptb_dir(data_dir: Path) -> Path:
  return _existing(data_dir / "ptb", "Penn Treebank")


@pytest.fixture(scope="session")
def imagenette_dir(data_dir: Path) -> Path:
  return _existing(data_dir / "imagenette128", "Imagenette")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
  """Traces of the reference implementation, in shared/golden beside the project."""
  path = ROOT.parent / "shared" / "golden"
  if not path.is_dir():
    pytest.skip(f"no reference traces at {path}")
  return path
