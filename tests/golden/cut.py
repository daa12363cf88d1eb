"""Cuts the small file `traces.npz` of this folder out of the full reference traces.

    python tests/golden/cut.py FOLDER_OF_FULL_TRACES

The full traces are numbers only: arrays that the authors' PyTorch implementation of
Alrao gave in float64, from data and parameters that the files themselves hold. The cut
keeps the variants that this library should reproduce:

- the switch: four regimes, both thetas, all 500 observations, and the weights after
  0, 1, 2, 5, 10, 20, 50, 100, 200, 500 of them;
- training: 50 mini-batches, initial parameters, rates; by variant the losses and
  posteriors of every step and the parameters after 1, 2, 10 and 50 steps; and how far
  a relative change of 1e-13 at the start moves the last parameters (relative to each
  array's largest entry) and the log-posteriors (`sensitivity`).
- training of a convolutional network with batch normalisation: five steps;
- rates: which parameters of a layer share a rate (`rates/LAYER/PARAMETER`, equal
  integers for equal rates).

Keys are those of the full files, behind the file's name; layouts are PyTorch's (rows
of a weight matrix are units). The JSON beside each full file says what each key is.
"""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

REGIMES = ("rotating", "neginf", "n2", "n1")
ROWS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)
# What training starts from, and the variants that are targets.
COMMON = ("init/", "lr/", "x", "y")
PARTS = ("loss", "head_loss", "logposterior", "step")
VARIANTS = {
  "public_mlp_class": ("sgd", "sgd_theta0.999", "sgd_wd", "sgd_n1", "sgd_n2"),
  "public_mlp_class_adam": ("adam_eps1e-30", "adam_eps1e-30_wd"),
  "public_mlp_reg_D1": ("sgd", "sgd_n1"),
  "public_mlp_reg_D3": ("sgd", "sgd_n1"),
  "public_mlp_reg_D3_s2_0.25": ("sgd", "sgd_n1"),
}


def full_folder():
  """The full traces: ALRAO_GOLDEN_DIR, or shared/golden beside the project."""
  default = ROOT.parent / "shared" / "golden"
  return Path(os.environ.get("ALRAO_GOLDEN_DIR") or default)


def cut_switch(full):
  """The rows of four regimes of `public_switch`."""
  kept = {"public_switch/rows": np.array(ROWS)}
  for regime in REGIMES:
    kept[f"public_switch/{regime}/logpx"] = full[f"{regime}/logpx"]
    for theta in (0.999, 0.9999):
      for part in ("logw", "logposterior"):
        key = f"{regime}/theta{theta}/f64/{part}"
        kept[f"public_switch/{key}"] = full[key][list(ROWS)]
  for part in ("head_logp", "logposterior", "avg_logp"):
    kept[f"public_switch/mix/{part}"] = full[f"mix/{part}"]
  return kept


def cut_training(name, full, about):
  """The target variants of one file of training traces."""
  variants = VARIANTS[name]
  kept = {}
  for key in full.files:
    variant, _, rest = key.partition("/")
    # Internal states of the reference's optimizers are no targets.
    state = any(part in key for part in ("momentum_buffer", "exp_avg"))
    # The Adam file repeats the other classifier's data.
    common = ("lr_adam/",) if name.endswith("adam") else COMMON
    if key.startswith(common):
      kept[f"{name}/{key}"] = full[key]
    elif variant in variants and rest.startswith(PARTS) and not state:
      kept[f"{name}/{key}"] = full[key]
  for variant in variants:
    moved = about["sensitivity"][variant]
    kept[f"{name}/{variant}/sensitivity"] = np.array(
      [moved["param_rel_dev_end_per_1e-13"], moved["max_dlogposterior"]]
    )
  return kept


# Layers that exist in Flax too.
LAYERS = (
  "linear(5->4)",
  "linear_nobias",
  "conv2d(3->6,k3)",
  "conv2d_depthwise(8)",
  "embedding(12x6)",
  "batchnorm2d(6)",
  "layernorm(6)",
  "groupnorm(2,6)",
  "conv1d(3->6)",
  "conv3d(3->4)",
  "convtranspose2d(3->6)",
  "gru(6->7)",
  "rnn_tanh(6->7)",
)
NETWORKS = ("public_conv", "public_lstm")


def labels(arrays):
  """Equal integers for equal numbers, across several arrays."""
  flat = np.concatenate([array.ravel() for array in arrays.values()])
  inverse = np.unique(flat, return_inverse=True)[1]
  ends = np.cumsum([array.size for array in arrays.values()])[:-1]
  parts = zip(arrays.items(), np.split(inverse, ends), strict=True)
  return {key: part.reshape(array.shape) for (key, array), part in parts}


def cut_rates(folder):
  """Which rates are equal, in two networks and in single layers."""
  kept = {}
  for name in NETWORKS:
    with np.load(folder / f"{name}.npz") as full:
      rates = {k: v for k, v in full.items() if k.startswith("lr/") and v.ndim}
    del rates["lr/heads"]
    for key, value in labels(rates).items():
      kept[f"rates/{name}/{key.removeprefix('lr/')}"] = value
  structure = json.loads((folder / "structure.json").read_text())
  for name in LAYERS:
    found = {}
    for row in structure[name]["rows"]:
      shape, pattern = row["param_shape"], row["pattern"]
      axis = int(pattern[-1]) if pattern.startswith("one rate per index") else None
      if row["same_rates_as"] is not None:
        twin = found[row["same_rates_as"]]
        found[row["param"]] = twin.reshape(shape[0], -1)[:, 0]  # a bias
        continue
      offset = sum(array.size for array in found.values())
      if axis is None:
        found[row["param"]] = offset + np.arange(math.prod(shape)).reshape(shape)
      else:
        found[row["param"]] = offset + np.indices(shape)[axis]
    kept |= {f"rates/{name}/{key}": value for key, value in found.items()}
  return kept


def cut_convolution(full):
  """The first five steps of the convolutional network."""
  kept = {}
  for key in full.files:
    if key.startswith(("x", "y", "loss", "head_loss", "logposterior")):
      kept[f"public_conv/{key}"] = full[key][:6] if key[0] == "l" else full[key][:5]
    elif key.startswith(("init/", "lr/", "step1/", "step2/", "step5/")):
      if "num_batches" not in key:
        kept[f"public_conv/{key}"] = full[key]
  return kept


def cut(folder):
  """All that is kept, as a dict of arrays."""
  with np.load(folder / "public_switch.npz") as full:
    kept = cut_rates(folder) | cut_switch(full)
  with np.load(folder / "public_conv.npz") as full:
    kept |= cut_convolution(full)
  for name in VARIANTS:
    about = json.loads((folder / f"{name}.json").read_text())
    with np.load(folder / f"{name}.npz") as full:
      kept |= cut_training(name, full, about)
  return kept


if __name__ == "__main__":
  np.savez_compressed(HERE / "traces.npz", **cut(Path(sys.argv[1])))
