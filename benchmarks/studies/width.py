"""Figure 8 of the papers: a wider network, SGD at every rate, and Alrao."""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmarks import pictures
from benchmarks.methods import ALRAO, SGD, SGD_RATES
from benchmarks.studies._study import (
  Arm,
  ImageRunner,
  Images,
  Source,
  Study,
  final_accuracy,
)
from benchmarks.tables import markdown, spread

# Accuracies by network, width and rate, which is None for Alrao.
Scores = dict[tuple[str, float, float | None], list[float]]


@dataclasses.dataclass(frozen=True)
class WidthStudy(Study[Scores]):
  """Held-out accuracy at width 1 and 3, by learning rate."""

  name = "width"
  images: Annotated[Images, tyro.conf.arg(name="")] = Images(num_train=10_000, epochs=6)
  seeds: int = 3
  """Number of runs of each."""
  networks: tuple[str, ...] = ("small_cnn", "mlp")
  """Networks of benchmarks/models."""
  widths: tuple[float, ...] = (1.0, 3.0)
  """Factors on their channels."""
  out: Path = Path("out/studies/width")
  """Folder for records, numbers and picture."""

  def find(self, source: Source) -> Scores:
    """Returns accuracies by network, width and rate.

    Args:
      source: Where all runs come from.
    """
    arms = []
    for network in self.networks:
      for width in self.widths:
        options = {"network": network, "width": width}
        name = f"{network}-x{width:g}"
        arms.append(Arm(f"alrao-{name}", ALRAO, "alrao", **options))
        for rate in SGD_RATES:
          arms.append(Arm(f"sgd-{rate:g}-{name}", SGD, "sgd", rate, **options))
    scores: Scores = {}
    for run in ImageRunner(source, self.images).run(arms, range(self.seeds)):
      config = run.config
      key = (config["network"], config["width"], config["rate"])
      scores.setdefault(key, []).append(final_accuracy(run))
    return scores

  def table(self, found: Scores) -> list[str]:
    """Returns accuracies by rate.

    Args:
      found: The accuracies.
    """
    columns = [(n, w) for n in self.networks for w in self.widths]
    rows = [
      [
        "Alrao" if rate is None else f"SGD {rate:g}",
        *(spread(found[*column, rate], 1, 100) for column in columns),
      ]
      for rate in (None, *SGD_RATES)
    ]
    header = ["", *(f"{n}, width {w:g}" for n, w in columns)]
    return [
      "Held-out accuracy after the last epoch, % (a failed run counts as 10):",
      "",
      *markdown(header, rows),
    ]

  def draw(self, found: Scores, path: Path) -> None:
    """Draws SGD's accuracies by rate, and Alrao's as lines.

    Args:
      found: The accuracies.
      path: The PNG file.
    """
    figure, axes = pictures.subplots(len(self.networks))
    for axis, network in zip(axes, self.networks, strict=True):
      for i, width in enumerate(self.widths):
        means = [100 * np.mean(found[network, width, rate]) for rate in SGD_RATES]
        axis.plot(SGD_RATES, means, "o-", color=f"C{i}", label=f"SGD, width {width:g}")
        alrao = 100 * np.array(found[network, width, None])
        axis.axhline(
          alrao.mean(), color=f"C{i}", linestyle="--", label=f"Alrao, width {width:g}"
        )
        low, high = alrao.mean() - alrao.std(ddof=1), alrao.mean() + alrao.std(ddof=1)
        axis.axhspan(low, high, color=f"C{i}", alpha=0.15, linewidth=0)
      axis.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="held-out accuracy, %",
        title=network,
      )
      axis.legend(fontsize=8)
    pictures.save(figure, path)


STUDY = WidthStudy
