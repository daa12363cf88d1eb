import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization

import alrao_jax as alrao
import alrao_jax.linen
import alrao_jax.nnx
from alrao_jax import _checks

POSITIVE = _checks.check_positive
NON_NEGATIVE = _checks.check_non_negative
PROBABILITY = _checks.check_probability


@pytest.mark.parametrize("value", [1, 0.5, np.float32(2), np.array([1.0, 2.0]), True])
def test_numbers_are_concrete(value):
  assert _checks.is_concrete(value)
  assert _checks.is_concrete(jnp.asarray(value))


@pytest.mark.parametrize("value", [None, "1", b"1", len, object(), {"a": 1}])
def test_what_is_no_number_is_not_concrete(value):
  assert not _checks.is_concrete(value)


def test_tracers_are_not_concrete():
  seen = []
  jax.jit(lambda x: seen.append(_checks.is_concrete(x)))(1.0)
  jax.vmap(lambda x: seen.append(_checks.is_concrete(x)))(jnp.ones(2))
  assert seen == [False, False]


@pytest.mark.parametrize("value", [1, 1e-30, np.float32(3), jnp.array([1.0, 2.0])])
def test_positive_numbers_pass(value):
  _checks.check_positive("alrao()", "x", value)
  _checks.check_non_negative("alrao()", "x", value)


def test_zero_is_not_negative():
  _checks.check_non_negative("alrao()", "weight_decay", 0.0)


@pytest.mark.parametrize(
  ("check", "value", "message"),
  [
    (POSITIVE, -0.001, "alrao(x=...) must be positive, got -0.001."),
    (POSITIVE, 0, "alrao(x=...) must be positive, got 0."),
    (POSITIVE, math.nan, "alrao(x=...) must be positive, got nan."),
    (POSITIVE, math.inf, "alrao(x=...) must be finite, got inf."),
    (POSITIVE, np.array([1.0, -2.0]), "alrao(x=...) must be positive, got [ 1. -2.]."),
    (NON_NEGATIVE, -1, "alrao(x=...) must not be negative, got -1."),
    (NON_NEGATIVE, math.nan, "alrao(x=...) must not be negative, got nan."),
    (NON_NEGATIVE, math.inf, "alrao(x=...) must be finite, got inf."),
    (PROBABILITY, 1.5, "alrao(x=...) must be between 0 and 1, got 1.5."),
    (PROBABILITY, -0.1, "alrao(x=...) must be between 0 and 1, got -0.1."),
    (PROBABILITY, math.nan, "alrao(x=...) must be between 0 and 1, got nan."),
  ],
)
def test_values_that_break_the_rule_are_refused(check, value, message):
  with pytest.raises(ValueError) as error:
    check("alrao()", "x", value)
  assert str(error.value) == message


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 2.0, math.nan])
def test_an_open_probability_refuses_its_ends(value):
  with pytest.raises(ValueError, match=r"must be strictly between 0 and 1, got"):
    _checks.check_probability("switch()", "theta", value, open=True)
  _checks.check_probability("switch()", "theta", 0.5, open=True)


def test_a_closed_probability_takes_its_ends():
  for value in (0, 0.0, 1, 1.0, np.array([0.0, 1.0])):
    _checks.check_probability("switch()", "theta", value)


@pytest.mark.parametrize("check", [POSITIVE, NON_NEGATIVE, PROBABILITY])
@pytest.mark.parametrize(
  ("value", "shown"),
  [
    (None, "a value of type NoneType"),
    ("0.1", "'0.1' of type str"),
    (optax.constant_schedule(0.1), "a value of type function"),
  ],
)
def test_what_is_no_number_is_refused(check, value, shown):
  with pytest.raises(TypeError) as error:
    check("alrao()", "x", value)
  assert str(error.value) == f"alrao(x=...) must be a number, got {shown}."


@pytest.mark.parametrize("low", [1e-5, 1, np.float32(0.5)])
def test_intervals_pass_also_of_one_rate(low):
  _checks.check_interval("alrao()", low, 10.0)
  _checks.check_interval("alrao()", low, low)


