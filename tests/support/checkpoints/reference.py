"""A StyleGAN2 in the form of the papers: weights are modulated, one grouped convolution serves the batch.

Written from the formulas of Karras et al. 2020 (and 2018 for the equalised layers), slowly and plainly, with the
attribute names that NVlabs' modules record. The tests pickle these modules as NVlabs do and compare what our importer
makes of the file with what these modules draw themselves.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def filter_buffer(taps: Sequence[float]) -> Tensor:
    """Sum 1; the outer product, except from 8 taps on."""
    row = torch.tensor(taps, dtype=torch.float32)
    row = row / row.sum()
    return row if len(taps) >= 8 else torch.outer(row, row)


def up_filtered(x: Tensor, kernel: Tensor, padding: int) -> Tensor:
    """Insert zeros, pad, convolve with the filter at gain 4: [B,C,r,r] to [B,C,2r+2*padding,2r+2*padding]."""
    kernel = torch.outer(kernel, kernel) if kernel.ndim == 1 else kernel
    size = kernel.shape[0]
    batch, channels, r, _ = x.shape
    wide = x.new_zeros(batch, channels, 2 * r, 2 * r)
    wide[:, :, ::2, ::2] = x
    before, after = (size + 1) // 2 + padding, (size - 2) // 2 + padding
    wide = F.pad(wide, (before, after, before, after))
    flipped = kernel.flip(0, 1).to(x.dtype) * 4.0
    return F.conv2d(wide, flipped.expand(channels, 1, size, size), groups=channels)


class FullyConnectedLayer(nn.Module):
    def __init__(self, in_features: int, out_features: int, activation: str = "linear", lr_multiplier: float = 1.0):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.weight_gain = lr_multiplier / np.sqrt(in_features)  # a NumPy number, as NVlabs record it
        self.bias_gain = lr_multiplier
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.randn(out_features) * 0.3 / lr_multiplier)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ (self.weight * float(self.weight_gain)).t() + self.bias * self.bias_gain
        return F.leaky_relu(x, 0.2) * np.sqrt(2.0) if self.activation == "lrelu" else x


class MappingNetwork(nn.Module):
    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int,
        num_layers: int = 3,
        layer_features: int | None = None,
        embed_features: int | None = None,
        w_avg_beta: float | None = 0.998,
        lr_multiplier: float = 0.01,
    ):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = z_dim, c_dim, w_dim, num_ws
        self.num_layers = num_layers
        self.w_avg_beta = w_avg_beta
        embedded = (embed_features or w_dim) if c_dim else 0
        if c_dim:
            self.embed = FullyConnectedLayer(c_dim, embedded)
        widths = [z_dim + embedded] + [layer_features or w_dim] * (num_layers - 1) + [w_dim]
        for index in range(num_layers):
            layer = FullyConnectedLayer(widths[index], widths[index + 1], "lrelu", lr_multiplier)
            setattr(self, f"fc{index}", layer)
        if w_avg_beta is not None:
            self.register_buffer("w_avg", torch.randn(w_dim) * 0.5)

    def forward(self, z: Tensor, c: Tensor | None) -> Tensor:
        x = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
        if c is not None:
            y = self.embed(c)
            x = torch.cat([x, y / (y.square().mean(1, keepdim=True) + 1e-8).sqrt()], dim=1)
        for index in range(self.num_layers):
            x = getattr(self, f"fc{index}")(x)
        return x


class SynthesisLayer(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, w_dim: int, resolution: int, up: int, options: dict):
        super().__init__()
        self.in_channels, self.out_channels, self.w_dim = in_channels, out_channels, w_dim
        self.resolution = resolution
        self.up = up
        self.use_noise = options["use_noise"]
        self.activation = "lrelu"
        self.conv_clamp = options["conv_clamp"]
        self.padding = 1
        self.act_gain = np.sqrt(2)
        # Only the layers that resample are given the filter of the network; the others keep the default.
        self.register_buffer("resample_filter", filter_buffer(options["filter"] if up == 2 else (1, 3, 3, 1)))
        self.affine = FullyConnectedLayer(w_dim, in_channels)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        if self.use_noise:
            self.register_buffer("noise_const", torch.randn(resolution, resolution))
            self.noise_strength = nn.Parameter(torch.randn(()) * 0.3)
        self.bias = nn.Parameter(torch.randn(out_channels) * 0.3)

    def forward(self, x: Tensor, w: Tensor, gain: float = 1.0) -> Tensor:
        batch = x.shape[0]
        weight = self.weight[None] * self.affine(w)[:, None, :, None, None]  # [B,out,in,3,3]
        weight = weight / (weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).sqrt()
        if self.up == 2:
            x, weight = up_filtered(x, self.resample_filter, padding=1), weight.flip(3, 4)
        else:
            x = F.pad(x, (1, 1, 1, 1))
        x = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), groups=batch)
        x = x.reshape(batch, -1, self.resolution, self.resolution)
        if self.use_noise:
            x = x + self.noise_const * self.noise_strength
        x = F.leaky_relu(x + self.bias[:, None, None], 0.2) * float(self.act_gain) * gain
        return x if self.conv_clamp is None else x.clamp(-self.conv_clamp * gain, self.conv_clamp * gain)


class ToRGBLayer(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, w_dim: int, options: dict):
        super().__init__()
        self.conv_clamp = options["conv_clamp"]
        self.affine = FullyConnectedLayer(w_dim, in_channels)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.randn(out_channels) * 0.3)
        self.weight_gain = 1 / np.sqrt(in_channels)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.affine(w) * float(self.weight_gain)
        weight = self.weight[None, :, :, 0, 0] * style[:, None, :]  # [B,out,in]
        x = torch.einsum("boi,bihw->bohw", weight, x) + self.bias[:, None, None]
        return x if self.conv_clamp is None else x.clamp(-self.conv_clamp, self.conv_clamp)


class Conv2dLayer(nn.Module):
    """The shortcut of a residual block."""

    def __init__(self, in_channels: int, out_channels: int, options: dict):
        super().__init__()
        self.activation = "linear"
        self.up, self.down = 2, 1
        self.conv_clamp = None
        self.padding = 0
        self.register_buffer("resample_filter", filter_buffer(options["filter"]))
        self.weight_gain = 1 / np.sqrt(in_channels)
        self.act_gain = 1
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.bias = None

    def forward(self, x: Tensor, gain: float) -> Tensor:
        x = up_filtered(x, self.resample_filter, padding=0)
        return torch.einsum("oi,bihw->bohw", self.weight[:, :, 0, 0], x) * float(self.weight_gain) * gain


class SynthesisBlock(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, w_dim: int, resolution: int, img_channels: int, last: bool, options
    ):
        super().__init__()
        self.in_channels, self.w_dim, self.resolution = in_channels, w_dim, resolution
        self.img_channels = img_channels
        self.is_last = last
        self.architecture = options["architecture"]
        self.use_fp16 = resolution >= options["fp16_from"]
        self.channels_last = False
        self.register_buffer("resample_filter", filter_buffer(options["filter"]))
        self.num_conv, self.num_torgb = 1, 0
        if in_channels == 0:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, w_dim, resolution, 2, options)
            self.num_conv = 2
        self.conv1 = SynthesisLayer(out_channels, out_channels, w_dim, resolution, 1, options)
        if last or self.architecture == "skip":
            self.torgb = ToRGBLayer(out_channels, img_channels, w_dim, options)
            self.num_torgb = 1
        if in_channels and self.architecture == "resnet":
            self.skip = Conv2dLayer(in_channels, out_channels, options)

    def forward(self, x: Tensor | None, image: Tensor | None, ws: Sequence[Tensor], features: dict) -> tuple:
        ws = list(ws)
        half = float(np.sqrt(0.5))
        if x is None:
            x = self.conv1(self.const.expand(len(ws[0]), -1, -1, -1), ws.pop(0))
        elif self.architecture == "resnet":
            shortcut = self.skip(x, half)
            x = self.conv0(x, ws.pop(0))
            features[self.resolution, "conv0"] = x
            x = self.conv1(x, ws.pop(0), half)
            features[self.resolution, "conv1"] = x
            x = shortcut + x
        else:
            x = self.conv0(x, ws.pop(0))
            features[self.resolution, "conv0"] = x
            x = self.conv1(x, ws.pop(0))
        features.setdefault((self.resolution, "conv1"), x)
        if image is not None:
            image = up_filtered(image, self.resample_filter, padding=0)
        if self.num_torgb:
            rgb = self.torgb(x, ws.pop(0))
            image = rgb if image is None else image + rgb
        return x, image


class SynthesisNetwork(nn.Module):
    def __init__(self, w_dim: int, img_resolution: int, img_channels: int, channels: dict[int, int], options: dict):
        super().__init__()
        self.w_dim, self.img_resolution, self.img_channels = w_dim, img_resolution, img_channels
        self.block_resolutions = sorted(channels)
        self.num_ws = 2 * len(channels)
        self.num_fp16_res = 0
        for r in self.block_resolutions:
            last = r == img_resolution
            block = SynthesisBlock(channels.get(r // 2, 0), channels[r], w_dim, r, img_channels, last, options)
            setattr(self, f"b{r}", block)

    def forward(self, ws: Tensor) -> tuple[Tensor, dict]:
        features: dict = {}
        x = image = None
        layer = 0
        for r in self.block_resolutions:
            block = getattr(self, f"b{r}")
            x, image = block(x, image, ws[:, layer:].unbind(1), features)
            layer += block.num_conv
        return image, features


class Generator(nn.Module):
    """`options`: architecture, conv_clamp, filter, use_noise, fp16_from."""

    def __init__(
        self,
        z_dim: int = 12,
        c_dim: int = 0,
        w_dim: int = 16,
        channels: dict[int, int] | None = None,
        img_channels: int = 3,
        mapping: dict | None = None,
        **options: object,
    ):
        super().__init__()
        channels = channels or {4: 10, 8: 8, 16: 6}
        chosen = {
            "architecture": "skip",
            "conv_clamp": None,
            "filter": (1, 3, 3, 1),
            "use_noise": True,
            "fp16_from": 2**20,
        } | options
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.img_resolution, self.img_channels = max(channels), img_channels
        self.synthesis = SynthesisNetwork(w_dim, max(channels), img_channels, channels, chosen)
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, self.num_ws, **(mapping or {}))
        self._init_args = ()
        self._init_kwargs = {"z_dim": z_dim, "synthesis_kwargs": {"conv_clamp": 99}}  # not to be believed

    def forward(self, z: Tensor, c: Tensor | None = None, psi: float = 1.0) -> tuple[Tensor, dict]:
        w = self.mapping(z, c)
        if psi != 1.0:
            w = self.mapping.w_avg + psi * (w - self.mapping.w_avg)
        return self.synthesis(w[:, None].expand(-1, self.num_ws, -1))
