"""Runs the files of an exported GPU interpreter on samples: a program of its own, for the check of an export.

Rules of this file:
- It imports the `interpreter.py` of the directory that it is given, and nothing of this package.
- It runs in float32, which shows an error of the kernel or of the weights as what it is.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import torch

FEATURES, OUTPUTS = "features.npz", "outputs.npz"
UNUSABLE = 3  # the exit code for weights that the kernel cannot run; stdout says why


def main(directory: Path, device: str) -> None:
    sys.path.insert(0, str(directory))
    kernel = importlib.import_module("interpreter")
    with np.load(directory / "interpreter.npz", allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    try:
        interpreter = kernel.GpuInterpreter(arrays, precision="float32", device=device)
    except ValueError as error:
        print(error)
        raise SystemExit(UNUSABLE) from None
    with np.load(directory / FEATURES) as archive:
        features = [torch.from_numpy(archive[name]).to(device) for name in archive.files]
    samples = [interpreter.run([level[row] for level in features]) for row in range(features[0].shape[0])]
    stacked = {name: torch.stack([sample[name] for sample in samples]).cpu().numpy() for name in interpreter.outputs}
    np.savez(directory / OUTPUTS, **stacked)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