@pytest.mark.parametrize(
  ("low", "high", "message"),
  [
    (1.0, 0.1, "must not be above max_learning_rate, got 1.0 and 0.1: write the lower"),
    (0.0, 1.0, r"alrao\(min_learning_rate=...\) must be positive, got 0.0"),
    (-1.0, 1.0, r"alrao\(min_learning_rate=...\) must be positive, got -1.0"),
    (math.nan, 1.0, r"alrao\(min_learning_rate=...\) must be positive, got nan"),
    (1.0, math.nan, r"alrao\(max_learning_rate=...\) must be positive, got nan"),
    (1.0, math.inf, r"alrao\(max_learning_rate=...\) must be finite, got inf"),
  ],
)
def test_bad_intervals_are_refused(low, high, message):
  with pytest.raises(ValueError, match=message):
    _checks.check_interval("alrao()", low, high)


def test_an_interval_has_the_names_of_its_arguments():
  with pytest.raises(ValueError, match=r"log_uniform\(lo=...\) must not be above hi"):
    _checks.check_interval("log_uniform()", 2.0, 1.0, names=("lo", "hi"))


def test_checks_skip_tracers():
  @jax.jit
  def bad(x, p):
    _checks.check_positive("alrao()", "x", x)
    _checks.check_non_negative("alrao()", "x", x)
    _checks.check_probability("alrao()", "p", p)
    _checks.check_interval("alrao()", x, 1e-9)
    _checks.check_interval("alrao()", 1e9, p)
    return x

  bad(-1.0, 7.0)
  jax.vmap(bad)(-jnp.ones(2), jnp.full(2, 7.0))


def test_the_known_bound_is_checked_beside_a_traced_one():
  with pytest.raises(ValueError, match="max_learning_rate=...\\) must be positive"):
    jax.jit(lambda x: _checks.check_interval("alrao()", x, -1.0))(1.0)


@pytest.mark.parametrize("value", [1, 10, np.int64(3), np.uint8(3)])
def test_counts_pass(value):
  _checks.check_count("MultiHead()", "num_heads", value)


def test_counts_below_one_are_refused():
  for value in (0, -3):
    with pytest.raises(ValueError) as error:
      _checks.check_count("MultiHead()", "num_heads", value)
    message = f"MultiHead(num_heads=...) must be at least 1, got {value}."
    assert str(error.value) == message


@pytest.mark.parametrize("value", [True, np.True_, 2.0, "3", None, np.ones(2)])
def test_counts_that_are_no_integers_are_refused(value):
  with pytest.raises(TypeError, match=r"MultiHead\(num_heads=...\) must be an integer"):
    _checks.check_count("MultiHead()", "num_heads", value)


def test_a_traced_count_is_refused():
  with pytest.raises(TypeError, match="must be an integer known before tracing"):
    jax.jit(lambda n: _checks.check_count("MultiHead()", "num_heads", n))(3)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_pass_typed_raw_and_traced(implementation):
  key = jax.random.key(0, impl=implementation)
  raw = jax.random.key_data(key)
  for one in (key, raw, np.asarray(raw), jax.random.fold_in(key, 1)):
    _checks.check_key("alrao()", one)
    if not isinstance(one, np.ndarray):
      jax.jit(lambda k: _checks.check_key("alrao()", k))(one)
  jax.vmap(lambda k: _checks.check_key("alrao()", k))(jax.random.split(key, 3))


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (0, "must be a PRNG key, got 0 of type int"),
    (None, "must be a PRNG key, got a value of type NoneType"),
    (optax.sgd(0.1), "got a value of type GradientTransformation"),
    (np.float32(1), r"got an array of float32 and shape \(\)"),
    (np.zeros(2), r"got an array of float64 and shape \(2,\)"),
    (np.zeros(3, np.uint32), r"got an array of uint32 and shape \(3,\)"),
  ],
)
def test_what_is_no_key_is_refused(value, message):
  with pytest.raises(TypeError, match=message) as error:
    _checks.check_key("alrao()", value)
  assert str(error.value).startswith("alrao(key=...) ")
  assert "write alrao(jax.random.key(0), ...)" in str(error.value)


@pytest.mark.parametrize("seed", [2**32, -1, 2**70])
def test_a_seed_that_jax_would_take_for_another_is_named(seed):
  with pytest.raises(TypeError, match=r"with a seed from 0 to 2\*\*32 - 1\.$"):
    _checks.check_key("alrao()", seed)


def test_several_keys_are_refused():
  keys = jax.random.split(jax.random.key(0), 3)
  for several in (keys, jax.random.key_data(keys)):
    with pytest.raises(ValueError, match="must be one PRNG key, got an array of keys"):
      _checks.check_key("alrao()", several)


# What is given in the place of parameters or of an optimizer's state


