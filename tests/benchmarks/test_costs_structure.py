"""What keeps a step of Alrao cheap, read from compiled programs; nothing is timed."""

import re

import jax
import numpy as np
import pytest

import alrao_jax
from benchmarks.costs._contenders import SGD, ImageNetwork, alrao
from benchmarks.methods import METHODS, Setting

from test_networks import network_shapes, num_parameters  # isort: skip

NETWORK = ImageNetwork("mlp", 1 / 32, 8, 6, 1, norm="none")
NUM_HEADS = 4
(ALRAO,) = alrao(NUM_HEADS)


def start(contender):
  workload = NETWORK.workload(contender)
  state = workload.init(0, 1e-3 if contender == SGD else None)
  batch = jax.tree.map(lambda leaf: leaf[0], workload.batches(0, 1))
  return workload, state, batch


def find_rates(opt_state):
  def is_rates(node):
    return isinstance(node, alrao_jax.ScaleByUnitRatesState)

  leaves = jax.tree.leaves(opt_state, is_leaf=is_rates)
  (rates,) = [leaf for leaf in leaves if is_rates(leaf)]
  return rates


@pytest.fixture(scope="module")
def compiled():
  def compile_step(contender):
    workload, state, batch = start(contender)
    step = jax.jit(workload.step.step, donate_argnums=0)
    return step.lower(state, workload.data, batch).compile(), state

  return {"sgd": compile_step(SGD), "alrao": compile_step(ALRAO)}


def outside_of_branches(text):
  """The lines of a compiled program, less those of a condition's branches."""
  computations = re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ .*\{\n)", text)
  branches = set(re.findall(r"(?:branch_computations=\{|, )%(region[\w.]*)", text))
  by_name = {
    part.removeprefix("ENTRY ").lstrip("%").split()[0]: part
    for part in computations[1:]
  }
  waiting, skipped = [name for name in by_name if name in branches], set()
  while waiting:
    name = waiting.pop()
    if name in by_name and name not in skipped:
      skipped.add(name)
      waiting += re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", by_name[name])
  return "\n".join(part for name, part in by_name.items() if name not in skipped)


@pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="on accelerators, XLA names products otherwise"
)
def test_heads_add_no_product_to_a_step(compiled):
  """Three wide products for all heads, where an output layer has three."""
  counts = {
    name: len(re.findall(r" dot\(", outside_of_branches(step.as_text())))
    for name, (step, _) in compiled.items()
  }
  # Of three layers forwards, to the parameters, and to the input of all but the first.
  assert counts == {"sgd": 8, "alrao": 8}


def test_switch_and_rates_are_in_the_same_program(compiled):
  """One call a step returns the whole next state, the heads' posterior too."""
  step, state = compiled["alrao"]
  next_state, _ = step.out_info
  assert jax.tree.structure(next_state) == jax.tree.structure(state)
  assert alrao_jax.log_weights(state.opt_state).shape == (NUM_HEADS,)


def test_the_whole_state_is_donated(compiled):
  """Parameters, rates and posterior are updated in place: no second copy of them."""
  step, state = compiled["alrao"]
  memory = step.memory_analysis()
  num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  # Bounds of units and of heads, and who has diverged, are written and never read.
  not_read = 4 * 4 + NUM_HEADS
  assert memory.alias_size_in_bytes == num_bytes - not_read


def test_no_callback_and_no_transfer_in_a_step(compiled):
  text = compiled["alrao"][0].as_text()
  for op in ("outfeed", "infeed", "send", "recv", "callback"):
    assert not re.search(rf"\b{op}\b", text), op


def test_rates_seeds_and_steps_share_one_compilation():
  workload, state, batch = start(ALRAO)
  state, _ = workload.step(state, workload.data, workload.batches(0, 1))
  workload.step(state, workload.data, workload.batches(0, 2))
  workload.step(workload.init(1, None), workload.data, workload.batches(1, 1))
  assert workload.step.num_traces == 1


@pytest.mark.parametrize(
  ("network", "share"),
  [("googlenet", 0.003), ("vgg19", 0.0006), ("mobilenet_v2", 0.015)],
)
def test_rates_take_one_float_a_unit(network, share):
  params = network_shapes(network, num_heads=10)["params"]
  optimizer = METHODS["alrao"].make(Setting(jax.random.key(0), None, 1, True))
  rates = find_rates(jax.eval_shape(optimizer.init, params))
  assert rates.quantiles.dtype == np.float32
  assert rates.ladder.size + rates.quantiles.size < share * 1.1 * num_parameters(
    {"params": params}
  )


def test_nothing_else_of_the_state_grows_with_the_network():
  """Beside rates: four numbers a head, of `switch` and who diverged, and counters."""
  sizes = []
  for width in (1 / 32, 1 / 8):
    workload = NETWORK._replace(width=width).workload(ALRAO)
    opt_state = workload.init(0, None).opt_state
    num_entries = sum(leaf.size for leaf in jax.tree.leaves(opt_state))
    rates = find_rates(opt_state)
    sizes.append(num_entries - rates.ladder.size - rates.quantiles.size)
  assert sizes[0] == sizes[1] < 5 * NUM_HEADS + 20
