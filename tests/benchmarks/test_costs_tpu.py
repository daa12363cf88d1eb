"""Programs compiled for TPUs: their structure, the command, and what it keeps."""

import importlib.metadata
import os
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks import __main__, costs, records
from benchmarks.console import OptionError
from benchmarks.costs import tpu
from benchmarks.costs._contenders import ImageNetwork
from benchmarks.costs._hlo import Program
from benchmarks.costs.tpu import TPU, Target

NETWORK = ImageNetwork("mlp", 1 / 32, 8, 6, 1, norm="none")
NUM_HEADS = 4
ONE, FOUR = Target("v5e:1x1", (1, 1), NUM_HEADS), Target("v5e:2x2", (2, 2), NUM_HEADS)
FORBIDDEN = re.compile(r"infeed|outfeed|send|recv|callback|host", re.IGNORECASE)


def has_libtpu():
  try:
    importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    return False
  return True


needs_libtpu = pytest.mark.skipif(
  not has_libtpu(), reason="needs libtpu: pip install 'jax[tpu]'"
)


def trace(method, target, network=NETWORK, **options):
  rows, _ = target.mesh
  chips = tpu.describe(target.topology)
  network = network._replace(batch_size=network.batch_size * rows)
  with tpu.tracing_for_tpu():
    shapes = tpu.shapes_of(network, method, target.num_heads)
    return shapes, tpu.trace(shapes, target, chips, **options)


@pytest.fixture(scope="module")
def compiled():
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # workers of one run of the tests
  found = {}
  for name, method, target in (
    ("sgd", "sgd", ONE),
    ("alrao", "alrao", ONE),
    ("sharded", "alrao", FOUR),
  ):
    shapes, traced = trace(method, target)
    step = traced.lower().compile()
    found[name] = shapes, step, Program(step.as_text())
  return found


# --- Structure


@needs_libtpu
@pytest.mark.slow
def test_heads_add_no_product_to_a_step_on_tpus(compiled):
  """One product forwards for all heads, two backwards, as of an output layer."""
  counts = {}
  for name, (_, _, program) in compiled.items():
    usual = {call.computation for call in program.calls()}
    called = [
      inner for call in program.calls() for inner in call.instruction.calls("calls")
    ]
    products = sum(
      one.opcode in ("convolution", "dot")
      for computation in {*usual, *called}
      for one in program.computation(computation)
    )
    counts[name] = products
  assert counts == {"sgd": 8, "alrao": 8, "sharded": 8}


@needs_libtpu
@pytest.mark.slow
def test_a_step_on_tpus_is_one_program_without_the_host(compiled):
  for _, step, program in compiled.values():
    opcodes = {one.opcode for one in program.instructions()}
    assert not [opcode for opcode in opcodes if FORBIDDEN.search(opcode)]
    targets = re.findall(r'custom_call_target="(\w+)"', step.as_text())
    assert not [target for target in targets if FORBIDDEN.search(target)]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["alrao", "sharded"])
def test_switch_mixture_and_rates_are_in_the_program_on_tpus(compiled, name):
  shapes, step, program = compiled[name]
  state, outputs = step.out_info
  assert jax.tree.structure(state) == jax.tree.structure(shapes.state)
  posterior = state.opt_state[-1]
  assert posterior.log_weights.dtype == jnp.float32
  assert outputs["head_weights"].shape == (NUM_HEADS,)
  # What the switch computes with is float32, too: nothing of the heads' number alone is
  # narrower.
  narrow = [
    one.name
    for one in program.instructions()
    for array in one.results
    if array.shape == (NUM_HEADS,) and array.dtype in ("bf16", "f16")
  ]
  assert not narrow


@needs_libtpu
@pytest.mark.slow
def test_no_head_is_gathered_on_tpus(compiled):
  _, _, program = compiled["sharded"]
  # A chip never has more than its own part of the heads. (XLA may divide their update
  # among the chips that have the same ones.)
  assert all(
    array.shape[:1] != (NUM_HEADS,) or len(array.shape) < 2
    for one in program.instructions()
    for array in one.results
  )


