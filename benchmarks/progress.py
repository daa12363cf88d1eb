"""What a person sees of a run while it trains."""

from collections.abc import Sequence

import rich.console
import rich.progress

BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float]) -> str:
  """Returns one bar for each value in [0, 1].

  Args:
    values: Numbers in [0, 1], such as the weights of the heads.

  Example:
    >>> sparkline([0.0, 0.3, 0.7, 1.0])
    '▁▃▆█'
  """
  return "".join(BLOCKS[round(value * (len(BLOCKS) - 1))] for value in values)


class Display:
  """A progress bar for one run after the other; used as a context manager.

  The bar shows the speed, the loss, time left (to the maximum number of epochs)
  and the weight of each of Alrao's heads, from the slowest to the fastest. Where there
  is no terminal, every epoch is a line instead.
  """

  def __init__(self, console: rich.console.Console | None = None):
    """Makes the display.

    Args:
      console: Where to write, by default standard output.
    """
    self.console = console or rich.console.Console()
    self._live = self.console.is_terminal
    self._progress = rich.progress.Progress(
      rich.progress.TextColumn("{task.description}"),
      rich.progress.BarColumn(),
      rich.progress.TextColumn("epoch {task.fields[epoch]}"),
      rich.progress.TextColumn("{task.fields[speed]}"),
      rich.progress.TextColumn("{task.fields[loss]}"),
      rich.progress.TimeRemainingColumn(),
      rich.progress.TextColumn("{task.fields[heads]}"),
      console=self.console,
      transient=True,
      disable=not self._live,
    )
    self._task: rich.progress.TaskID | None = None
    self._name, self._examples = "", ""

  def __enter__(self) -> "Display":
    self._progress.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._progress.stop()

  def begin(self, name: str, examples: str, total: int, done: int) -> None:
    """Shows a new run in place of the one before.

    Args:
      name: Its name.
      examples: What it trains on, in the plural, whose number a second is its speed.
      total: Number of steps, if it runs to the maximum of epochs.
      done: Number of steps that it has done already.
    """
    if self._task is not None:
      self._progress.remove_task(self._task)
    self._name, self._examples = name, examples
    self._task = self._progress.add_task(
      name, total=total, completed=done, epoch="-", speed="", loss="", heads=""
    )

  def update(
    self,
    done: int,
    epoch: int,
    examples_per_second: float,
    loss: float,
    head_weights: Sequence[float],
  ) -> None:
    """Moves the bar.

    Args:
      done: Number of steps done in all.
      epoch: The epoch under way.
      examples_per_second: Speed in this epoch.
      loss: Loss of the last batch.
      head_weights: Weight of each head; empty without heads.
    """
    if self._task is not None:
      self._progress.update(
        self._task,
        completed=done,
        epoch=epoch,
        speed=f"{examples_per_second:,.0f} {self._examples}/s",
        loss=f"loss {loss:.3f}",
        heads=sparkline(head_weights),
      )

  def end_epoch(self, record: dict) -> None:
    """Prints an epoch's record, where there is no bar.

    Args:
      record: The epoch's record.
    """
    if not self._live:
      heads = sparkline(record["head_weights"][-1]) if record["head_weights"] else ""
      validation = "  ".join(
        f"{name.replace('_', ' ')} {value:.4f}"
        for name, value in record.items()
        if name.startswith("validation_")
      )
      self.console.print(
        f"{self._name}  epoch {record['epoch']}  "
        f"{record['examples_per_second']:,.0f} {self._examples}/s  "
        f"train loss {record['train_loss']:.4f}  {validation}  {heads}",
        highlight=False,
        soft_wrap=True,
      )

  def say(self, text: str) -> None:
    """Prints a line.

    Args:
      text: The line.
    """
    self.console.print(text, highlight=False, soft_wrap=True)
