"""The predicted cost of a step: counts by hand, and XLA's own."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks import costs, records
from benchmarks.console import OptionError
from benchmarks.costs import predicted
from benchmarks.costs.predicted import Setup

SETUP = Setup("mlp", 1 / 16, 6, 10, 4, 8)
SPLIT = dataclasses.replace(SETUP, mesh=(2, 2), optimizer="alrao_momentum")


def counted(function, *args, of=predicted.operations):
  return predicted.count(jax.make_jaxpr(function)(*args).jaxpr, of)


def test_product_takes_two_operations_an_entry_and_summand():
  a, b = jnp.ones((5, 3, 4)), jnp.ones((5, 4, 7))
  assert counted(lambda a, b: a @ b, a, b) == 2 * 5 * 3 * 4 * 7


@pytest.mark.parametrize(
  "options",
  [
    {"window_strides": (1, 1), "padding": "VALID"},
    {"window_strides": (2, 2), "padding": ((1, 1), (2, 0))},
    {"window_strides": (1, 2), "padding": ((1, 1), (2, 2)), "lhs_dilation": (2, 3)},
    {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 1)},
    {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
  ],
  ids=["plain", "strided", "dilated", "holes", "groups"],
)
def test_convolution_counts_as_xla_counts_it(options):
  groups = options.get("feature_group_count", 1)
  images, kernel = jnp.ones((2, 6, 7, 4)), jnp.ones((3, 3, 4 // groups, 6))

  def convolve(images, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
      images, kernel, dimension_numbers=numbers, **options
    )

  lowered = jax.jit(convolve).lower(images, kernel)
  found = lowered.cost_analysis()  # as written, before XLA changes it
  assert counted(convolve, images, kernel) == found["flops"]


def test_what_is_within_other_functions_counts():
  a = jnp.ones((3, 3))
  inner = jax.jit(lambda a: a @ a)
  assert counted(lambda a: inner(inner(a)), a) == 2 * 2 * 27
  # Of a condition, only the branch that runs as long as all is well.
  branches = lambda a: lax.cond(a[0, 0] > 0, lambda: a, lambda: a @ a @ a)  # noqa: E731
  assert counted(branches, a) < 27


def test_a_scan_counts_as_often_as_it_runs():
  a = jnp.ones((3, 3))
  scan = lambda a: lax.scan(lambda x, _: (x @ a, None), a, length=5)[0]  # noqa: E731
  assert counted(scan, a) == 5 * counted(lambda a: a @ a, a)


def test_what_fits_on_the_chip_is_read_and_written_once():
  shapes = predicted.make_step(SETUP)
  predict = lambda size: predicted.predict_step(  # noqa: E731
    shapes, lambda: shapes, (1, 1), size
  )
  cost = predict(2.0**40)
  batch = predicted.size(shapes.batch)
  assert cost.traffic == 2 * (cost.arguments - batch) + batch
  assert predict(cost.temporaries).traffic == cost.traffic
  assert predict(cost.temporaries - 1).traffic == predict(0).traffic > cost.traffic


def test_temporaries_live_as_long_as_they_are_needed():
  a = jnp.ones((16, 16))
  size = a.nbytes

  def held(function):
    return predicted.temporaries(jax.make_jaxpr(function)(a).jaxpr)

  # A chain holds an operand and a result; the last result is no temporary.
  assert held(lambda a: lax.dot(lax.dot(lax.dot(a, a), a), a)) == 2 * size

  def chain_and_first(a):
    first = lax.dot(a, a)
    return lax.dot(lax.dot(lax.dot(first, a), a), a) + jnp.tanh(first)

  def chain_that_needs_it(a):
    first = lax.dot(a, a)
    return lax.dot(lax.dot(lax.dot(first, a), a), jnp.tanh(first))

  # The first is held to the end, and so is what a product needs of it, once computed;
  # what only the result needs of it is computed with the result.
  assert held(chain_that_needs_it) == 3 * size
  assert held(chain_and_first) == 3 * size


def test_prediction_agrees_with_xla():
  expected, found = predicted.predict(SPLIT), predicted.count_compiled(SPLIT)
  assert expected.arguments == found.arguments
  assert expected.outputs == found.outputs
  # XLA also counts the branch that runs only where a head diverges: here .104 of all.
  assert expected.operations == pytest.approx(found.operations, rel=0.11)


def test_prediction_leaves_out_what_is_not_kept():
  """Of large heads' gradients, which have no branch that rarely runs."""
  setup = dataclasses.replace(SETUP, classes=100)
  expected, found = predicted.predict(setup), predicted.count_compiled(setup)
  assert expected.operations == pytest.approx(found.operations, rel=0.05)


