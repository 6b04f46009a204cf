"""A StyleGAN2 generator in the form that exports: activations are modulated, weights stay constant.

Rules of this file:
- y = d * conv(x * s, W) + noise + bias with d = rsqrt(s^2 . Q + 1e-8), Q = sum of W^2 over the kernel. This equals
  the fused, weight-modulated form of the paper (Karras et al. 2020, section 2.2) and needs neither dynamic weights
  nor grouped convolutions, so the batch stays symbolic and a sample never sees its neighbours.
- Noise is a constant buffer times a learned strength: a seed is an identity.
- Parameters are stored in the equalised form (Karras et al. 2018): multiplied by their gain where they are used.
- The network reads top down: `Generator` -> `Mapping`, `Synthesis` -> `Block` -> `StyledConv`, `ToRGB`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping as MappingType
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labelmint.models.layout import Tap, taps_of

SQRT2 = math.sqrt(2.0)
LEAK = 0.2


@dataclass(frozen=True)
class GeneratorSpec:
    """The dimensions that travel with the weights.

    `channels` maps a resolution (4, 8, ... R) to its number of feature channels.
    """

    z_dim: int
    w_dim: int
    mapping_layers: int
    resolution: int
    channels: MappingType[int, int]
    image_channels: int = 3
    mapping_lr_multiplier: float = 0.01

    def __post_init__(self) -> None:
        if self.resolution < 8 or self.resolution & (self.resolution - 1):
            raise ValueError(f"resolution must be a power of two of at least 8, not {self.resolution}")
        if sorted(self.channels) != self.resolutions:
            raise ValueError(
                f"channels must be given for the resolutions {self.resolutions}, not {sorted(self.channels)}"
            )

    @property
    def resolutions(self) -> list[int]:
        return [2**i for i in range(2, int(math.log2(self.resolution)) + 1)]

    @property
    def num_ws(self) -> int:
        """Number of w's the synthesis takes: one a styled convolution and one for the last ToRGB."""
        return 2 * len(self.resolutions)

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"channels": {str(r): c for r, c in self.channels.items()}}

    @classmethod
    def from_json(cls, data: MappingType[str, object]) -> GeneratorSpec:
        channels = data["channels"]
        assert isinstance(channels, dict)
        return cls(**{**data, "channels": {int(r): int(c) for r, c in channels.items()}})  # type: ignore[arg-type]


