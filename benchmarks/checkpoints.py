"""Where a run stands after its last epoch, or segment of one, kept on disk by Orbax."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

PyTree = Any


class Checkpoints:
  """The newest checkpoint of one run; used as a context manager.

  A checkpoint is written aside and renamed, so that a process killed at any moment
  leaves either the old or the new one. Trees are kept as lists of their leaves, since
  only the program knows their types; leaves are arrays, no typed keys.
  """

  def __init__(self, folder: Path):
    """Opens the checkpoints below `folder`, which need not exist.

    Args:
      folder: One for each run.
    """
    options = ocp.CheckpointManagerOptions(
      max_to_keep=1,
      # A kill shall lose the segment under way and not the one before.
      enable_async_checkpointing=False,
    )
    self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: object) -> None:
    self._manager.close()

  def save(self, steps: int, tree: PyTree, notes: dict[str, Any]) -> None:
    """Keeps `tree` and `notes` (JSON) as the state after `steps`; drops the one before.

    Args:
      steps: Larger than at any call before.
      tree: Any pytree of arrays.
      notes: What else it takes to go on.
    """
    args = ocp.args.Composite(
      leaves=ocp.args.StandardSave(_filled(jax.tree.leaves(tree))),
      notes=ocp.args.JsonSave(notes),
    )
    self._manager.save(steps, args=args)
    self._manager.wait_until_finished()

  def restore(self, like: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
    """Returns what was saved last, or None if nothing was.

    Args:
      like: Tree of arrays of the structure, shapes and dtypes of the saved one.
    """
    steps = self._manager.latest_step()
    if steps is None:
      return None
    leaves, treedef = jax.tree.flatten(like)
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _filled(leaves))
    args = ocp.args.Composite(
      leaves=ocp.args.StandardRestore(shapes), notes=ocp.args.JsonRestore()
    )
    found = self._manager.restore(steps, args=args)
    restored = iter(found["leaves"])
    leaves = [next(restored) if leaf.size else leaf for leaf in leaves]
    return jax.tree.unflatten(treedef, leaves), found["notes"]


def delete(folder: Path) -> None:
  """Deletes the checkpoints below `folder`, if there are any.

  Args:
    folder: One for each run; the one above is deleted with the last of them.
  """
  shutil.rmtree(folder, ignore_errors=True)
  with contextlib.suppress(OSError):
    folder.parent.rmdir()


def _filled(leaves: list[Any]) -> list[Any]:
  """Orbax refuses arrays without entries."""
  return [leaf for leaf in leaves if leaf.size]
