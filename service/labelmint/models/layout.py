"""Feature layouts: a named choice of the generator's tensors that the Style Interpreter reads.

Rules of this file:
- Different taps can have the same number of channels, so the layout's name is stored with the weights.
- Within a resolution, taps are concatenated in the order in which the layout lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# No published network makes larger images. This limits objects whose size depends on a declared resolution only.
MAX_RESOLUTION = 4096


class Tap(NamedTuple):
    """A place in the synthesis network: resolution and layer.

    StyleGAN2: `const`, and `conv0`, `conv1` after the activation. StyleGAN1: `adain0`, `adain1` after the style, and
    `raw1`, the second convolution before noise and activation.
    """

    resolution: int
    layer: str


_LAYERS = {
    "paper": ("conv0", "conv1", "adain0", "adain1"),  # every styled-convolution or AdaIN output
    "editgan-stylegan2": ("const", "conv0", "conv1"),  # and the constant input
    "release-stylegan1": ("adain1", "raw1"),  # DatasetGAN's released code: its list `affine_layers`
}

LAYOUTS = tuple(_LAYERS)


def layers_of(layout: str) -> tuple[str, ...]:
    """Return the layers that a layout reads at each resolution that has them. Raises ValueError for an unknown name."""
    if layout not in _LAYERS:
        raise ValueError(f"unknown feature layout {layout!r}; known: {', '.join(LAYOUTS)}")
    return _LAYERS[layout]


def taps_of(layout: str, taps: Mapping[Tap, Tensor]) -> dict[int, Tensor]:
    """Concatenate a layout's taps per resolution: {r: [B,C_r,r,r]}, in ascending order of r."""
    wanted = layers_of(layout)
    features = {}
    for r in sorted({tap.resolution for tap in taps}):
        parts = [taps[Tap(r, layer)] for layer in wanted if Tap(r, layer) in taps]
        features[r] = torch.cat(parts, dim=1)
    return features


def channels_of(layout: str, taps: Mapping[Tap, int]) -> dict[int, int]:
    """Return the number of channels that a layout reads at each resolution, for the taps of `GeneratorSpec.taps`.

    Raises ValueError if the generator lacks a layer of the layout. The layout "paper" needs only one of its layers,
    because its layers belong to different architectures.
    """
    wanted = layers_of(layout)
    present = {tap.layer for tap in taps}
    if not present.intersection(wanted) or (layout != "paper" and not present.issuperset(wanted)):
        raise ValueError(
            f"layout {layout!r} reads the layers {', '.join(wanted)}; this generator has {', '.join(sorted(present))}"
        )
    result: dict[int, int] = {}
    for tap, channels in taps.items():
        result[tap.resolution] = result.get(tap.resolution, 0) + (channels if tap.layer in wanted else 0)
    return dict(sorted(result.items()))
