"""From an experiment's options to a `Plan`: what all tasks do alike."""

import hashlib
import json
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.engine import Plan
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.records import Record

NUM_SEEDS = 2**32


class OptionError(ValueError):
  """Options that make no experiment; the text says why."""


def refuse(name: str, rule: str, value: Any) -> NoReturn:
  """Raises the error for an option's value.

  Args:
    name: Name of the option.
    rule: What it must be.
    value: What it is.

  Raises:
    OptionError: Always.
  """
  raise OptionError(f"--{name.replace('_', '-')} {rule}, got {value}.")


def check_seed(seed: int) -> None:
  """Checks that no other seed draws the same numbers.

  Args:
    seed: The seed.

  Raises:
    OptionError: It is negative, or has more than 32 bits: of these,
      `jax.random.key` takes no notice.
  """
  if not 0 <= seed < NUM_SEEDS:
    refuse("seed", f"must be from 0 to {NUM_SEEDS - 1}", seed)


def check_seeds(count: int, at_least: int = 1) -> None:
  """Checks a number of runs, whose seeds count from 0.

  Args:
    count: The number.
    at_least: The smallest that makes sense.

  Raises:
    OptionError: It is smaller, or there are not as many seeds.
  """
  if not at_least <= count <= NUM_SEEDS:
    refuse("seeds", f"must be at least {at_least}, at most {NUM_SEEDS}", count)


def check_rate(optimizer: str, rate: float | None) -> None:
  """Checks that there is a rate for an optimizer that takes one, and else none.

  Args:
    optimizer: Name of the optimizer.
    rate: The rate.

  Raises:
    OptionError: There is none, or one too many.
  """
  takes_rate = OPTIMIZERS[optimizer].takes_rate
  if takes_rate and (rate is None or not 0 < rate < float("inf")):
    refuse("rate", f"must be positive for --optimizer {optimizer}", rate)
  if not takes_rate and rate is not None:
    refuse("rate", f"must be left out for --optimizer {optimizer}", rate)


def make_plan(
  title: list[str],
  config: Record,
  notes: Record,
  out: Path,
  *,
  patience: int,
) -> Plan:
  """Returns the plan of a run, under a name that no other options have.

  Args:
    title: What its name begins with.
    config: All its options, with ``optimizer``, ``rate``, ``seed`` and ``max_epochs``.
    notes: What else its records say beside the options.
    out: Folder of the results.
    patience: As in `Plan`.
  """
  digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
  rate = config["rate"]
  parts = [
    *title,
    config["optimizer"],
    *([f"{rate:g}"] if rate is not None else []),
    f"s{config['seed']}",
    digest[:8],
  ]
  return Plan(
    name="-".join(parts),
    config={**config, **notes},
    out=out,
    seed=config["seed"],
    rate=rate,
    max_epochs=config["max_epochs"],
    patience=patience,
  )
