"""The MultiHead of flax.linen, its train state, and prediction."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

import alrao_jax as alrao
from alrao_jax.linen import MultiHead, TrainState, predict

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 4))


Dense = functools.partial(nn.Dense, kernel_init=nn.initializers.uniform(1.0))


class Mlp(nn.Module):
  """A head of two layers, with statistics, dropout, and something to look at."""

  dropout: float = 0.5

  @nn.compact
  def __call__(self, x, train=False):
    x = Dense(8)(x)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    self.sow("intermediates", "hidden", x)
    return Dense(3)(nn.tanh(x))


class Net(nn.Module):
  dropout: float = 0.5

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.tanh(Dense(5)(x))
    return MultiHead(Mlp(self.dropout), 4, name="out")(x, train=train)


HEADS = {
  "dense": nn.Dense(3),
  "without bias": nn.Dense(3, use_bias=False),
  "layer norm first": nn.Sequential((nn.LayerNorm(), nn.Dense(3))),
  "two layers": Mlp(),
  "convolution": nn.Conv(3, (3,)),
  "bfloat16": nn.Dense(3, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
}
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())


@functools.cache  # compiling an initializer takes a second
def init(module, **kwargs):
  return jax.jit(functools.partial(module.init, **kwargs))(KEY, X)


def apply(module, variables, *args, **kwargs):
  return jax.jit(functools.partial(module.apply, **kwargs))(variables, *args)


def shapes(tree):
  return jax.tree.map(jnp.shape, tree)


def take(variables, j):
  """The variables of head `j`, as the plain layer has them."""
  return {name: jax.tree.map(lambda x: x[j], tree) for name, tree in variables.items()}


def stacked(variables):
  """What lies below `alrao_heads` of a model that is a MultiHead."""
  return {name: tree["alrao_heads"] for name, tree in variables.items()}


def assert_equal(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


def assert_close(tree, other, rtol=2e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.float32(a), np.float32(b), rtol=rtol, atol=rtol
    ),
    tree,
    other,
  )


# Parameters and their names


def test_parameters_lie_below_alrao_heads_stacked_on_axis_0():
  assert shapes(init(Net())["params"]) == {
    "Dense_0": {"bias": (5,), "kernel": (4, 5)},
    "out": {
      "alrao_heads": {
        "BatchNorm_0": {"bias": (4, 8), "scale": (4, 8)},
        "Dense_0": {"bias": (4, 8), "kernel": (4, 5, 8)},
        "Dense_1": {"bias": (4, 3), "kernel": (4, 8, 3)},
      }
    },
  }


def test_multi_head_may_have_the_name_that_its_inline_head_took():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(5)(x)
      return MultiHead(nn.Dense(3), 2, name="Dense_1")(x)

  variables = init(Model())
  assert set(variables["params"]) == {"Dense_0", "Dense_1"}
  assert variables["params"]["Dense_1"]["alrao_heads"]["kernel"].shape == (2, 5, 3)
  assert apply(Model(), variables, X).num_heads == 2


def test_layers_of_an_inline_head_leave_no_parameters_outside():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return MultiHead(nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(3)]), 2)(x)

  variables = init(Model())
  assert shapes(variables["params"]) == {
    "MultiHead_0": {
      "alrao_heads": {
        "layers_0": {"bias": (2, 8), "kernel": (2, 4, 8)},
        "layers_2": {"bias": (2, 3), "kernel": (2, 8, 3)},
      }
    }
  }
  assert apply(Model(), variables, X).num_heads == 2


def test_multi_head_in_setup_has_the_attributes_name():
  class Model(nn.Module):
    def setup(self):
      self.head = MultiHead(nn.Dense(3), 2)

    def __call__(self, x):
      return self.head(x)

  variables = init(Model())
  assert variables["params"]["head"]["alrao_heads"]["kernel"].shape == (2, 4, 3)
  assert apply(Model(), variables, X).num_heads == 2


def test_a_head_given_as_attribute_of_the_model_is_a_template():
  class Model(nn.Module):
    head: nn.Module

    @nn.compact
    def __call__(self, x):
      return [MultiHead(self.head, 2, name=name)(x) for name in ("a", "b")]

  params = init(Model(nn.Dense(3)))["params"]
  assert set(params) == {"a", "b"}
  kernels = [params[name]["alrao_heads"]["kernel"] for name in params]
  assert not np.array_equal(*kernels)


def test_a_multi_head_called_twice_has_its_parameters_once():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      head = MultiHead(Mlp(), 2, name="out")
      return head(x, train=train), head(x, train=train)

  variables = init(Model(), train=True)
  assert set(variables["params"]) == {"out"}
  statistics = variables["batch_stats"]["out"]["alrao_heads"]["BatchNorm_0"]
  assert not statistics["mean"].any()  # as in a plain model: init is no training step
  assert_equal(*apply(Model(), variables, X, train=False))


@pytest.mark.parametrize(
  ("head_axis", "expected"), [(None, (None, "in", "out")), ("h", ("h", "in", "out"))]
)
def test_partitioned_parameters_and_state_keep_their_names(head_axis, expected):
  class Partitioned(nn.Module):
    @nn.compact
    def __call__(self, x):
      init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
      zeros = nn.with_partitioning(nn.initializers.zeros, ("out",))
      mean = self.variable("statistics", "mean", lambda: zeros(KEY, (3,)))
      x = nn.Dense(3, kernel_init=init, name="dense")(x)
      if self.is_mutable_collection("statistics"):
        mean.value = x.mean(axis=0)
      return x

  layer = MultiHead(Partitioned(), 2, head_axis=head_axis)
  variables = jax.eval_shape(layer.init, KEY, X)
  kernel = variables["params"]["alrao_heads"]["dense"]["kernel"]
  mean = variables["statistics"]["alrao_heads"]["mean"]
  assert kernel.names == expected and kernel.value.shape == (2, 4, 3)
  assert mean.names == (head_axis, "out") and mean.value.shape == (2, 3)
  specs = nn.get_partition_spec(variables)
  assert specs["params"]["alrao_heads"]["dense"]["bias"] == jax.sharding.PartitionSpec()
  variables = init(layer)
  heads, new = apply(layer, variables, X, mutable=["statistics"])
  new_mean = new["statistics"]["alrao_heads"]["mean"]
  assert new_mean.names == mean.names
  assert_equal(new_mean.value, heads.shared.mean(axis=1))
  assert_equal(apply(layer, nn.meta.unbox(variables), X), heads)


# Every head is the plain layer


@each_head
def test_one_head_is_the_plain_layer_bit_for_bit(head):
  plain = take(stacked(init(MultiHead(head, 3))), 0)
  variables = jax.tree.map(lambda x: x[None], plain)
  variables = {name: {"alrao_heads": tree} for name, tree in variables.items()}
  heads = apply(MultiHead(head, 1), variables, X)
  assert_equal(heads.shared[0], apply(head, plain, X))
  assert_equal(heads.shared, heads.own)


@each_head
def test_heads_equal_plain_layers_with_their_parameters(head):
  variables = init(MultiHead(head, 3))
  heads = apply(MultiHead(head, 3), variables, X)
  plain = jax.jit(head.apply)
  rtol = 2e-6 if heads.shared.dtype == jnp.float32 else 2e-2
  for j in range(3):
    expected = plain(take(stacked(variables), j), X)
    assert heads.shared[j].dtype == expected.dtype
    assert_close(heads.shared[j], expected, rtol)


def test_heads_draw_their_own_parameters_whatever_their_number():
  few = init(MultiHead(Mlp(), 3))
  many = init(MultiHead(Mlp(), 5))
  assert_equal(few, jax.tree.map(lambda x: x[:3], many))
  kernels = np.asarray(many["params"]["alrao_heads"]["Dense_0"]["kernel"])
  assert len(np.unique(kernels)) == kernels.size


def test_every_head_has_its_own_statistics():
  variables = init(MultiHead(Mlp(), 3))
  options = {"train": True, "mutable": ["batch_stats"]}
  outputs, new = apply(MultiHead(Mlp(0.0), 3), variables, X, **options)
  plain = jax.jit(functools.partial(Mlp(0.0).apply, **options))
  for j in range(3):
    expected = plain(take(stacked(variables), j), X)
    assert_close((outputs.shared[j], take(stacked(new), j)), expected)


class Masked(nn.Module):
  """Ones, some of them dropped: shows the mask."""

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (16,))
    x = jnp.ones(x.shape[:1] + (16,)) * scale[None]
    return nn.Dropout(0.5, deterministic=False)(x)


def masks(heads):
  return {np.asarray(mask != 0).tobytes() for mask in heads.shared}


def test_every_head_draws_its_own_dropout_mask_also_during_init():
  layer = MultiHead(Masked(), 4)
  heads, variables = layer.init_with_output(KEY, X)
  assert len(masks(heads)) == 4
  rngs = {"dropout": jax.random.key(2)}
  heads = apply(layer, variables, X, rngs=rngs)
  assert len(masks(heads)) == 4
  assert_equal(heads, apply(layer, variables, X, rngs=rngs))
  assert not masks(heads) & masks(
    apply(layer, variables, X, rngs={"dropout": jax.random.key(3)})
  )


def test_dropout_masks_do_not_depend_on_the_number_of_heads():
  rngs = {"dropout": jax.random.key(2)}
  few, many = (
    apply(layer, init(layer), X, rngs=rngs)
    for layer in (MultiHead(Masked(), 2), MultiHead(Masked(), 4))
  )
  assert masks(few) < masks(many)


def test_heads_draw_from_every_collection_of_keys():
  class Noise(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(3)(x)
      return x, jax.random.normal(self.make_rng("noise"), (2,))

  layer = MultiHead(Noise(), 3)
  rngs = {"noise": jax.random.key(2)}
  variables = layer.init({"params": KEY, **rngs}, X)
  noise = np.asarray(apply(layer, variables, X, rngs=rngs).shared[1])
  assert len(np.unique(noise)) == 6


def test_what_heads_sow_is_stacked():
  variables = init(Net())
  _, seen = apply(Net(), variables, X, mutable=["intermediates"])
  assert shapes(seen) == {
    "intermediates": {"out": {"alrao_heads": {"hidden": ((4, 6, 8),)}}}
  }


def test_further_arguments_reach_the_heads():
  class Bilinear(nn.Module):
    @nn.compact
    def __call__(self, features, scale, *, shift=0.0, squared=False):
      x = nn.Dense(3)(features["x"]) * scale + shift
      return x**2 if squared else x

  layer = MultiHead(Bilinear(), 2)
  args = {"x": X}, jnp.full((6, 3), 2.0)
  variables = layer.init(KEY, *args)
  plain = apply(layer, variables, *args).shared
  heads = apply(layer, variables, *args, shift=1.0, squared=True)
  assert_close(heads.shared, (plain + 1) ** 2)


# Gradients


def test_gradients_go_two_ways():
  """The mixture's gradient for the body and each head's own, as if taken apart."""
  labels, stop = jnp.arange(6) % 3, jax.lax.stop_gradient
  train = {"train": True, "mutable": ["batch_stats"]}
  variables = init(Net())
  # Flax's batch norm is not made for strict promotion in float64.
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    x, log_weights = jnp.float64(X), jax.nn.log_softmax(jnp.arange(4, dtype=float))
    variables = jax.tree.map(jnp.float64, variables)
    statistics = variables["batch_stats"]

    def loss_fn(params):
      heads, _ = Net(0.0).apply({**variables, "params": params}, x, **train)
      return alrao.classification_loss(heads, labels, log_weights)[0]

    @functools.partial(jax.vmap, in_axes=(None, 0))
    def log_likelihoods(body, head):
      logits, _ = Mlp(0.0).apply(head, body, **train)
      return jax.nn.log_softmax(logits)[jnp.arange(6), labels]

    def two_losses(params):
      body = jnp.tanh(Dense(5).apply({"params": params["Dense_0"]}, x))
      heads = stacked({"params": params["out"], "batch_stats": statistics["out"]})
      shared = log_likelihoods(body, stop(heads)) + log_weights[:, None]
      own = log_likelihoods(stop(body), heads)
      return -jax.nn.logsumexp(shared, axis=0).mean() - own.mean(axis=1).sum()

    grads, expected = (
      jax.jit(jax.grad(loss))(variables["params"]) for loss in (loss_fn, two_losses)
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13),
      grads,
      expected,
    )


def test_statistics_of_eight_bit_heads_come_as_their_gradients():
  head = nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp)
  layer, x = MultiHead(head, 2), jax.random.normal(KEY, (16, 16))
  with jax.numpy_dtype_promotion("standard"):  # as Flax's own needs it
    variables = jax.jit(layer.init)(KEY, x)
    grad = jax.jit(jax.grad(lambda v: (layer.apply(v, x).own ** 2).sum()))
    plain_grad = jax.jit(jax.grad(lambda v: (head.apply(v, x) ** 2).sum()))
    new = stacked(grad(variables))
    for j in range(2):
      expected = plain_grad(take(stacked(variables), j))
      assert_close(take(new, j), expected, 1e-5)


# Under JAX's and Flax's transformations


def test_jit_changes_nothing():
  layer = MultiHead(nn.Dense(3), 4)
  variables = layer.init(KEY, X)
  assert_close(init(layer), variables)
  assert_close(apply(layer, variables, X), layer.apply(variables, X))


def test_eval_shape_lazy_init_and_tabulate():
  expected = shapes(init(Net()))
  spec = jax.ShapeDtypeStruct(X.shape, X.dtype)
  assert shapes(jax.eval_shape(Net().init, KEY, spec)) == expected
  assert "alrao_heads" in Net().tabulate(KEY, X, console_kwargs={"width": 200})
  layer = MultiHead(nn.Dense(3), 4)
  assert_close(layer.lazy_init(KEY, spec), init(layer))


@pytest.mark.parametrize("lift", [nn.jit, nn.remat])
def test_lifted_jit_and_remat(lift):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      return lift(Net, static_argnums=(2,))(name="net")(x, train)

  plain = init(Net())
  variables = {name: {"net": tree} for name, tree in plain.items()}
  assert shapes(jax.eval_shape(Model().init, KEY, X)) == shapes(variables)
  assert_close(apply(Model(), variables, X), apply(Net(), plain, X), 1e-5)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def grad(variables):
    heads, new = Model().apply(
      variables, X, train=True, rngs={"dropout": KEY}, mutable=["batch_stats"]
    )
    return (heads.shared**2).sum() + (heads.own**2).sum(), new

  grads, new = grad(variables)
  assert shapes(new["batch_stats"]) == shapes(variables["batch_stats"])
  assert all(np.any(grad != 0) for grad in jax.tree.leaves(grads["params"]["net"]))


@pytest.mark.parametrize("lift", [nn.jit, nn.remat])
def test_multi_head_itself_may_be_lifted(lift):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return lift(MultiHead)(nn.Dense(3), 4, name="out")(x)

  variables = {"params": {"out": init(MultiHead(nn.Dense(3), 4))["params"]}}
  assert shapes(jax.eval_shape(Model().init, KEY, X)) == shapes(variables)
  expected = apply(MultiHead(nn.Dense(3), 4), {"params": variables["params"]["out"]}, X)
  assert_close(apply(Model(), variables, X), expected)


# What can't be a head


class Tied(nn.Module):
  embed: nn.Embed

  def __call__(self, x):
    return self.embed.attend(x)


@pytest.mark.parametrize(
  ("make", "got"),
  [
    (lambda embed: embed.attend, "Embed.attend"),
    (lambda embed: embed, "Embed"),
    (lambda embed: nn.Embed(3, 4), "Embed"),
    (lambda embed: Tied(embed), "Tied"),
    (lambda embed: nn.Sequential([nn.Dense(4), embed.attend]), "Sequential"),
  ],
)
def test_an_output_layer_tied_to_the_embedding_is_refused(make, got):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
      embed = nn.Embed(7, 4)
      return MultiHead(make(embed))(embed(tokens))

  with pytest.raises(TypeError, match=f"got {got}, as for .* tied to the embedding"):
    Model().init(KEY, jnp.zeros(3, jnp.int32))


def test_heads_may_share_what_they_are_given_as_an_argument():
  class Projection(nn.Module):
    @nn.compact
    def __call__(self, x, embedding):
      return nn.Dense(4)(x) @ embedding.T

  class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
      embed = nn.Embed(7, 4)
      return MultiHead(Projection(), 2)(embed(tokens), embed.embedding)

  tokens = jnp.arange(3)
  params = Model().init(KEY, tokens)["params"]

  def loss(params, half):
    return (getattr(Model().apply({"params": params}, tokens), half) ** 2).sum()

  grad = jax.jit(jax.grad(loss), static_argnums=1)
  shared, own = (grad(params, half) for half in ("shared", "own"))
  assert shared["Embed_0"]["embedding"][3:].any()  # rows that only the heads see
  assert not own["Embed_0"]["embedding"].any()


@pytest.mark.parametrize(
  ("head", "num_heads", "error", "message"),
  [
    (nn.Dense, 2, TypeError, r"Write an instance, such as MultiHead\(nn.Dense\(10\)\)"),
    (jnp.tanh, 2, TypeError, "Write an instance"),
    (nn.Dense(3), 0, ValueError, "num_heads=...\\) must be at least 1, got 0"),
    (nn.Dense(3), 2.0, TypeError, "num_heads=...\\) must be an integer"),
    (nn.Dense(3), True, TypeError, "num_heads=...\\) must be an integer"),
    (nn.Dropout(0.5, deterministic=True), 2, ValueError, "must have parameters"),
  ],
)
def test_bad_arguments_are_named(head, num_heads, error, message):
  with pytest.raises(error, match=message):
    MultiHead(head, num_heads).init(KEY, X)


def test_parameters_of_more_heads_are_refused():
  variables = init(MultiHead(nn.Dense(3), 4))
  with pytest.raises(ValueError, match=r"leading axes \[\(4,\)\], got 3"):
    apply(MultiHead(nn.Dense(3), 3), variables, X)


# Prediction


LOG_WEIGHTS = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))


class Tasks(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return {
      "policy": MultiHead(nn.Dense(3), 4, name="policy")(x),
      "extra": (x, MultiHead(nn.Dense(1), 4, name="value")(x)),
    }


def test_predict_applies_the_model_and_mixes_the_heads():
  variables = init(Net())
  heads = apply(Net(), variables, X)
  expected = alrao.mixture_log_probs(heads, LOG_WEIGHTS)
  # What is compiled in one piece is rounded otherwise.
  assert_close(predict(Net(), variables, LOG_WEIGHTS, X, train=False), expected, 1e-6)
  compiled = jax.jit(functools.partial(predict, Net()))
  assert_close(compiled(variables, LOG_WEIGHTS, X), expected, 1e-5)
  mean = predict(Net(), variables, LOG_WEIGHTS, X, output="mean")
  assert_close(mean, alrao.mixture_mean(heads, LOG_WEIGHTS), 1e-6)
  best = predict(
    Net(), variables, LOG_WEIGHTS, X, output=lambda heads, log_a: heads.shared[-1]
  )
  assert_close(best, heads.shared[3], 1e-6)


def test_predict_takes_log_weights_by_path_for_several_multi_heads():
  variables = init(Tasks())
  outputs = apply(Tasks(), variables, X)
  other = LOG_WEIGHTS[::-1]
  predictions = predict(
    Tasks(),
    variables,
    {"policy": LOG_WEIGHTS, "extra/1": other},
    X,
    output={"policy": "log_probs", "extra/1": "mean"},
  )
  assert_equal(
    predictions,
    {
      "policy": alrao.mixture_log_probs(outputs["policy"], LOG_WEIGHTS),
      "extra": (X, alrao.mixture_mean(outputs["extra"][1], other)),
    },
  )


@pytest.mark.parametrize(
  ("model", "log_weights", "output", "error", "message"),
  [
    (
      nn.Dense(3),
      LOG_WEIGHTS,
      "mean",
      ValueError,
      "needs a model that returns HeadOut",
    ),
    (Tasks(), LOG_WEIGHTS, "mean", ValueError, "Write log_weights={'extra/1': ..., 'p"),
    (Tasks(), {"policy": LOG_WEIGHTS}, "mean", ValueError, r"got \['policy'\]"),
    (
      Net(),
      LOG_WEIGHTS,
      "logits",
      ValueError,
      "one of .*'log_probs', 'mean'.*'logits'",
    ),
    (Net(), LOG_WEIGHTS, None, TypeError, "or a function .*, got NoneType"),
  ],
)
def test_predict_names_what_is_wrong(model, log_weights, output, error, message):
  variables = init(model)
  with pytest.raises(error, match=message):
    predict(model, variables, log_weights, X, output=output)


# TrainState


def test_train_state_does_what_the_optimizer_does():
  params = init(MultiHead(nn.Dense(3), 4))["params"]
  tx = alrao.alrao(KEY, optax.trace(0.9))
  state = TrainState.create(apply_fn=None, params=params, tx=tx)
  opt_state = tx.init(params)
  for step in range(3):
    grads = jax.tree.map(jnp.ones_like, params)
    log_likelihoods = jnp.arange(4.0) - 5.0
    state = state.apply_gradients(grads=grads, head_log_likelihoods=log_likelihoods)
    updates, opt_state = tx.update(
      grads, opt_state, params, head_log_likelihoods=log_likelihoods
    )
    params = optax.apply_updates(params, updates)
    assert state.step == step + 1 and state.tx is tx
  assert_equal((state.params, state.opt_state), (params, opt_state))


def test_train_state_compiles_once():
  class State(TrainState):
    batch_stats: dict

  variables = init(Net())
  state = State.create(apply_fn=Net().apply, tx=alrao.alrao(KEY), **variables)
  labels = jnp.arange(6) % 3
  traces = []

  @jax.jit
  def train_step(state, key):
    traces.append(None)

    def loss_fn(params):
      variables = {"params": params, "batch_stats": state.batch_stats}
      heads, new = state.apply_fn(
        variables, X, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
      )
      log_weights = alrao.log_weights(state.opt_state)
      loss, info = alrao.classification_loss(heads, labels, log_weights)
      return loss, (info, new)

    grads, (info, new) = jax.grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(
      grads=grads,
      head_log_likelihoods=info.head_log_likelihoods,
      batch_stats=new["batch_stats"],
    )

  new = state
  for i in range(3):
    new = train_step(new, jax.random.key(i))
  assert new.step == 3 and len(traces) <= 2  # Flax's first step is a Python int
  assert jax.tree.structure(new) == jax.tree.structure(state)
  for old, changed in zip(
    *map(jax.tree.leaves, (state.params, new.params)), strict=True
  ):
    assert not np.array_equal(old, changed)
  assert new.batch_stats["out"]["alrao_heads"]["BatchNorm_0"]["mean"].any()


def test_train_state_hands_over_other_arguments():
  def update(updates, state, params=None, *, value, head_log_likelihoods=None):
    return jax.tree.map(lambda x: -value * x, updates), state

  tx = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
  state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx)
  grads = {"w": jnp.ones(2)}
  new = state.apply_gradients(grads=grads, extra_args={"value": 0.25})
  assert_equal(new.params, {"w": jnp.full(2, 0.75)})
  assert new.tx is tx
  other = state.apply_gradients(
    grads=grads,
    head_log_likelihoods=jnp.zeros(3),
    extra_args={"value": 0.5},
    tx=optax.sgd(1.0),
  )
  assert_equal(other.params, {"w": jnp.full(2, 0.5)})
  assert other.tx is not tx


def test_train_state_without_extra_arguments_is_flax_own():
  params, tx = {"w": jnp.ones(2)}, optax.sgd(0.1, momentum=0.9)
  states = [
    kind.create(apply_fn=None, params=params, tx=tx).apply_gradients(grads=params)
    for kind in (TrainState, train_state.TrainState)
  ]
  assert_equal(states[0].params, states[1].params)
  assert_equal(states[0].opt_state, states[1].opt_state)


def test_train_state_overwrites_with_gradients_as_flax_does():
  statistics = "_overwrite_with_gradient"
  params = {"params": {"out": {"alrao_heads": {"b": jnp.ones(2)}}}}
  params[statistics] = {"scale": jnp.ones(3)}
  grads = {**params, statistics: {"scale": jnp.full(3, 7.0)}}
  state = TrainState.create(apply_fn=None, params=params, tx=alrao.alrao(KEY))
  new = state.apply_gradients(grads=grads, head_log_likelihoods=jnp.array([-1.0, -2.0]))
  assert_equal(new.params[statistics], grads[statistics])
  heads = params["params"]["out"]["alrao_heads"]["b"]
  assert (new.params["params"]["out"]["alrao_heads"]["b"] < heads).all()


def test_train_state_names_an_optimizer_that_takes_no_extra_arguments():
  tx = optax.GradientTransformation(optax.init_empty_state, lambda u, s, p=None: (u, s))
  state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx)
  with pytest.raises(TypeError, match=r"got \['head_log_likelihoods'\], which this tx"):
    state.apply_gradients(grads=state.params, head_log_likelihoods=jnp.zeros(2))


def test_train_state_with_alrao_asks_for_head_log_likelihoods():
  params = init(MultiHead(nn.Dense(3), 2))["params"]
  state = TrainState.create(apply_fn=None, params=params, tx=alrao.alrao(KEY))
  with pytest.raises(TypeError, match="head_log_likelihoods"):
    state.apply_gradients(grads=params)