PARAMS = {
  "dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
  "out": {"alrao_heads": {"kernel": jnp.ones((2, 4, 3))}},
}
PAPERS = alrao.alrao(jax.random.key(0), optax.trace(0.9))
AVERAGED = alrao.schedule_free_alrao(jax.random.key(0))
TOLD = {"head_log_likelihoods": jnp.array([-1.0, -2.0])}


class NnxModel(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.dense = nnx.Linear(3, 4, rngs=rngs)
    self.out = alrao.nnx.MultiHead(
      lambda rngs: nnx.Linear(4, 3, rngs=rngs), num_heads=2, rngs=rngs
    )


def mesh():
  auto = jax.sharding.AxisType.Auto
  return jax.make_mesh((1,), ("heads",), axis_types=(auto,))


# Every public function of both, or of one, as (optimizer, params, state) -> anything.
STATE_CALLS = {
  "log_weights": lambda tx, p, s: alrao.log_weights(s),
  "best_heads": lambda tx, p, s: alrao.best_heads(s),
  "eval_params": lambda tx, p, s: alrao.eval_params(s, p),
  "export": lambda tx, p, s: alrao.export(s, p),
  "collapse": lambda tx, p, s: alrao.collapse(tx, s, p),
  "report": lambda tx, p, s: alrao.report(s, p),
  "scalars": lambda tx, p, s: alrao.scalars(s, p, p),
  "unit_rates": lambda tx, p, s: alrao.unit_rates(s, p),
  "with_unit_rates": lambda tx, p, s: alrao.with_unit_rates(s, p, p),
  "update": lambda tx, p, s: tx.update(p, s, p, **TOLD),
}
PARAMS_CALLS = {
  **{
    name: call
    for name, call in STATE_CALLS.items()
    if name not in ("log_weights", "best_heads")
  },
  "init": lambda tx, p, s: tx.init(p),
  "head_shardings": lambda tx, p, s: alrao.head_shardings(tx, p, mesh()),
  "tree_head_shardings": lambda tx, p, s: alrao.tree_head_shardings(p, mesh()),
  "take_heads": lambda tx, p, s: alrao.take_heads(p, (0,)),
  "load_pretrained": lambda tx, p, s: alrao.load_pretrained(p, p),
  "describe_units": lambda tx, p, s: alrao.describe_units(p),
}
SIGNATURES = {
  "log_weights": "log_weights(opt_state)",
  "best_heads": "best_heads(opt_state, keep)",
  "eval_params": "eval_params(opt_state, params)",
  "export": "export(opt_state, params)",
  "collapse": "collapse(optimizer, opt_state, params)",
  "report": "report(opt_state, params)",
  "scalars": "scalars(opt_state, params)",
  "unit_rates": "unit_rates(opt_state, params)",
  "with_unit_rates": "with_unit_rates(opt_state, params, rates)",
  "update": "optimizer.update(grads, opt_state, params, head_log_likelihoods=...)",
  "init": "optimizer.init(params)",
  "head_shardings": "head_shardings(optimizer, params, mesh)",
  "tree_head_shardings": "tree_head_shardings(tree, mesh)",
  "take_heads": "take_heads(tree, kept)",
  "load_pretrained": "load_pretrained(params, pretrained)",
  "describe_units": "describe_units(params)",
}
NNX_CALLS = {
  "init": "nnx.Optimizer(model, optimizer, wrt=nnx.Param)",
  "update": "nnx.Optimizer(model, optimizer, wrt=nnx.Param).update(model, grads, ...)",
  "collapse": "alrao_jax.nnx.collapse(model, optimizer)",
  "export": "alrao_jax.nnx.export(model, optimizer.opt_state)",
}


def refused(call, params, state, optimizer=None):
  optimizer = optimizer or (AVERAGED if call is PARAMS_CALLS["eval_params"] else PAPERS)
  with pytest.raises(TypeError) as error:
    call(optimizer, params, state)
  return str(error.value)


def state_of(name):
  return (AVERAGED if name == "eval_params" else PAPERS).init(PARAMS)


def raw_orbax(tree):
  """As Orbax restores it without a target: dicts by field, tuples as lists."""
  if hasattr(tree, "_fields"):
    return {name: raw_orbax(x) for name, x in tree._asdict().items()} or None
  if isinstance(tree, tuple):
    return [raw_orbax(x) for x in tree]
  if isinstance(tree, dict):
    return {name: raw_orbax(x) for name, x in tree.items()}
  return tree


@pytest.mark.parametrize("restore", [raw_orbax, serialization.to_state_dict])
@pytest.mark.parametrize("name", STATE_CALLS)
def test_a_state_restored_without_its_types_is_named(name, restore):
  message = refused(STATE_CALLS[name], PARAMS, restore(state_of(name)))
  assert "restored without a target" in message
  assert "ocp.args.StandardRestore(optimizer.init(params))" in message


@pytest.mark.parametrize("name", STATE_CALLS)
def test_parameters_in_the_place_of_the_state_are_named(name):
  message = refused(STATE_CALLS[name], PARAMS, PARAMS)
  assert "(opt_state=...) must be an optimizer's state, got a dict" in message
  assert f"Write {SIGNATURES[name]}." in message


@pytest.mark.parametrize("name", PARAMS_CALLS)
def test_a_state_in_the_place_of_the_parameters_is_named(name):
  state = state_of(name)
  message = refused(PARAMS_CALLS[name], state, state)
  assert "must be a tree of arrays, got an optimizer's state." in message
  assert f"Write {SIGNATURES[name]}." in message


@pytest.mark.parametrize("name", STATE_CALLS)
def test_an_optimizer_in_the_place_of_its_state_is_named(name):
  message = refused(STATE_CALLS[name], PARAMS, PAPERS)
  assert "got an optimizer itself" in message and SIGNATURES[name] in message


@pytest.mark.parametrize("name", sorted(PARAMS_CALLS.keys() - {"eval_params"}))
def test_an_nnx_model_in_the_place_of_the_parameters_is_named(name):
  message = refused(PARAMS_CALLS[name], NnxModel(), state_of(name))
  assert "got an nnx model. Write " in message
  assert "nnx.state(model, nnx.Param)" in message
  assert NNX_CALLS.get(name, "") in message


@pytest.mark.parametrize("name", STATE_CALLS)
def test_an_nnx_model_in_the_place_of_the_state_is_named(name):
  message = refused(STATE_CALLS[name], PARAMS, NnxModel())
  assert "got an nnx model" in message
  assert NNX_CALLS.get(name, "optimizer.opt_state") in message


@pytest.mark.parametrize("name", PARAMS_CALLS)
def test_a_train_state_in_the_place_of_the_parameters_is_named(name):
  state = alrao.linen.TrainState.create(apply_fn=None, params=PARAMS, tx=PAPERS)
  message = refused(PARAMS_CALLS[name], state, state_of(name))
  assert "got a TrainState. Write " in message and "state.params" in message
  if name in ("collapse", "export"):
    assert f"alrao_jax.linen.{name}(state)" in message


def test_collapse_names_who_holds_the_state():
  state = alrao.linen.TrainState.create(apply_fn=None, params=PARAMS, tx=PAPERS)
  message = refused(STATE_CALLS["collapse"], PARAMS, state)
  assert "Write its .opt_state, or alrao_jax.linen.collapse(state)" in message


@pytest.mark.parametrize("name", ["collapse", "head_shardings"])
def test_what_is_no_optimizer_is_named(name):
  for wrong in (PARAMS, PAPERS.init(PARAMS), "alrao"):
    message = refused(PARAMS_CALLS[name], PARAMS, PAPERS.init(PARAMS), wrong)
    assert "(optimizer=...) must be an optax optimizer, got" in message
    assert f"Write {SIGNATURES[name]}." in message
  model = NnxModel()
  optimizer = nnx.Optimizer(model, PAPERS, wrt=nnx.Param)
  message = refused(PARAMS_CALLS[name], PARAMS, PAPERS.init(PARAMS), optimizer)
  assert "with optimizer.tx" in message and NNX_CALLS.get(name, "") in message


@pytest.mark.parametrize(
  ("leaf", "sentence"),
  [
    (jax.nn.relu, r"eqx.filter\(model, eqx.is_inexact_array\)"),
    (len, r"got the function .* eqx.filter\(model, eqx.is_inexact_array\)"),
    (True, "got the Python number True for 'dense/extra'"),
    (3, "got the Python number 3 for 'dense/extra'"),
    (0.5, r"got 0.5 for 'dense/extra'. Write jnp.asarray"),
    (jnp.ones(2, jnp.int32), "integer dtype can't be trained"),
    (jnp.ones(2, bool), "Masks can't be trained"),
    (jax.random.key(0), "Random keys can't be trained"),
  ],
)
@pytest.mark.parametrize("name", ["init", "collapse", "head_shardings", "unit_rates"])
def test_leaves_that_cannot_be_trained_have_a_sentence_each(name, leaf, sentence):
  params = {**PARAMS, "dense": {**PARAMS["dense"], "extra": leaf}}
  for optimizer in (PAPERS, AVERAGED):
    state = optimizer.init(PARAMS)
    message = refused(PARAMS_CALLS[name], params, state, optimizer)
    assert re.search(sentence, message) and "'dense/extra'" in message


@pytest.mark.parametrize("make", [alrao.track_heads, alrao.guard_units])
def test_parts_of_a_chain_name_functions_in_the_parameters(make):
  params = {**PARAMS, "activation": jax.nn.relu}
  with pytest.raises(TypeError, match=r"eqx.filter\(model, eqx.is_inexact_array\)"):
    make().init(params)


def test_an_equinox_model_that_was_not_filtered_is_named():
  eqx = pytest.importorskip("equinox", reason="equinox is no dependency")
  model = eqx.nn.MLP(3, 4, 5, 1, key=jax.random.key(0))
  optimizer = alrao.alrao(jax.random.key(0), optax.trace(0.9), heads=False)
  with pytest.raises(TypeError, match=r"eqx.filter\(model, eqx.is_inexact_array\)"):
    optimizer.init(model)
  params = eqx.filter(model, eqx.is_inexact_array)
  state = optimizer.init(params)
  with pytest.raises(TypeError, match=r"eqx.filter\(model, eqx.is_inexact_array\)"):
    optimizer.update(params, state, model)
  optimizer.update(params, state, params)


def test_bound_parameters_of_penzai_are_named():
  # Its classes by name: penzai is not installed with this library.
  kind = type("AbstractVariable", (), {"__module__": "penzai.core.variables"})
  parameter = type("Parameter", (kind,), {"__module__": "penzai.core.variables"})()
  with pytest.raises(TypeError, match=r"params = pz.unbind_params\(model, freeze=True"):
    PAPERS.init({"dense": parameter})


@pytest.mark.parametrize(
  ("make", "kind"),
  [
    (lambda: alrao.scale_by_unit_rates(jax.random.key(0)), "scale_by_unit_rates"),
    (alrao.track_heads, "track_heads"),
    (alrao.guard_units, "guard_units"),
    (lambda: alrao.per_head(optax.trace(0.9)), "per_head"),
  ],
)
def test_parts_of_a_chain_name_a_state_that_is_not_theirs(make, kind):
  part = make()
  for wrong in (PARAMS, raw_orbax(part.init(PARAMS))):
    with pytest.raises(TypeError) as error:
      part.update(PARAMS, wrong, PARAMS, **TOLD)
    where = f"{kind}().update(opt_state=...) must be an optimizer's state, got"
    assert str(error.value).startswith(where)


def test_follow_leader_names_what_it_takes():
  state = PAPERS.init(PARAMS)
  with pytest.raises(TypeError, match=r"follow_leader\(alrao_jax.log_weights\(opt_st"):
    alrao.follow_leader(state)
  with pytest.raises(ValueError, match="Of several MultiHeads, follow each by itself"):
    alrao.follow_leader({"a": jnp.zeros(2), "b": jnp.zeros(2)})
  last = alrao.follow_leader(alrao.log_weights(state))
  with pytest.raises(TypeError, match=r"must be a Leader, got a value of type dict"):
    alrao.follow_leader(alrao.log_weights(state), last._asdict())


def test_flax_functions_name_what_they_take():
  model = NnxModel()
  optimizer = nnx.Optimizer(model, PAPERS, wrt=nnx.Param)
  params, weights = nnx.state(model, nnx.Param), jnp.zeros(2)
  for call, message in (
    (lambda: alrao.nnx.collapse(params, optimizer), "must be an nnx.Module"),
    (lambda: alrao.nnx.collapse(optimizer, model), "must be an nnx.Module"),
    (lambda: alrao.nnx.collapse(model, optimizer.opt_state), "the nnx.Optimizer"),
    (lambda: alrao.nnx.export(params, optimizer.opt_state), "must be an nnx.Module"),
    (lambda: alrao.nnx.predict(params, weights, 1), "must be an nnx.Module"),
    (
      lambda: alrao.linen.predict(model, {}, weights),
      r"alrao_jax.nnx.predict\(\.\.\.\)",
    ),
    (lambda: alrao.linen.collapse(PARAMS), r"alrao_jax.collapse\(\.\.\.\)"),
    (lambda: alrao.linen.export(PARAMS), r"alrao_jax.export\(\.\.\.\)"),
  ):
    with pytest.raises(TypeError, match=message):
      call()