@needs_libtpu
@pytest.mark.slow
def test_the_posterior_is_computed_on_every_chip(compiled):
  """One message for the heads' report; the switch itself sends none."""
  _, _, program = compiled["sharded"]
  numbers = [
    call.instruction.name
    for call in program.calls()
    if call.instruction.opcode.startswith("all-reduce")
    and all(
      array.dtype == "f32" and not array.shape for array in call.instruction.results
    )
  ]
  assert not numbers


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "alrao", "sharded"])
def test_the_whole_state_is_donated_on_tpus(compiled, name):
  """Each array of the state that is read is written in place."""
  shapes, step, program = compiled[name]
  read = sum(
    one.opcode == "parameter" for one in program.computation(program.entry)
  ) - len(jax.tree.leaves((shapes.data, shapes.batch)))
  header = (step.as_text() or "").split("entry_computation_layout")[0]
  # Dropout's key is not read here.
  assert len(re.findall(r"(?:may|must)-alias", header)) in (read, read + 1)


@needs_libtpu
@pytest.mark.slow
def test_a_loop_of_many_steps_is_one_program_on_tpus():
  """As accelerators run an epoch: the step is the body of one loop."""
  _, traced = trace("alrao", ONE, steps=5)
  program = Program(traced.lower().compile().as_text() or "")
  loops = [call for call in program.calls() if call.instruction.opcode == "while"]
  assert len(loops) == 1
  assert program.counts().operations > 0


def test_a_step_is_lowered_for_cuda(monkeypatch):
  """The same step as StableHLO, on any machine."""
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  programs = {}
  for method in ("sgd", "alrao"):
    shapes = tpu.shapes_of(NETWORK, method, NUM_HEADS)
    loop = tpu.Loop(shapes.step)  # on accelerators it scans
    stacked = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((5, *x.shape), x.dtype), shapes.batch
    )
    traced = loop.trace(shapes.state, shapes.data, stacked)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    programs[method] = text
    donated = len(re.findall(r"tf\.aliasing_output|jax\.buffer_donor", text))
    assert donated == len(jax.tree.leaves(shapes.state))
    assert not re.findall(r"infeed|outfeed|callback|stablehlo\.(?:send|recv)", text)
    assert text.count("stablehlo.while") >= 1
    assert loop.num_traces == 1
  products = {m: p.count("stablehlo.dot_general") for m, p in programs.items()}
  # Two more at most are in the branch that runs only where a head diverges.
  assert products["alrao"] <= products["sgd"] + 2
  assert f"tensor<{NUM_HEADS}xf32>" in programs["alrao"]
  assert not re.search(r"xb?f16>", programs["alrao"])


# --- Bad input


def test_without_libtpu_a_line_says_what_to_install(monkeypatch, capsys):
  def version(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "version", version)
  with pytest.raises(SystemExit) as stopped:
    __main__.main(["cost", "tpu"])
  assert stopped.value.code == 2
  assert capsys.readouterr().err == (
    "error: cost tpu needs libtpu: install it with `pip install 'jax[tpu]'`.\n"
  )


@needs_libtpu
@pytest.mark.parametrize("topology", ["v9:2x2", "v5e:3x5", "nonsense", ""])
def test_unknown_topologies_are_refused(topology):
  with pytest.raises(OptionError, match="--topologies must be names and sizes such as"):
    TPU(topologies=(topology,)).check()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"networks": ("nonsense",)}, "--networks knows mlp, .* not .'nonsense'."),
    ({"methods": ("nonsense",)}, "--methods knows .* not .'nonsense'."),
    ({"batch": 0}, "--batch must be at least 1, got 0"),
    ({"mesh_heads": 3}, "--mesh-heads must divide the 8 chips of v5e:2x4, got 3."),
  ],
)
def test_other_options_are_refused(options, message, monkeypatch):
  monkeypatch.setattr(tpu, "describe", lambda topology: [None] * 8)
  with pytest.raises(OptionError, match=message):
    TPU(topologies=("v5e:2x4",), **options).check()


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (RuntimeError("JAX TPU support not installed"), "libtpu can't be loaded .JAX TPU"),
    (jax.errors.JaxRuntimeError("ABORTED: in use"), "another process may use it"),
  ],
)
def test_a_libtpu_that_does_not_start_is_told(error, message, monkeypatch):
  def fail(*_):
    raise error

  monkeypatch.setattr(tpu, "versions", dict)
  monkeypatch.setattr(tpu.topologies, "get_topology_desc", fail)
  with pytest.raises(OptionError, match=message):
    tpu.describe("v5e:1x1")