class Generator(nn.Module):
    """Latents to an image and the feature maps that the Style Interpreter reads."""

    def __init__(self, spec: GeneratorSpec) -> None:
        super().__init__()
        self.spec = spec
        self.mapping = Mapping(spec)
        self.synthesis = Synthesis(spec)

    def forward(
        self, latent: Tensor, style_latent: Tensor, crossover: Tensor, truncation_psi: Tensor, layout: str
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Draw images; layers from `crossover` on take their style from `style_latent`.

        Args:
            latent, style_latent: float32 [B,z_dim].
            crossover: int32 [B,1] in 0..num_ws.
            truncation_psi: float32 [B,1].
            layout: name of a feature layout (`labelmint.models.layout`).

        Returns:
            image float32 [B,C,R,R], nominally in [-1,1], and per resolution r the features [B,C_r,r,r].
        """
        w = self.mapping.truncate(self.mapping(latent), truncation_psi)  # [B,w_dim]
        style_w = self.mapping.truncate(self.mapping(style_latent), truncation_psi)  # [B,w_dim]
        layer = torch.arange(self.spec.num_ws, device=w.device, dtype=torch.int32)  # [num_ws]
        takes_style = (layer[None, :] >= crossover)[:, :, None]  # [B,num_ws,1]
        ws = torch.where(takes_style, style_w[:, None, :], w[:, None, :])  # [B,num_ws,w_dim]
        return self.synthesis(ws, layout)


class Mapping(nn.Module):
    """z to w: normalise, then equalised linear layers with leaky ReLU."""

    def __init__(self, spec: GeneratorSpec) -> None:
        super().__init__()
        widths = [spec.z_dim] + [spec.w_dim] * spec.mapping_layers
        self.layers = nn.ModuleList(
            EqualizedLinear(a, b, spec.mapping_lr_multiplier) for a, b in itertools.pairwise(widths)
        )
        self.register_buffer("w_avg", torch.zeros(spec.w_dim))

    def forward(self, z: Tensor) -> Tensor:
        """z float32 [B,z_dim] to w [B,w_dim], not truncated."""
        x = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)
        for layer in self.layers:
            x = leaky_relu(layer(x))  # [B,w_dim]
        return x

    def truncate(self, w: Tensor, psi: Tensor | float) -> Tensor:
        """w_avg + psi (w - w_avg); psi float or [B,1]."""
        return self.w_avg + psi * (w - self.w_avg)


class Synthesis(nn.Module):
    """w's to an image by ToRGB skips (Karras et al. 2020, figure 7b), with feature taps."""

    def __init__(self, spec: GeneratorSpec) -> None:
        super().__init__()
        self.spec = spec
        self.const = nn.Parameter(torch.randn(spec.channels[4], 4, 4))
        self.blocks = nn.ModuleDict()
        previous: int | None = None
        for r in spec.resolutions:
            self.blocks[str(r)] = Block(previous, spec.channels[r], spec.w_dim, r, spec.image_channels)
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
            if block.conv0 is not None:
                x = block.conv0(x, ws[:, layer])
                taps[Tap(r, "conv0")] = x
                layer += 1
            x = block.conv1(x, ws[:, layer])
            taps[Tap(r, "conv1")] = x
            layer += 1
            # ToRGB shares its w with the next block's first convolution.
            rgb = block.to_rgb(x, ws[:, layer])  # [B,C,r,r]
            image = rgb if image is None else upsample2(image) + rgb
            if r == resolution:
                break
        assert image is not None
        return image, {} if layout is None else taps_of(layout, taps)


class Block(nn.Module):
    """One resolution: an up-convolution (none at 4x4), a convolution, and ToRGB."""

    def __init__(
        self, in_channels: int | None, out_channels: int, w_dim: int, resolution: int, image_channels: int
    ) -> None:
        super().__init__()
        self.conv0 = None if in_channels is None else StyledConv(in_channels, out_channels, w_dim, resolution, up=True)
        self.conv1 = StyledConv(out_channels, out_channels, w_dim, resolution, up=False)
        self.to_rgb = ToRGB(out_channels, image_channels, w_dim)


class StyledConv(nn.Module):
    """Modulated 3x3 convolution with demodulation, constant noise, bias and leaky ReLU of gain sqrt 2."""

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, resolution: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.affine = EqualizedLinear(w_dim, in_channels, bias_init=1.0)
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
            x = blur(x)  # [B,out,r,r]
        else:
            x = F.conv2d(x, weight, padding=1)  # [B,out,r,r]
        x = x * demodulation[:, :, None, None].to(x.dtype)
        x = x + (self.noise_const * self.noise_strength).to(x.dtype)  # [r,r] over [B,out,r,r]
        x = x + self.bias[:, None, None].to(x.dtype)
        return leaky_relu(x)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution without demodulation."""

    def __init__(self, in_channels: int, image_channels: int, w_dim: int) -> None:
        super().__init__()
        self.affine = EqualizedLinear(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(image_channels, in_channels, 1, 1))
        self.weight_gain = 1.0 / math.sqrt(in_channels)
        self.bias = nn.Parameter(torch.zeros(image_channels))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x [B,in,r,r], w [B,w_dim] to [B,C,r,r]."""
        style = self.affine(w) * self.weight_gain  # [B,in]
        return F.conv2d(x * style[:, :, None, None].to(x.dtype), self.weight) + self.bias[:, None, None]


class EqualizedLinear(nn.Module):
    def __init__(self, in_features: int, out_features: int, lr_multiplier: float = 1.0, bias_init: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init))
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)


def leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, LEAK) * SQRT2


def blur(x: Tensor) -> Tensor:
    """FIR filter [1,3,3,1] of an up-convolution's output, [B,C,2r+1,2r+1] to [B,C,2r,2r].

    The outer product normalised to sum 1 and multiplied by 4, in two passes of gain 2.
    """
    tap = torch.tensor([0.25, 0.75, 0.75, 0.25], dtype=x.dtype, device=x.device)
    channels = x.shape[1]
    x = F.conv2d(x, tap.view(1, 1, 4, 1).expand(channels, 1, 4, 1), padding=(1, 0), groups=channels)
    return F.conv2d(x, tap.view(1, 1, 1, 4).expand(channels, 1, 1, 4), padding=(0, 1), groups=channels)


def upsample2(image: Tensor) -> Tensor:
    """Twofold upsampling by the filter [1,3,3,1] with zeros beyond the border: [B,C,r,r] to [B,C,2r,2r].

    Bilinear interpolation is the same filter; one ring of zeros makes its border the official one.
    """
    padded = F.pad(image, (1, 1, 1, 1))
    return F.interpolate(padded, scale_factor=2.0, mode="bilinear", align_corners=False)[:, :, 2:-2, 2:-2]


def to_uint8(image: Tensor) -> Tensor:
    """[-1,1] float [B,C,R,R] to uint8 [B,R,R,C] as the official scripts do: scale, clamp, truncate."""
    return (image * 127.5 + 128.0).clamp(0.0, 255.0).to(torch.uint8).permute(0, 2, 3, 1)
