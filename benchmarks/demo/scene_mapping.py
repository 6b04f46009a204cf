"""Fits the mapping network to the scene's parameters, before the images teach it and the synthesis network together.

Rules of this file:
- Images teach a mapping network slowly: 100,000 of them leave most colours half learned. The parameters of the scene
  are known for every latent and cost almost nothing, so the mapping network learns them first.
- The first layer begins with hinges: each unit bends at one quantile of one coordinate. Most parameters depend on few
  coordinates, and are then nearly linear in these units.
- w ends with a mean square of 1, which is what the synthesis network's affine layers begin with.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import cast

import torch
from torch import Tensor, nn
from tqdm import trange

from demo.faces.scene import appearance, geometry
from labelmint.models.generator import EqualizedLinear, Mapping

BATCH = 512
LEARNING_RATE = 6e-2
WARM_UP = 100  # steps
_SAMPLE = 20_000  # latents that the statistics are taken from


def scene_parameters(z: Tensor) -> Tensor:
    """Return all parameters of the scenes of z float32 [B,z_dim], [B,P]: first the geometry, then the appearance."""
    scenes = (geometry(z), appearance(z))
    return torch.cat([getattr(scene, field.name) for scene in scenes for field in fields(scene)], dim=1)[:, :, 0, 0]


def fit_mapping(mapping: Mapping, *, steps: int) -> float:
    """Fit `mapping` in place and return the share of the parameters' variance that it misses, in [0,1].

    A linear layer reads the parameters from w while it is fitted, and is then thrown away.
    """
    first, w_avg = cast(EqualizedLinear, mapping.layers[0]), cast(Tensor, mapping.w_avg)
    device = w_avg.device
    rng = torch.Generator().manual_seed(2)
    z_dim, w_dim = first.weight.shape[1], w_avg.shape[0]
    sample = scene_parameters(torch.randn(_SAMPLE, z_dim, generator=rng)).to(device)  # [N,P]
    mean, deviation = sample.mean(dim=0), sample.std(dim=0)  # [P] each
    _start_with_hinges(first)
    reader = nn.Linear(w_dim, sample.shape[1], device=device)
    optimizer = torch.optim.Adam([*mapping.parameters(), *reader.parameters()], betas=(0.9, 0.99))
    missed = 1.0
    for step in trange(steps, desc="mapping", mininterval=20):
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * cosine
        z = torch.randn(BATCH, z_dim, generator=rng).to(device)
        loss = (reader(mapping(z)) - (scene_parameters(z) - mean) / deviation).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        missed = float(loss.detach())
    _scale(mapping, torch.randn(_SAMPLE, z_dim, generator=rng).to(device))
    return missed


@torch.no_grad()
def _start_with_hinges(layer: EqualizedLinear) -> None:
    """Let each unit see one coordinate of z, and bend at a quantile of it, upwards and downwards in turn."""
    units, coordinates = layer.weight.shape
    knots = units // coordinates
    quantile = math.sqrt(2.0) * torch.erfinv(2.0 * (torch.arange(knots) + 0.5) / knots - 1.0)  # [knots]
    sign = 1.0 - 2.0 * (torch.arange(knots) % 2)  # [knots]
    layer.weight.zero_()
    for unit in range(knots * coordinates):
        coordinate, knot = divmod(unit, knots)
        layer.weight[unit, coordinate] = sign[knot] / layer.weight_gain
        layer.bias[unit] = -sign[knot] * quantile[knot] / layer.bias_gain


@torch.no_grad()
def _scale(mapping: Mapping, z: Tensor) -> None:
    """Scale the last layer so that w has a mean square of 1; leaky ReLU passes a positive factor on."""
    factor = mapping(z).square().mean().rsqrt()
    last = mapping.layers[-1]
    last.weight.mul_(factor)
    last.bias.mul_(factor)
