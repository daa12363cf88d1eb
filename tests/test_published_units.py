"""The units of published packages: which shares of the leaves are read right."""

import collections
from pathlib import Path

import numpy as np
import pytest
from published_cases import CASES, FURTHER, count_units
from test_units_jacobian import units_of

from alrao_jax._units import UnitOptions, unit_specs

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("exact", "coarse", "wrong", "error")


def unit_of_each_entry(leaf):
  """The right unit of each entry of a leaf."""
  grid = np.indices(leaf.shape)
  indices = [grid[axis] for axis in leaf.axes]
  sizes = [leaf.shape[axis] for axis in leaf.axes]
  if not indices:
    return np.zeros(leaf.shape, int)
  sizes[-1] //= leaf.tiles
  indices[-1] = indices[-1] % sizes[-1]
  return np.ravel_multi_index(indices, sizes)


def reported(spec):
  """What the library says of its guess: "assumed", "tie" or nothing."""
  return "assumed" if spec.assumed else "tie" if "tie" in spec.rule else ""


def classify(case):
  """What the library makes of each leaf: (kind, what is reported) by path."""
  try:
    specs = unit_specs(case.shapes, UnitOptions(unit_axis=case.unit_axis))
  except ValueError:
    return {leaf.path: ("error", "error") for leaf in case.leaves}
  groups = collections.defaultdict(list)
  for leaf in case.leaves:
    groups[leaf.group].append(leaf)
  owners = collections.defaultdict(set)  # the right groups that share one said group
  for leaf in case.leaves:
    owners[specs[leaf.path].group].add(leaf.group)
  kinds = {}
  for members in groups.values():
    largest = max(members, key=lambda leaf: np.prod(leaf.shape))
    rates = named_rates(largest, specs[largest.path])
    for leaf in members:
      spec = specs[leaf.path]
      kind = kind_of(leaf, spec, rates, specs[largest.path].group)
      if kind == "exact" and len(owners[spec.group]) > 1:
        kind = "coarse"
      kinds[leaf.path] = kind, reported(spec)
  return {leaf.path: kinds[leaf.path] for leaf in case.leaves}


def named_rates(leaf, spec):
  """Which of its group's rates each right unit has, all that are said to be its."""
  said = collections.defaultdict(set)
  named, right = units_of(spec).ravel().tolist(), unit_of_each_entry(leaf).ravel()
  for name, unit in zip(named, right.tolist(), strict=True):
    said[unit].add(name)
  return said


def kind_of(leaf, spec, rates, group):
  """Compares a leaf's rates with those of the largest leaf of its right group."""
  own = named_rates(leaf, spec)
  if any(len(names) > 1 for names in own.values()):
    return "wrong"  # finer than a unit, or across units
  if spec.group != group or any(own[unit] != rates[unit] for unit in own):
    return "wrong"  # apart from its layer
  if spec.num_units == count_units(leaf):
    return "exact"
  # One rate for a whole layer of a stack is no unit's.
  return "coarse" if leaf.axes[-1] in spec.axes else "wrong"


def shares(cases):
  """The shares of the leaves of each kind, of assumed ones and of reported ties."""
  leaves = [found for case in cases for found in classify(case).values()]
  counts = {kind: sum(k == kind for k, _ in leaves) for kind in KINDS}
  counts["silently wrong"] = sum(leaf == ("wrong", "") for leaf in leaves)
  for word in ("assumed", "tie"):
    counts[word] = sum(reported == word for _, reported in leaves)
  return {name: count / len(leaves) for name, count in counts.items()}


def test_the_table_is_large_and_well_formed():
  assert len(CASES) >= 80
  assert len({case.package for case in CASES}) >= 25
  for case in CASES:
    units = collections.defaultdict(set)
    for leaf in case.leaves:
      units[leaf.group].add(count_units(leaf))
    assert all(len(counts) == 1 for counts in units.values()), case.id
  assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES + FURTHER, ids=lambda case: case.id)
def test_no_leaf_is_silently_wrong(case):
  wrong = [path for path, kind in classify(case).items() if kind == ("wrong", "")]
  assert not wrong


def test_shares_over_all_packages():
  found = shares(CASES)
  assert found["exact"] >= 0.95
  assert found["silently wrong"] == 0
  assert found["assumed"] <= 0.10
  page = " ".join((ROOT / "docs" / "units.md").read_text().split())
  packages = {case.package for case in CASES}
  leaves = sum(len(case.leaves) for case in CASES)
  assert (
    f"{len(CASES)} layers and models of {len(packages)} packages with their right "
    f"units. Of their {leaves} parameters the rules read {found['exact']:.1%} exactly; "
    f"{found['assumed']:.1%} are assumed"
  ).replace("%", " %") in page


def test_further_packages_are_twenty_and_others():
  further = {case.package for case in FURTHER}
  assert len(further) == 20 and not further & {case.package for case in CASES}