def test_mesh_divides_the_work_and_adds_messages():
  setup = dataclasses.replace(SETUP, batch=64)
  one = predicted.predict(setup)
  rows = predicted.predict(dataclasses.replace(setup, mesh=(4, 1)))
  both = predicted.predict(dataclasses.replace(setup, mesh=(4, 4)))
  # What a device does once, whatever its images: the update of the parameters.
  assert one.operations / 4 < rows.operations < one.operations / 2
  assert rows.temporaries < one.temporaries / 2
  assert both.arguments < rows.arguments < one.arguments
  assert one.sent == 0 < both.sent < rows.sent  # fewer heads, fewer gradients


def test_gradients_and_statistics_are_sent_over_data():
  setup = Setup("small_cnn", 1 / 4, 8, 10, 4, 16, (2, 1))
  state = predicted.make_step(setup).state
  parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
  channels = sum(math.prod(x.shape) for x in jax.tree.leaves(state.batch_stats)) // 2
  assert predicted.predict(setup).sent == 4 * (parameters + 3 * channels)


def test_sent_reads_the_compiled_program():
  hlo = """
    %a = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce(f32[4] %x, bf16[2,3] %y)
    ROOT %b = pred[8]{0} all-gather-start(%z), metadata={op_name="jit(f)/all"}
    %c = f32[99]{0} all-reduce(%u), metadata={op_name="jit(f)/cond/branch_0/sum"}
    %d = f32[] add(f32[] %p, f32[] %q)
  """
  assert predicted.count_sent(hlo) == 4 * 4 + 2 * 6 + 8


def test_mesh_that_divides_nothing_is_refused():
  with pytest.raises(OptionError, match="--mesh-data must divide the batch, 8, got 3"):
    predicted.predict(dataclasses.replace(SETUP, mesh=(3, 1)))
  with pytest.raises(OptionError, match="--mesh-heads: .* split 4 heads evenly"):
    predicted.predict(dataclasses.replace(SETUP, mesh=(1, 3)))


def test_predictions_on_all_meshes_make_a_table(tmp_path, monkeypatch):
  cost = predicted.StepCost(2e9, 3e9, 4 * 10**9, 5, 6e9, 7 * 10**6)
  monkeypatch.setattr(predicted, "predict", lambda setup: cost)
  predicted.PredictedTable(widths=(3.0,), out=tmp_path / "out")()
  (record,) = records.load_costs([tmp_path / "out"])
  text = costs.table(record)
  assert "| 3 | 64 | 32x2 | 8 | 5 | 2 | 3.0 | 4.000 | 6.00 | 7 |" in text
  assert text.count("\n| 3 |") == 13


def test_compiled_steps_are_set_beside_the_predictions(tmp_path, monkeypatch):
  split = dataclasses.replace(SETUP, mesh=(2, 2))
  larger = dataclasses.replace(SETUP, mesh=(1024, 1))  # no process has as many devices
  monkeypatch.setattr(predicted, "SETUPS", (SETUP, split, larger))
  monkeypatch.setattr(jax.config, "update", lambda *_: None)  # devices are made once
  one = predicted.StepCost(9.5, 2.0, 1000, 20, 3.0, 0)
  two = predicted.StepCost(10.0, 4.0, 1000, 20, 4.0, 0)
  monkeypatch.setattr(predicted, "predict", lambda setup: one)
  monkeypatch.setattr(predicted, "count_compiled", lambda setup: two)
  predicted.PredictedCheck(out=tmp_path / "out")()
  (record,) = records.load_costs([tmp_path / "out"])
  cells = "0.950 | 1,000 / 1,000 | 20 / 20 | 0.750 | 0.500"
  text = costs.table(record)
  # On one device nothing is sent.
  assert f"| mlp | 0.0625 | 6 | 10 | 4 | 8 | 1x1 | alrao | {cells} |  |" in text
  assert f"| mlp | 0.0625 | 6 | 10 | 4 | 8 | 2x2 | alrao | {cells} | 0.000 |" in text
  assert len(record["rows"]) == 2
