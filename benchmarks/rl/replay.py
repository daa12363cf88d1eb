"""A replay buffer: a ring of transitions on the device."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Transitions(NamedTuple):
  """Steps of environments, numpy arrays or on the device, one entry each on axis 0.

  Attributes:
    observations: Before the step, (n, observation_size), float32.
    actions: Index of the action, (n,), int32.
    rewards: As the environment gives them, (n,), float32.
    next_observations: After the step, (n, observation_size), float32.
    terminated: Whether the step ended the episode for good, (n,), bool. An episode cut
      at its time limit has not terminated: it would have gone on.
  """

  observations: Any
  actions: Any
  rewards: Any
  next_observations: Any
  terminated: Any


class Replay(NamedTuple):
  """The newest transitions.

  Attributes:
    ring: As many as it can hold; the first `num_added` of them until it is full.
    num_added: Number of transitions added so far, int32.
  """

  ring: Transitions
  num_added: jax.Array


def empty(capacity: int, observation_size: int) -> Replay:
  """Returns a buffer without transitions.

  Args:
    capacity: Number of transitions that it can hold.
    observation_size: Number of entries of an observation.

  Example:
    >>> empty(100, 3).ring.observations.shape
    (100, 3)
  """
  ring = Transitions(
    observations=jnp.zeros((capacity, observation_size)),
    actions=jnp.zeros(capacity, jnp.int32),
    rewards=jnp.zeros(capacity),
    next_observations=jnp.zeros((capacity, observation_size)),
    terminated=jnp.zeros(capacity, bool),
  )
  return Replay(ring, jnp.zeros([], jnp.int32))


def add(replay: Replay, transitions: Transitions) -> Replay:
  """Returns the buffer with more transitions, in place of the oldest once it is full.

  Args:
    replay: The buffer.
    transitions: At most as many as it can hold.
  """
  capacity, num_new = len(replay.ring.actions), len(transitions.actions)
  places = (replay.num_added + jnp.arange(num_new, dtype=jnp.int32)) % capacity
  ring = jax.tree.map(
    lambda old, new: old.at[places].set(new), replay.ring, transitions
  )
  return Replay(ring, replay.num_added + num_new)


def sample(replay: Replay, key: jax.Array, batch_size: int) -> Transitions:
  """Returns transitions drawn uniformly, with replacement.

  Args:
    replay: A buffer that holds at least one.
    key: Random key.
    batch_size: Number of transitions to draw.
  """
  held = jnp.minimum(replay.num_added, len(replay.ring.actions))
  drawn = jax.random.randint(key, (batch_size,), 0, held)
  return jax.tree.map(lambda entries: entries[drawn], replay.ring)
