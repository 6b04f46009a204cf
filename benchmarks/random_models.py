"""Builds models of any size with random weights, for measurements that depend on shapes and not on the images.

Rules of this file:
- Weights preserve the variance of their inputs, so that no activation overflows or vanishes. The same size always has
  the same weights.
- StyleGAN2 has its own channel table (config F).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from labelmint.models.generator import Generator
from labelmint.models.interpreter import InterpreterSpec, StyleInterpreter, hidden_widths
from labelmint.models.layout import channels_of
from labelmint.models.stylegan2 import StyleGAN2Spec


def interpreter_spec(
    resolution: int, channels: Mapping[int, int], num_heads: int = 10, *, num_classes: int = 20
) -> InterpreterSpec:
    return InterpreterSpec(
        layout="paper",
        resolution=resolution,
        channels=channels,
        num_heads=num_heads,
        hidden=hidden_widths(num_classes),
        class_names=tuple(f"class_{i}" for i in range(num_classes)),
        palette=tuple((7 * i % 256, 31 * i % 256, 97 * i % 256) for i in range(num_classes)),
    )


def interpreter(spec: InterpreterSpec) -> StyleInterpreter:
    built = StyleInterpreter(spec)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            parameter.normal_(std=fan_in**-0.5, generator=random)
    return built.eval()


def generator(spec: StyleGAN2Spec) -> Generator:
    torch.manual_seed(0)
    return Generator(spec).eval()


def stylegan2_spec(resolution: int) -> StyleGAN2Spec:
    levels = [2**i for i in range(2, resolution.bit_length())]
    return StyleGAN2Spec(512, 512, 8, resolution, {r: min(512, 32768 // r) for r in levels})


def stylegan2_interpreter(resolution: int, num_classes: int, num_heads: int = 10) -> StyleInterpreter:
    """Return an ensemble that reads all layers of StyleGAN2 at this resolution."""
    channels = channels_of("paper", stylegan2_spec(resolution).taps)
    return interpreter(interpreter_spec(resolution, channels, num_heads, num_classes=num_classes))


def stylegan2(resolution: int, num_classes: int, num_heads: int = 10) -> tuple[Generator, StyleInterpreter]:
    """Return StyleGAN2 at this resolution, and an ensemble that reads all of its layers."""
    return generator(stylegan2_spec(resolution)), stylegan2_interpreter(resolution, num_classes, num_heads)