# --- Records


def fake_row(network, target, method):
  factor = 1 if method == "sgd" else 2
  names = ("operations", "traffic", "arguments", "temporaries", "peak", "cycles")
  counted = {name: factor * 1e6 for name in names}
  counted |= {"kernels": 7, "sent": 5e5, "collectives": {"all-reduce": [3, 5e5]}}
  return {
    "key": list(tpu.key_of(network, target, method)),
    "topology": target.topology,
    "mesh": list(target.mesh),
    "method": method,
    "label": method.upper(),
    "num_heads": 10 if factor == 2 else None,
    "batch": network.batch_size,
    "parameter_bytes": factor * 1e5,
    "counted": counted,
    "predicted": {name: 1e6 for name in (*names, "sent")},
    "compile_seconds": factor * 3.0,
    "versions": tpu.versions(),
    **records.now(),
  }


@pytest.fixture
def faked(monkeypatch):
  compiled = []

  def compile_row(network, target, method):
    compiled.append((target.topology, method))
    return fake_row(network, target, method)

  monkeypatch.setattr(tpu, "compile_row", compile_row)
  monkeypatch.setattr(tpu, "describe", lambda topology: [None] * 8)
  monkeypatch.setattr(tpu, "versions", lambda: {"jax": "1", "libtpu": "2"})
  monkeypatch.setattr(jax.config, "update", lambda *_: None)
  return compiled


def test_what_is_compiled_is_kept_and_not_compiled_again(faked, tmp_path):
  options = {"networks": ("mlp",), "out": tmp_path / "out"}
  TPU(topologies=("v5e:2x4",), methods=("sgd", "alrao"), **options)()
  assert faked == [("v5e:2x4", "sgd"), ("v5e:2x4", "alrao")]
  TPU(topologies=("v5e:2x4", "v6e:2x4"), methods=("alrao",), **options)()
  assert faked[2:] == [("v6e:2x4", "alrao")]
  (record,) = records.load_costs([tmp_path / "out"])
  title, _, header, _, *rows, _, conditions = costs.table(record).splitlines()
  assert title == "### mlp, width 1, batch 128, compiled for TPUs"
  assert [row.count(" | ") for row in rows] == 3 * [header.count(" | ")]
  assert rows[1].startswith(
    "| v5e:2x4 | 8x1 | 128 | ALRAO, 10 heads | 2.000 | 2.000 | 2.000 | 1.667 | 2.000 |"
    " 7 | 3 all-reduce, 0.50 MB | 6 | 2.00 | 0.500 |"
  )
  assert rows[2].startswith("| v6e:2x4 | 8x1 | 128 | ALRAO, 10 heads |  |")  # no SGD
  assert "jax 1," in conditions and "libtpu 2," in conditions


def test_another_version_compiles_anew(faked, tmp_path, monkeypatch):
  options = {"networks": ("mlp",), "methods": ("sgd",), "out": tmp_path / "out"}
  TPU(topologies=("v5e:2x4",), **options)()
  monkeypatch.setattr(tpu, "versions", lambda: {"jax": "1", "libtpu": "3"})
  TPU(topologies=("v5e:2x4",), **options)()
  assert len(faked) == 2


def test_the_summary_has_a_row_for_each_network_and_its_chips(faked, tmp_path):
  TPU(networks=("decoder", "mlp"), topologies=("v5e:2x4",), out=tmp_path / "out")()
  found = records.load_costs([tmp_path / "out"])
  header, _, *rows, _, conditions = tpu.summary(found)
  assert header.startswith("| network | chips | mesh | Adam |")
  assert [row.split(" | ")[0] for row in rows] == [
    "| mlp, width 1, batch 128",
    "| decoder, 50 characters, 20 streams of 128",
  ]
  cells = " | 2.00 / 2.00 / 2.00 / 2.00" * 3
  assert rows[0].endswith(f"| v5e:2x4 | 8x1{cells} |")
  assert "libtpu 2" in conditions
