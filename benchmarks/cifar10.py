"""The papers' main table: networks on CIFAR-10, Alrao beside what users would pick.

    python -m benchmarks.cifar10 run --network vgg19 --optimizer alrao
    python -m benchmarks.cifar10 sweep --preset reduced
    python -m benchmarks.cifar10 report

Every command has `--help`. Killed, `run --resume` and `sweep` go on after the last
whole epoch. All of it works on scikit-learn's digits too, without any files.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks import commands, sweeps
from benchmarks.experiments import Experiment, Workshop
from benchmarks.optimizers import IMAGE_OPTIMIZERS, PEERS
from benchmarks.sweeps import Preset

PresetName = Literal["reduced", "tier_a", "tier_b", "tier_c", "paper"]


def _papers(networks_and_widths, **options) -> tuple[Experiment, ...]:
  return tuple(
    Experiment(network=network, width=width, **options)
    for network, width in networks_and_widths
  )


_SMALL = Experiment(
  network="small_cnn",
  num_train=10_000,
  num_validation=2_000,
  max_epochs=10,
)

PRESETS: dict[PresetName, Preset] = {
  # Minutes on two cores, from whatever data there is.
  "reduced": Preset(
    bases=(
      Experiment(
        network="small_cnn",
        num_train=4_000,
        num_validation=1_000,
        num_test=2_000,
        max_epochs=5,
      ),
    ),
    optimizers=("alrao", "sgd", "adam", *PEERS, "sgd_tuned"),
    without_data={
      "dataset": "digits",
      "num_train": None,
      "num_validation": None,
      "num_test": None,
    },
  ),
  # A CPU, narrow versions of the papers' networks.
  "tier_a": Preset(
    bases=_papers(
      [
        ("mobilenet_v2", 1 / 8),
        ("vgg19", 1 / 4),
        ("googlenet", 1 / 8),
        ("mobilenet_v2", 3 / 8),
        ("vgg19", 3 / 4),
        ("googlenet", 3 / 8),
      ],
      num_train=2_000,
      num_validation=1_000,
      num_test=5_000,
      max_epochs=5,
    ),
    optimizers=("alrao", "sgd", "adam"),
  ),
  # A CPU, all optimizers on one small network.
  "tier_b": Preset(
    bases=(_SMALL, dataclasses.replace(_SMALL, norm="none")),
    optimizers=IMAGE_OPTIMIZERS,
  ),
  # An accelerator, the papers' networks for a while.
  "tier_c": Preset(
    bases=_papers(
      [("mobilenet_v2", 1.0), ("googlenet", 1.0), ("vgg19", 1.0)], max_epochs=20
    ),
    optimizers=("alrao", "sgd", "adam"),
    rates=(1e-1, 1e-2),
    num_rate_seeds=3,
  ),
  # The papers' whole table.
  "paper": Preset(
    bases=_papers(
      (network, width)
      for network in ("mobilenet_v2", "googlenet", "vgg19")
      for width in (1.0, 3.0)
    ),
    optimizers=IMAGE_OPTIMIZERS,
  ),
}


@dataclasses.dataclass(frozen=True)
class Data:
  """Where the data is."""

  data_dir: Path | None = None
  """Folder below which CIFAR-10 lies, in any of its layouts."""
  download: bool = False
  """Download CIFAR-10 where there is none."""

  def workshop(self) -> Workshop:
    """Returns a workshop that looks there."""
    return Workshop(self.data_dir, self.download)


@dataclasses.dataclass(frozen=True)
class Run:
  """Train one network once with one optimizer, and test it."""

  experiment: Annotated[Experiment, tyro.conf.arg(name="")] = Experiment()
  data: Annotated[Data, tyro.conf.arg(name="")] = Data()
  out: Path = Path("out/cifar10")
  """Folder for the run's records and checkpoint."""
  resume: bool = False
  """Continue where a killed run left off; keep the results of one that has ended."""

  def __call__(self) -> None:
    """Trains, and prints the outcome."""
    commands.run(self.data.workshop(), self.experiment, self.out, self.resume)


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Train a whole table, or what is missing of it."""

  preset: PresetName = "reduced"
  """Which table; see PRESETS in benchmarks/cifar10.py."""
  data: Annotated[Data, tyro.conf.arg(name="")] = Data()
  out: Path | None = None
  """Folder for records and checkpoints, by default out/ and the preset's name."""
  networks: tuple[str, ...] = ()
  """Only these networks of the preset, to run it in pieces."""
  optimizers: tuple[str, ...] = ()
  """Only these optimizers of the preset."""

  def __call__(self) -> None:
    """Trains what is missing."""
    preset = sweeps.select(PRESETS[self.preset], self.networks, self.optimizers)
    commands.sweep(self.data.workshop(), preset, self.out or Path("out", self.preset))


if __name__ == "__main__":
  commands.main(Run | Sweep | commands.Report, __doc__)
