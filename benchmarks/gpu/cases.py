"""The measured models: sizes, random weights with a fixed seed, and their latents.

Rules of this file:
- StyleGAN2 has its own channel table (config F), the ensemble has 10 classifiers. `TINY` rehearses the kit on a CPU.
- The same case always has the same weights and latents, so that two runs differ only in their times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import floor
import random_models
import torch
from torch import Tensor

from labelmint.models.generator import Generator
from labelmint.models.interpreter import InterpreterSpec, StyleInterpreter
from labelmint.models.layout import channels_of
from labelmint.models.stylegan2 import StyleGAN2Spec


@dataclass(frozen=True)
class Case:
    """A model and the batches in which it is measured."""

    resolution: int
    classes: int
    batches: tuple[int, ...] = (1, 4, 16)
    tiny: bool = False

    @property
    def name(self) -> str:
        return f"r{self.resolution}_k{self.classes}"

    @property
    def generator_spec(self) -> StyleGAN2Spec:
        if self.tiny:
            return StyleGAN2Spec(16, 16, 2, self.resolution, {2**i: 16 for i in range(2, self.resolution.bit_length())})
        return random_models.stylegan2_spec(self.resolution)

    @property
    def interpreter_spec(self) -> InterpreterSpec:
        channels = channels_of("paper", self.generator_spec.taps)
        heads = 2 if self.tiny else 10
        spec = random_models.interpreter_spec(self.resolution, channels, heads, num_classes=self.classes)
        return replace(spec, hidden=(32, 16)) if self.tiny else spec

    def build(self) -> tuple[Generator, StyleInterpreter]:
        generator = random_models.generator(self.generator_spec).requires_grad_(False)
        return generator, random_models.interpreter(self.interpreter_spec).requires_grad_(False)

    def latents(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the generator's inputs for the largest batch, without style mixing or truncation."""
        count, spec = max(self.batches), self.generator_spec
        latent = torch.randn(count, spec.z_dim, generator=torch.Generator().manual_seed(0)).to(device)
        crossover = torch.full((count, 1), spec.num_ws, dtype=torch.int32, device=device)
        return latent, latent, crossover, torch.ones(count, 1, device=device)

    def costs(self, part: str) -> tuple[int, int]:
        """Return the operations and bytes that a sample needs (`floor.py`)."""
        generator, interpreter = self.generator_spec, self.interpreter_spec
        counts = {
            "generator": (
                floor.generator_flops(generator),
                floor.generator_bytes(generator, dict(interpreter.channels)),
            ),
            "interpreter": (floor.interpreter_flops(interpreter), floor.interpreter_bytes(interpreter)),
        }
        if part == "pair":
            return tuple(map(sum, zip(*counts.values(), strict=True)))  # type: ignore[return-value]
        return counts[part]


# The most important first: a run that ends early has measured these.
CASES = tuple(Case(r, k) for k in (20, 34) for r in (1024, 512, 256))
TINY = (Case(16, 5, batches=(1, 2), tiny=True),)


def cases_of(tiny: bool) -> tuple[Case, ...]:
    return TINY if tiny else CASES


def case_named(name: str) -> Case:
    return next(case for case in (*CASES, *TINY) if case.name == name)
