"""A StyleGAN1 synthesis network in a form that can be exported: the generator of DatasetGAN's released weights.

Rules of this file:
- Instance normalisation is computed from explicit statistics, so that each sample has its own and the batch dimension
  stays symbolic.
- Noise is a constant buffer times a learned strength per channel, so a seed always gives the same image.
- Up to 64x64, a block repeats pixels and then convolves. From 128x128 on (`FUSED_FROM`), one transposed convolution
  does both. In either case, the blur [1,2,1] and then the bias follow.

Source: Karras et al. 2019, figure 1b. The conventions (gain sqrt 2, plain leaky ReLU, epsilon) are those of the PyTorch
port that DatasetGAN uses; tests compare with its reference vectors. That port's mapping applies the gain before the
activation. With its biases divided by sqrt 2, it equals `labelmint.models.generator.Mapping`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labelmint.models.generator import LEAK, SQRT2, EqualizedLinear, GeneratorSpec
from labelmint.models.layout import Tap, taps_of

FUSED_FROM = 128


@dataclass(frozen=True)
class StyleGAN1Spec(GeneratorSpec):
    """Adds no fields to those of every generator. The released models truncate the first 8 layers only."""

    @property
    def taps(self) -> dict[Tap, int]:
        return {Tap(r, layer): self.channels[r] for r in self.resolutions for layer in ("adain0", "raw1", "adain1")}

    def build_synthesis(self) -> Synthesis:
        return Synthesis(self)


class Synthesis(nn.Module):
    """Maps w's to an image, with feature taps."""

    def __init__(self, spec: StyleGAN1Spec) -> None:
        super().__init__()
        self.spec = spec
        self.const = nn.Parameter(torch.ones(spec.channels[4], 4, 4))
        self.const_bias = nn.Parameter(torch.zeros(spec.channels[4]))
        self.blocks = nn.ModuleDict()
        previous: int | None = None
        for r in spec.resolutions:
            self.blocks[str(r)] = Block(previous, r, spec)
            previous = spec.channels[r]
        self.to_rgb = Conv(spec.channels[spec.resolution], spec.image_channels, kernel=1, gain=1.0)

    def forward(self, ws: Tensor, layout: str | None) -> tuple[Tensor, dict[int, Tensor]]:
        """Map ws float32 [B,num_ws,w_dim] to image [B,C,R,R] and, unless `layout` is None, features by resolution."""
        taps: dict[Tap, Tensor] = {}
        x = (self.const + self.const_bias[:, None, None]).expand(ws.shape[0], -1, -1, -1)  # [B,C,4,4]
        for index, r in enumerate(self.spec.resolutions):
            block = self.blocks[str(r)]
            if block.conv0 is not None:
                x = block.conv0(x)  # [B,C_r,r,r]
            x = taps[Tap(r, "adain0")] = block.epilogue0(x, ws[:, 2 * index])
            x = taps[Tap(r, "raw1")] = block.conv1(x)
            x = taps[Tap(r, "adain1")] = block.epilogue1(x, ws[:, 2 * index + 1])
        return self.to_rgb(x), {} if layout is None else taps_of(layout, taps)


class Block(nn.Module):
    """One resolution: an up-convolution (none at 4x4) and a convolution, each with its epilogue."""

    def __init__(self, in_channels: int | None, resolution: int, spec: StyleGAN1Spec) -> None:
        super().__init__()
        channels = spec.channels[resolution]
        self.conv0 = None if in_channels is None else UpConv(in_channels, channels, resolution)
        self.epilogue0 = Epilogue(channels, resolution, spec.w_dim)
        self.conv1 = Conv(channels, channels, kernel=3, gain=SQRT2)
        self.epilogue1 = Epilogue(channels, resolution, spec.w_dim)


class Conv(nn.Module):
    """Equalised convolution that keeps the size, [B,in,r,r] to [B,out,r,r]."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, gain: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.weight_gain = gain / math.sqrt(in_channels * kernel**2)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.weight_gain, self.bias, padding=self.weight.shape[2] // 2)


class UpConv(nn.Module):
    """Equalised 3x3 convolution to twice the size, then the blur [1,2,1], then the bias."""

    def __init__(self, in_channels: int, out_channels: int, resolution: int) -> None:
        super().__init__()
        self.fused = resolution >= FUSED_FROM
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.weight_gain = SQRT2 / math.sqrt(in_channels * 9)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """x [B,in,r/2,r/2] to [B,out,r,r]."""
        weight = self.weight * self.weight_gain  # [out,in,3,3]
        if self.fused:
            # Repeating pixels and convolving equals a transposed convolution with the kernel summed over 2x2 shifts.
            wide = F.pad(weight.transpose(0, 1), (1, 1, 1, 1))  # [in,out,5,5]
            summed = wide[:, :, 1:, 1:] + wide[:, :, :-1, 1:] + wide[:, :, 1:, :-1] + wide[:, :, :-1, :-1]
            x = F.conv_transpose2d(x, summed, stride=2, padding=1)  # [B,out,r,r]
        else:
            x = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)  # [B,out,r,r]
        return blur(x) + self.bias[:, None, None]


class Epilogue(nn.Module):
    """Noise, leaky ReLU, instance normalisation, and the style as scale and shift (AdaIN)."""

    def __init__(self, channels: int, resolution: int, w_dim: int) -> None:
        super().__init__()
        self.noise_strength = nn.Parameter(torch.zeros(channels))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.affine = EqualizedLinear(w_dim, 2 * channels)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x [B,C,r,r], w [B,w_dim] to [B,C,r,r]."""
        x = x + self.noise_strength[:, None, None] * self.noise_const  # [C,r,r] over [B,C,r,r]
        x = F.leaky_relu(x, LEAK)
        x = x - x.mean(dim=(2, 3), keepdim=True)
        x = x * torch.rsqrt(x.square().mean(dim=(2, 3), keepdim=True) + 1e-5)
        scale, shift = self.affine(w)[:, :, None, None].chunk(2, dim=1)  # [B,C,1,1] each
        return x * (scale + 1.0) + shift


def blur(x: Tensor) -> Tensor:
    """Apply the filter [1,2,1] in both directions, with zeros beyond the border: [B,C,r,r]."""
    tap = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
    channels = x.shape[1]
    x = F.conv2d(x, tap.view(1, 1, 3, 1).expand(channels, 1, 3, 1), padding=(1, 0), groups=channels)
    return F.conv2d(x, tap.view(1, 1, 1, 3).expand(channels, 1, 1, 3), padding=(0, 1), groups=channels)
