"""The model that each rival serves.

Rules of this file:
- The weights are the demo's, in eager torch. A seed's latent is drawn as labelmint draws it.
- `reference` is the published interpreter; `factored` is labelmint's torch module inside of the rival.
- An answer is one body of bytes: js_score float32, image uint8 [R,R,3], label uint8 [R,R], little endian.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from demo.committed import GENERATOR, INTERPRETER
from reference import ReferenceInterpreter

from labelmint.core.policy import latent_of
from labelmint.models.generator import to_uint8
from labelmint.models.store import load_generator, load_interpreter
from rivals.settings import Settings


@dataclass(frozen=True)
class Request:
    """One sample. Without style mixing, its crossover is after the last layer."""

    seed: int
    truncation_psi: float
    crossover: int


class Painter:
    """Draws and labels a batch."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self.generator = load_generator(GENERATOR)
        interpreter = load_interpreter(INTERPRETER)
        self.layout = interpreter.spec.layout
        self.interpreter = ReferenceInterpreter(interpreter) if settings.interpreter == "reference" else interpreter

    @torch.inference_mode()
    def arrays(
        self, seeds: Sequence[int], truncation_psi: npt.NDArray[np.float32], crossover: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        """Return image [B,R,R,3], label [B,R,R], js_score [B,1] of B seeds, truncations [B,1] and crossovers [B,1]."""
        z_dim = self.generator.spec.z_dim
        latent = torch.from_numpy(np.concatenate([latent_of(seed, z_dim) for seed in seeds]))  # [B,z]
        psi = torch.from_numpy(truncation_psi)
        image, features = self.generator(latent, latent, torch.from_numpy(crossover), psi, self.layout)
        label, _, js_score = self.interpreter(features)
        return to_uint8(image).numpy(), label.numpy(), js_score.numpy()

    def bodies(self, requests: Sequence[Request]) -> list[bytes]:
        """Return the answers to a batch of requests."""
        psi = np.array([[each.truncation_psi] for each in requests], np.float32)
        crossover = np.array([[each.crossover] for each in requests], np.int32)
        arrays = self.arrays([each.seed for each in requests], psi, crossover)
        return [
            score.tobytes() + image.tobytes() + label.tobytes() for image, label, score in zip(*arrays, strict=True)
        ]
