"""Feature layouts: which of a generator's tensors the Style Interpreter reads, by name.

Rules of this file:
- The same number of channels can mean different taps, so a layout's name is stored with the weights.
- Within a resolution, taps are concatenated in the order in which the network computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Tap(NamedTuple):
    """A place in the synthesis network: resolution and `const`, `conv0` or `conv1` (after the activation)."""

    resolution: int
    layer: str


_LAYERS = {
    "paper": ("conv0", "conv1"),  # every styled-convolution output
    "editgan-stylegan2": ("const", "conv0", "conv1"),  # and the constant input
}

LAYOUTS = tuple(_LAYERS)


def layers_of(layout: str) -> tuple[str, ...]:
    """The layers a layout taps at every resolution that has them; raises ValueError for an unknown name."""
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


def channels_of(layout: str, channels: Mapping[int, int]) -> dict[int, int]:
    """How many channels a layout takes at each resolution of a generator with `channels` feature channels."""
    wanted = layers_of(layout)
    result = {}
    for r, count in channels.items():
        present = {"const", "conv1"} if r == 4 else {"conv0", "conv1"}
        result[r] = count * len(present.intersection(wanted))
    return result
