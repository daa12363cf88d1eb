"""The papers' ImageNet rows: networks on ImageNet, or on ten of its classes.

    python -m benchmarks.imagenet run --network resnet50 --width 3 --workers 16
    python -m benchmarks.imagenet sweep --preset reduced
    python -m benchmarks.imagenet report

Every command has `--help`. Killed, `run --resume` and `sweep` go on after the last
checkpoint, of which an epoch has several. The data lies below `--data-dir` as Parquet
shards, as the Hugging Face hub has them, or as folders of images.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks import commands, sweeps
from benchmarks.devices import initialize_hosts, watch_hosts
from benchmarks.imagenet_experiments import Experiment, Machine, Workshop
from benchmarks.optimizers import OPTIMIZERS as ALL_OPTIMIZERS
from benchmarks.planning import refuse
from benchmarks.sweeps import Preset

PresetName = Literal["reduced", "reduced_wide", "draws", "accelerator", "paper"]

NETWORKS = ("alexnet", "densenet121", "resnet50")
OPTIMIZERS = ("alrao", "sgd", "adam")
_REDUCED = Experiment(
  dataset="imagenette",
  image_size=64,
  width=1 / 4,
  batch_size=32,
  max_epochs=3,
  num_train=2_000,
  num_validation=500,
  num_test=2_000,
)
_ACCELERATOR = Experiment(
  dataset="imagenette", image_size=128, batch_size=64, max_epochs=20
)


def _each(base: Experiment) -> tuple[Experiment, ...]:
  return tuple(dataclasses.replace(base, network=network) for network in NETWORKS)


PRESETS: dict[PresetName, Preset] = {
  # A CPU: narrow networks, small images, ten classes.
  "reduced": Preset(
    bases=_each(_REDUCED),
    optimizers=OPTIMIZERS,
    rates=(0.01, 0.1, 1.0),
  ),
  # A CPU: ResNet50 three times as wide, as in the papers' last row; one run of each.
  "reduced_wide": Preset(
    bases=(dataclasses.replace(_REDUCED, network="resnet50", width=3 / 4),),
    optimizers=OPTIMIZERS,
    rates=(0.01, 0.1, 1.0),
    num_seeds=1,
  ),
  # A CPU: of the network without normalisation, which draws of rates learn.
  "draws": Preset(
    bases=_each(_REDUCED)[:1],
    optimizers=("alrao", "alrao_guard", "schedule_free_alrao", "sgd", "adam"),
    rates=(0.01, 0.1, 1.0),
    num_seeds=30,
  ),
  # An accelerator: the papers' networks on ten classes for a while.
  "accelerator": Preset(bases=_each(_ACCELERATOR), optimizers=OPTIMIZERS),
  # Many accelerators: the papers' table.
  "paper": Preset(
    bases=(*_each(Experiment()), Experiment(network="resnet50", width=3.0)),
    optimizers=OPTIMIZERS,
    num_seeds=1,
  ),
}


@dataclasses.dataclass(frozen=True)
class Place:
  """Where the data is, and which host of several this is."""

  data_dir: Path | None = None
  """Folder below which the data lies, in any of its layouts."""
  machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()
  coordinator: str | None = None
  """Address and port of host 0, such as 10.0.0.1:8476, where there are several hosts.
  They share the folder of results."""
  num_hosts: int = 1
  """Number of hosts."""
  host: int = 0
  """Which host this is, from 0."""

  def workshop(self) -> Workshop:
    """Joins the other hosts, if there are any; returns a workshop.

    Raises:
      OptionError: There are no such hosts, or is no such machine.
    """
    if self.coordinator is not None:
      initialize_hosts(self.coordinator, self.num_hosts, self.host)
    for name, alone in (("num_hosts", 1), ("host", 0)):
      if self.coordinator is None and (value := getattr(self, name)) != alone:
        rule = f"must be given with --{name.replace('_', '-')} {value}"
        refuse("coordinator", rule, "none")
    return Workshop(self.data_dir, self.machine)


@dataclasses.dataclass(frozen=True)
class Run:
  """Train one network once with one optimizer, and test it."""

  experiment: Annotated[Experiment, tyro.conf.arg(name="")] = Experiment()
  place: Annotated[Place, tyro.conf.arg(name="")] = Place()
  out: Path = Path("out/imagenet")
  """Folder for the run's records and checkpoint."""
  resume: bool = False
  """Continue where a killed run left off; keep the results of one that has ended."""

  def __call__(self) -> None:
    """Trains, and prints the outcome."""
    workshop = self.place.workshop()
    with watch_hosts():
      commands.run(workshop, self.experiment, self.out, self.resume)


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Train a whole table, or what is missing of it."""

  preset: PresetName = "reduced"
  """Which table; see PRESETS in benchmarks/imagenet.py."""
  place: Annotated[Place, tyro.conf.arg(name="")] = Place()
  out: Path | None = None
  """Folder for records and checkpoints, by default out/imagenet_ and the preset's
  name."""
  networks: tuple[str, ...] = ()
  """Only these networks of the preset, to run it in pieces."""
  optimizers: tuple[str, ...] = ()
  """Only these optimizers of the preset."""

  def __call__(self) -> None:
    """Trains what is missing."""
    preset = sweeps.select(PRESETS[self.preset], self.networks, self.optimizers)
    out = self.out or Path("out", f"imagenet_{self.preset}")
    workshop = self.place.workshop()
    for base in preset.bases:
      for name in preset.optimizers:
        rate = preset.rates[0] if ALL_OPTIMIZERS[name].takes_rate else None
        # Before hours of training, not after.
        workshop.check(dataclasses.replace(base, optimizer=name, rate=rate))
    with watch_hosts():
      commands.sweep(workshop, preset, out)


if __name__ == "__main__":
  commands.main(Run | Sweep | commands.Report, __doc__)
