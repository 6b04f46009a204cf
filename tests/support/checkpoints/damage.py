"""Networks of NVlabs with one thing wrong: how to make each, and a part of the message that refuses it."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from tests.support.checkpoints import reference


def _delete(module: nn.Module, name: str) -> None:
    delattr(module, name)


def _buffer(module: nn.Module, name: str, value: torch.Tensor) -> None:
    module.register_buffer(name, value)


DAMAGE: dict[str, tuple[Callable[[reference.Generator], object], str]] = {
    "missing tensor": (
        lambda g: _delete(g.synthesis.b8.conv0, "weight"),
        "lacks the tensor G_ema.synthesis.b8.conv0.weight",
    ),
    "missing bias": (lambda g: _delete(g.synthesis.b8.conv1, "bias"), "lacks the tensor G_ema.synthesis.b8.conv1.bias"),
    "missing buffer": (
        lambda g: _delete(g.synthesis.b8, "resample_filter"),
        "lacks the tensor G_ema.synthesis.b8.resample_filter",
    ),
    "missing module": (lambda g: _delete(g.synthesis.b8, "torgb"), "lacks the module G_ema.synthesis.b8.torgb"),
    "missing block": (lambda g: _delete(g.synthesis, "b8"), "lacks the module G_ema.synthesis.b8"),
    "missing layer": (lambda g: _delete(g.mapping, "fc1"), "lacks the module G_ema.mapping.fc1"),
    "extra tensor": (
        lambda g: _buffer(g.synthesis.b8.conv0, "mask", torch.ones(3)),
        "unexpected tensor or module G_ema.synthesis.b8.conv0.mask",
    ),
    "extra module": (
        lambda g: setattr(g.synthesis, "b64", g.synthesis.b8),
        "unexpected tensor or module G_ema.synthesis.b64",
    ),
    "extra network": (lambda g: setattr(g, "encoder", g.mapping), "unexpected tensor or module G_ema.encoder"),
    "extra bias": (
        lambda g: setattr(g.synthesis.b8.conv0.affine, "other", nn.Parameter(torch.ones(1))),
        "unexpected tensor or module G_ema.synthesis.b8.conv0.affine.other",
    ),
    "misshapen": (
        lambda g: setattr(g.synthesis.b8.conv0, "weight", nn.Parameter(torch.ones(8, 9, 3, 3))),
        "G_ema.synthesis.b8.conv0.weight of shape (8, 9, 3, 3), expected (8, 10, 3, 3)",
    ),
    "wide kernel": (
        lambda g: setattr(g.synthesis.b8.conv0, "weight", nn.Parameter(torch.ones(8, 10, 5, 5))),
        "of shape (8, 10, 5, 5), expected (8, 10, 3, 3)",
    ),
    "shared tensor": (
        lambda g: setattr(g.synthesis.b8.conv1.affine, "bias", g.synthesis.b8.torgb.affine.bias),
        "in memory that another tensor uses too",
    ),
    "not a number": (
        lambda g: g.synthesis.b8.conv0.bias.data.fill_(torch.nan),
        "NaN or infinity in G_ema.synthesis.b8",
    ),
    "too large": (
        lambda g: setattr(g.synthesis.b8.conv0, "bias", nn.Parameter(torch.full((8,), 1e300, dtype=torch.float64))),
        "NaN or infinity in G_ema.synthesis.b8",
    ),
    "whole numbers": (
        lambda g: _buffer(g.mapping, "w_avg", torch.ones(16, dtype=torch.int64)),
        "G_ema.mapping.w_avg of whole numbers (LongStorage)",
    ),
    "another activation": (
        lambda g: setattr(g.synthesis.b8.conv0, "activation", "swish"),
        "G_ema.synthesis.b8.conv0.activation = swish; only lrelu",
    ),
    "another mapping activation": (lambda g: setattr(g.mapping.fc1, "activation", "relu"), "activation = relu; only"),
    "another gain": (lambda g: setattr(g.synthesis.b8.conv0, "act_gain", np.sqrt(3)), "act_gain = 1.73205"),
    "no gain": (lambda g: setattr(g.mapping.fc1, "weight_gain", 0.0), "weight_gain = 0; a gain must be between"),
    "gain of text": (lambda g: setattr(g.mapping.fc1, "weight_gain", "1"), "weight_gain that is not a number"),
    "clamps that differ": (
        lambda g: setattr(g.synthesis.b8.conv0, "conv_clamp", 256),
        "a different conv_clamp in G_ema.synthesis.b8.conv0 than in G_ema.synthesis.b4.conv1",
    ),
    "architectures that differ": (
        lambda g: setattr(g.synthesis.b8, "architecture", "orig"),
        "unexpected tensor or module G_ema.synthesis.b8.torgb",
    ),
    "unknown architecture": (
        lambda g: [
            setattr(block, "architecture", "unet") for block in (g.synthesis.b4, g.synthesis.b8, g.synthesis.b16)
        ],
        "unexpected tensor or module",
    ),
    "filters that differ": (
        lambda g: g.synthesis.b8.conv0.resample_filter.copy_(reference.filter_buffer((1, 2, 2, 1))),
        "a different resample_filter in G_ema.synthesis.b8.conv0 than in G_ema.synthesis.b8",
    ),
    "filter that is no product": (
        lambda g: g.synthesis.b8.conv0.resample_filter.copy_(torch.eye(4) / 4),
        "not a separable filter of sum 1",
    ),
    "filter of another sum": (lambda g: g.synthesis.b8.conv0.resample_filter.mul_(2), "not a separable filter of sum"),
    "another resolution": (
        lambda g: setattr(g.synthesis, "img_resolution", 2**40),
        "a network for 1099511627776 pixels",
    ),
    "odd resolution": (lambda g: setattr(g.synthesis, "img_resolution", 17), "a network for 17 pixels"),
    "four channels": (None, "images have 1 (gray) or 3 (RGB) channels, not 4"),
    "no latents": (lambda g: setattr(g.mapping, "z_dim", 0), "from 0 latent dimensions"),
    "more latents": (lambda g: setattr(g.mapping, "z_dim", 13), "fc0.weight of shape (16, 12), expected (16, 13)"),
    "1e9 layers": (lambda g: setattr(g.mapping, "num_layers", 10**9), "lacks the module G_ema.mapping.fc3"),
    "1e15 layers": (lambda g: setattr(g.mapping, "num_layers", 10**15), "lacks the module G_ema.mapping.fc3"),
    "1e29 layers": (lambda g: setattr(g.mapping, "num_layers", 10**29), "lacks the module G_ema.mapping.fc3"),
    "1e15 latents": (lambda g: setattr(g.mapping, "z_dim", 10**15), "expected (16, 1000000000000000)"),
    "a gain that overflows": (
        lambda g: [setattr(g.mapping.fc1, "weight_gain", 1e8), g.mapping.fc1.weight.fill_(1e38)],
        "leads to NaN or infinity in 'mapping.layers.1.weight'",
    ),
    "StyleGAN3": (lambda g: setattr(g.synthesis, "input", g.mapping.fc1), "holds a StyleGAN3 network"),
}
