"""Text: Alrao beside what users would pick, on Penn Treebank or a text of one's own.

    python -m benchmarks.ptb run --level characters --optimizer alrao
    python -m benchmarks.ptb run --train my.txt --network decoder
    python -m benchmarks.ptb sweep --preset ptb_reduced
    python -m benchmarks.ptb report

Every command has `--help`. Killed, `run --resume` and `sweep` go on after the last
whole epoch.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks import commands, sweeps
from benchmarks.planning import OptionError
from benchmarks.sweeps import Preset
from benchmarks.text_experiments import Experiment, Workshop

PresetName = Literal[
  "ptb_reduced", "ptb_chars", "ptb_words", "ptb_transformer", "paper"
]

PRESETS: dict[PresetName, Preset] = {
  # Minutes on two cores.
  "ptb_reduced": Preset(
    bases=(
      Experiment(epoch_steps=100, max_epochs=3, num_validation=50_000, num_test=50_000),
    ),
    optimizers=("alrao", "alrao_fast", "sgd", "adam"),
    num_seeds=1,
  ),
  # A CPU, the papers' network, 3 passes through the text.
  "ptb_chars": Preset(
    bases=(Experiment(max_epochs=3),),
    optimizers=("alrao", "alrao_fast", "sgd", "adam"),
  ),
  # A CPU, a tenth of a pass.
  "ptb_words": Preset(
    bases=tuple(
      Experiment(
        level="words",
        output_layer=output_layer,
        epoch_steps=66,
        max_epochs=1,
        num_validation=20_000,
        num_test=20_000,
      )
      for output_layer in ("softmax", "class_factored")
    ),
    optimizers=("alrao", "alrao_fast", "sgd"),
    num_seeds=1,
  ),
  # A CPU, 1,000 steps of a transformer.
  "ptb_transformer": Preset(
    bases=(
      Experiment(
        network="decoder",
        dropout=0.0,
        epoch_steps=250,
        max_epochs=4,
        num_validation=100_000,
      ),
    ),
    optimizers=("alrao", "alrao_adam", "sgd", "sgd_momentum", "adamw_rates"),
    num_seeds=1,
  ),
  # The papers' row.
  "paper": Preset(
    bases=(Experiment(),),
    optimizers=("alrao", "alrao_fast", "sgd", "adam"),
  ),
}


@dataclasses.dataclass(frozen=True)
class Data:
  """Where the text is."""

  data_dir: Path | None = None
  """Folder below which ptb.{train,valid,test}.txt lie, compressed (.gz) or not."""
  train: Path | None = None
  """Another text to train on; alone, its last fifth validates and tests."""
  valid: Path | None = None
  """Text to validate with, beside --train."""
  test: Path | None = None
  """Text to test with, beside --train."""

  def workshop(self) -> Workshop:
    """Returns a workshop that reads it.

    Raises:
      OptionError: Some of the texts are given, but not those that are needed.
    """
    files = (self.train, self.valid, self.test)
    given = [path for path in files if path is not None]
    if given and len(given) < len(files) and given != [self.train]:
      raise OptionError("--train stands alone, or with both --valid and --test.")
    return Workshop(self.data_dir, given)


@dataclasses.dataclass(frozen=True)
class Run:
  """Train one network once with one optimizer, and test it."""

  experiment: Annotated[Experiment, tyro.conf.arg(name="")] = Experiment()
  data: Annotated[Data, tyro.conf.arg(name="")] = Data()
  out: Path = Path("out/ptb")
  """Folder for the run's records and checkpoint."""
  resume: bool = False
  """Continue where a killed run left off; keep the results of one that has ended."""

  def __call__(self) -> None:
    """Trains, and prints the outcome."""
    commands.run(self.data.workshop(), self.experiment, self.out, self.resume)


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Train a whole table, or what is missing of it."""

  preset: PresetName = "ptb_reduced"
  """Which table; see PRESETS in benchmarks/ptb.py."""
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
