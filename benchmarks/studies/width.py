"""Figure 8 of the papers: a wider network, SGD at every rate, and Alrao."""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmarks.optimizers import SGD_RATES
from benchmarks.progress import Display
from benchmarks.studies import optimizers, pictures
from benchmarks.studies.arms import Images, Trainer, final_accuracy
from benchmarks.studies.runner import Arm
from benchmarks.studies.study import Study


@dataclasses.dataclass(frozen=True)
class Width(Study):
  """Held-out accuracy at width 1 and 3, by learning rate."""

  images: Annotated[Images, tyro.conf.arg(name="")] = Images(num_train=10_000, epochs=6)
  seeds: int = 3
  """Number of runs of each."""
  networks: tuple[str, ...] = ("small_cnn", "mlp")
  """Networks of benchmarks/models."""
  widths: tuple[float, ...] = (1.0, 3.0)
  """Factors on their channels."""
  out: Path = Path("out/studies/width")
  """Folder for records, numbers and picture."""

  def measure(self) -> list[str]:
    """Trains what is missing; writes the picture; returns its numbers."""
    arms = []
    for network in self.networks:
      for width in self.widths:
        options = {"network": network, "width": width}
        name = f"{network}-x{width:g}"
        arms.append(Arm(f"alrao-{name}", optimizers.ALRAO, "alrao", **options))
        for rate in SGD_RATES:
          label = f"sgd-{rate:g}-{name}"
          arms.append(Arm(label, optimizers.SGD, "sgd", rate, **options))
    with Display() as display:
      trainer = Trainer("width", self.images, self.out, display, used=self.used)
      runs = trainer.run(arms, range(self.seeds))
    scores: dict[tuple, list[float]] = {}
    for run in runs:
      key = tuple(run.config[name] for name in ("network", "width", "rate"))
      scores.setdefault(key, []).append(final_accuracy(run))
    _draw(self, scores)
    return _table(self, scores)


def _table(study: Width, scores: dict[tuple, list[float]]) -> list[str]:
  columns = [(n, w) for n in study.networks for w in study.widths]
  lines = [
    "Held-out accuracy after the last epoch, % (a failed run counts as 10):",
    "",
    "| | " + " | ".join(f"{n}, width {w:g}" for n, w in columns) + " |",
    "|" + " --- |" * (len(columns) + 1),
  ]
  for rate in (None, *SGD_RATES):
    cells = []
    for column in columns:
      values = 100 * np.array(scores[*column, rate])
      cells.append(f"{values.mean():.1f} ± {values.std(ddof=1):.1f}")
    label = "Alrao" if rate is None else f"SGD {rate:g}"
    lines.append(f"| {label} | " + " | ".join(cells) + " |")
  return lines


def _draw(study: Width, scores: dict[tuple, list[float]]) -> None:
  figure, axes = pictures.subplots(len(study.networks))
  for axis, network in zip(axes, study.networks, strict=True):
    for i, width in enumerate(study.widths):
      means = [100 * np.mean(scores[network, width, rate]) for rate in SGD_RATES]
      axis.plot(SGD_RATES, means, "o-", color=f"C{i}", label=f"SGD, width {width:g}")
      alrao = 100 * np.array(scores[network, width, None])
      axis.axhline(
        alrao.mean(), color=f"C{i}", linestyle="--", label=f"Alrao, width {width:g}"
      )
      low, high = alrao.mean() - alrao.std(ddof=1), alrao.mean() + alrao.std(ddof=1)
      axis.axhspan(low, high, color=f"C{i}", alpha=0.15, linewidth=0)
    axis.set(
      xscale="log", xlabel="learning rate", ylabel="held-out accuracy, %", title=network
    )
    axis.legend(fontsize=8)
  pictures.save(figure, study.out / "width.png")
