"""A StyleGAN2 synthesis network in a form that can be exported: activations are modulated, weights stay constant.

Rules of this file:
- y = d * conv(x * s, W) + noise + bias with d = rsqrt(s^2 . Q + 1e-8), Q = sum of W^2 over the kernel. This equals
  the fused, weight-modulated form of the paper (Karras et al. 2020, section 2.2) and needs neither dynamic weights
  nor grouped convolutions. So the batch stays symbolic, and a sample never depends on the others of its batch.
- Noise is a constant buffer times a learned strength, so a seed always gives the same image.
- One network implements the three architectures of the paper's figure 7. They differ in their shortcuts and in the
  resolutions that have a ToRGB layer.
- Read the file from top to bottom: `Synthesis` -> `Block` -> `StyledConv`, `ToRGB`, `UpSkip`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping as MappingType
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labelmint.models.generator import EqualizedLinear, GeneratorSpec, leaky_relu
from labelmint.models.layout import Tap, taps_of

ARCHITECTURES = ("skip", "orig", "resnet")
BILINEAR = (1.0, 3.0, 3.0, 1.0)


@dataclass(frozen=True)
class StyleGAN2Spec(GeneratorSpec):
    """Adds the StyleGAN2 fields to those of every generator.

    `conv_clamp` bounds the convolutions' outputs (None: no bound). `resample_filter` is the FIR filter [F] of the
    upsampling in one direction; its sum may have any value but 0.
    """

    architecture: str = "skip"
    conv_clamp: float | None = None
    resample_filter: tuple[float, ...] = BILINEAR

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, not {self.architecture!r}")
        if not self.resample_filter or abs(sum(self.resample_filter)) < 1e-6:
            raise ValueError(f"a resample filter needs taps with a sum other than 0, not {self.resample_filter}")

    @property
    def taps(self) -> dict[Tap, int]:
        result = {Tap(4, "const"): self.channels[4]}
        for r in self.resolutions:
            for layer in ("conv1",) if r == 4 else ("conv0", "conv1"):
                result[Tap(r, layer)] = self.channels[r]
        return result

    def build_synthesis(self) -> Synthesis:
        return Synthesis(self)

    @classmethod
    def from_json(cls, data: MappingType[str, Any]) -> StyleGAN2Spec:
        taps = tuple(float(tap) for tap in data.get("resample_filter", BILINEAR))
        return super().from_json({**data, "resample_filter": taps})


class Synthesis(nn.Module):
    """Maps w's to an image, with feature taps."""

    def __init__(self, spec: StyleGAN2Spec) -> None:
        super().__init__()
        self.spec = spec
        self.const = nn.Parameter(torch.randn(spec.channels[4], 4, 4))
        self.blocks = nn.ModuleDict()
        previous: int | None = None
        for r in spec.resolutions:
            self.blocks[str(r)] = Block(previous, r, spec)
            previous = spec.channels[r]

    def forward(
        self, ws: Tensor, layout: str | None, resolution: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the blocks up to `resolution` (the whole network when None).

        ws float32 [B,num_ws,w_dim]. Returns image [B,C,r,r] and, unless `layout` is None, features by resolution.
        """
        taps: dict[Tap, Tensor] = {}
        x = self.const.expand(ws.shape[0], -1, -1, -1)  # [B,C,4,4]
        taps[Tap(4, "const")] = x
        image: Tensor | None = None
        layer = 0
        for r in self.spec.resolutions:
            block = self.blocks[str(r)]
            shortcut = None if block.skip is None else block.skip(x)  # [B,C_r,r,r]
            if block.conv0 is not None:
                x = block.conv0(x, ws[:, layer])
                taps[Tap(r, "conv0")] = x
                layer += 1
            x = block.conv1(x, ws[:, layer])
            taps[Tap(r, "conv1")] = x
            layer += 1
            if shortcut is not None:
                x = x + shortcut
            if block.to_rgb is not None:
                # ToRGB shares its w with the next block's first convolution.
                rgb = block.to_rgb(x, ws[:, layer])  # [B,C,r,r]
                image = rgb if image is None else upsample2(image, self.spec.resample_filter) + rgb
            if r == resolution:
                break
        assert image is not None
        return image, {} if layout is None else taps_of(layout, taps)


class Block(nn.Module):
    """One resolution: an up-convolution (none at 4x4), a convolution, and the architecture's shortcut or ToRGB."""

    def __init__(self, in_channels: int | None, resolution: int, spec: StyleGAN2Spec) -> None:
        super().__init__()
        out_channels = spec.channels[resolution]
        residual = spec.architecture == "resnet" and in_channels is not None
        # The two branches of a residual block are added. Each is scaled so that the sum has the variance of one branch.
        gain = math.sqrt(0.5) if residual else 1.0
        self.conv0 = None if in_channels is None else StyledConv(in_channels, resolution, spec, up=True)
        self.conv1 = StyledConv(out_channels, resolution, spec, up=False, gain=gain)
        self.skip = UpSkip(in_channels, out_channels, spec, gain=gain) if residual and in_channels is not None else None
        has_rgb = spec.architecture == "skip" or resolution == spec.resolution
        self.to_rgb = ToRGB(out_channels, spec) if has_rgb else None


class StyledConv(nn.Module):
    """Modulated 3x3 convolution with demodulation, constant noise, bias and leaky ReLU of gain sqrt 2."""

    def __init__(self, in_channels: int, resolution: int, spec: StyleGAN2Spec, *, up: bool, gain: float = 1.0) -> None:
        super().__init__()
        out_channels = spec.channels[resolution]
        self.up = up
        self.gain = gain
        self.clamp = None if spec.conv_clamp is None else spec.conv_clamp * gain
        self.resample_filter = spec.resample_filter
        self.affine = EqualizedLinear(spec.w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.weight_gain = 1.0 / math.sqrt(in_channels * 9)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x [B,in,r,r] (r/2 when `up`), w [B,w_dim] to [B,out,r,r]."""
        style = self.affine(w)  # [B,in]
        weight = self.weight * self.weight_gain  # [out,in,3,3]
        square = weight.square().sum(dim=(2, 3)).t()  # [in,out]
        demodulation = torch.rsqrt(style.square() @ square + 1e-8)  # [B,out]
        x = x * style[:, :, None, None].to(x.dtype)
        if self.up:
            x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)  # [B,out,r+1,r+1]
            x = blur(x, self.resample_filter)  # [B,out,r,r]
        else:
            x = F.conv2d(x, weight, padding=1)  # [B,out,r,r]
        x = x * demodulation[:, :, None, None].to(x.dtype)
        x = x + (self.noise_const * self.noise_strength).to(x.dtype)  # [r,r] over [B,out,r,r]
        x = x + self.bias[:, None, None].to(x.dtype)
        x = leaky_relu(x)
        if self.gain != 1.0:
            x = x * self.gain
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution without demodulation."""

    def __init__(self, in_channels: int, spec: StyleGAN2Spec) -> None:
        super().__init__()
        self.clamp = spec.conv_clamp
        self.affine = EqualizedLinear(spec.w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(spec.image_channels, in_channels, 1, 1))
        self.weight_gain = 1.0 / math.sqrt(in_channels)
        self.bias = nn.Parameter(torch.zeros(spec.image_channels))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x [B,in,r,r], w [B,w_dim] to [B,C,r,r]."""
        style = self.affine(w) * self.weight_gain  # [B,in]
        rgb = F.conv2d(x * style[:, :, None, None].to(x.dtype), self.weight) + self.bias[:, None, None]
        return rgb if self.clamp is None else rgb.clamp(-self.clamp, self.clamp)


class UpSkip(nn.Module):
    """The shortcut of a residual block: 1x1 convolution, then twofold upsampling."""

    def __init__(self, in_channels: int, out_channels: int, spec: StyleGAN2Spec, *, gain: float) -> None:
        super().__init__()
        self.resample_filter = spec.resample_filter
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.weight_gain = gain / math.sqrt(in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,in,r/2,r/2] to [B,out,r,r]."""
        return upsample2(F.conv2d(x, self.weight * self.weight_gain), self.resample_filter)


def blur(x: Tensor, resample_filter: Sequence[float] = BILINEAR) -> Tensor:
    """Apply the FIR filter to an up-convolution's output, [B,C,2r+1,2r+1] to [B,C,2r,2r].

    The 2D filter is the outer product of the filter with itself, normalised to sum 1 and multiplied by 4. It runs as
    two passes of gain 2. The padding is that of the reference: the image and the filtered image share their centre.
    """
    tap = _taps(resample_filter, x)  # [F]
    size, channels = len(resample_filter), x.shape[1]
    before, after = (size + 1) // 2 - 1, (size - 2) // 2
    if before != after:
        x, before = F.pad(x, (before, after, before, after)), 0
    x = F.conv2d(x, tap.view(1, 1, size, 1).expand(channels, 1, size, 1), padding=(before, 0), groups=channels)
    return F.conv2d(x, tap.view(1, 1, 1, size).expand(channels, 1, 1, size), padding=(0, before), groups=channels)


def upsample2(image: Tensor, resample_filter: Sequence[float] = BILINEAR) -> Tensor:
    """Upsample twofold by the filter, with zeros beyond the border: [B,C,r,r] to [B,C,2r,2r]."""
    if is_bilinear(resample_filter):
        # Bilinear interpolation is the same filter; a ring of zeros makes its border equal to the official one.
        padded = F.pad(image, (1, 1, 1, 1))
        return F.interpolate(padded, scale_factor=2.0, mode="bilinear", align_corners=False)[:, :, 2:-2, 2:-2]
    tap = _taps(resample_filter, image).flip(0)  # [F]; a transposed convolution does not flip
    size, channels = len(resample_filter), image.shape[1]
    first = size - 1 - (size + 1) // 2  # the first output of the full convolution that is kept
    crop = (-first, 2 - size + first)
    x = F.conv_transpose2d(
        image, tap.view(1, 1, size, 1).expand(channels, 1, size, 1), stride=(2, 1), groups=channels
    )  # [B,C,2r-2+F,r]
    x = F.conv_transpose2d(x, tap.view(1, 1, 1, size).expand(channels, 1, 1, size), stride=(1, 2), groups=channels)
    return F.pad(x, (*crop, *crop))


def is_bilinear(resample_filter: Sequence[float]) -> bool:
    total = sum(resample_filter)
    return len(resample_filter) == len(BILINEAR) and all(
        abs(tap / total - want / sum(BILINEAR)) < 1e-6 for tap, want in zip(resample_filter, BILINEAR, strict=True)
    )


def _taps(resample_filter: Sequence[float], like: Tensor) -> Tensor:
    """Return the filter at gain 2, flipped, because F.conv2d correlates and the reference convolves."""
    scale = 2.0 / sum(resample_filter)
    return torch.tensor([tap * scale for tap in reversed(resample_filter)], dtype=like.dtype, device=like.device)
