"""Imports DatasetGAN's StyleGAN1 generators (`karras2019stylegan-*.for_g_all.pt`) with their average latent.

Rules of this file:
- The file has weights only. The average latent comes from a file of its own, as in DatasetGAN.
- DatasetGAN's code draws new noise for every image. Here the noise is drawn once, from a fixed seed, so that one seed
  always gives the same image.
- DatasetGAN's mapping applies a gain of sqrt 2 to the weights only, and no gain after the activation. So our biases are
  theirs divided by sqrt 2.
- DatasetGAN truncates the first 8 layers, but only the first 7 for generators of 256 pixels. The files do not record
  this, so the spec does.

Source: `train_interpreter.py` and `models/stylegan1.py` of datasetGAN_release.
"""

from __future__ import annotations

import math
from pathlib import Path
from tokenize import TokenError

import numpy as np

from labelmint.checkpoints.container import Checkpoint
from labelmint.checkpoints.generators import Imported, build, drawn_noise
from labelmint.checkpoints.name_table import Floats, NameTable, check_resolution, holds, to_float32
from labelmint.core.errors import InvalidRequest, UnusableFile
from labelmint.models.layout import MAX_RESOLUTION
from labelmint.models.stylegan1 import StyleGAN1Spec

_BLUR = np.outer([1, 2, 1], [1, 2, 1]).astype(np.float32) / 16
_LR_MULTIPLIER = 0.01
# An average latent has at most a few thousand rows of 512 numbers.
_MAX_LATENT_BYTES = 64 << 20


def is_stylegan1(value: object) -> bool:
    """Whether the file's value, or exactly one entry of it, is the state of `g_mapping` and `g_synthesis`."""
    return len(_states(value)) == 1


def _states(value: object) -> list[dict[str, object]]:
    candidates = [value, *value.values()] if isinstance(value, dict) else []
    return [item for item in candidates if isinstance(item, dict) and holds(item, "g_synthesis.torgb.weight")]


def import_stylegan1(checkpoint: Checkpoint, average_latent: Path | None) -> Imported:
    """Import the file's generator, with the average latent from a `.npy` file: [w_dim], or equal rows of it."""
    if average_latent is None:
        raise InvalidRequest("average_latent", "StyleGAN1 files do not contain it; name the .npy file that has it")
    table = NameTable(checkpoint.path, _states(checkpoint.value)[0])
    resolutions = [4]
    while table.has(_block(2 * resolutions[-1])) and resolutions[-1] <= MAX_RESOLUTION:
        resolutions.append(2 * resolutions[-1])
    resolution = check_resolution(table.path, resolutions[-1])
    image_channels = table.shape("g_synthesis.torgb.weight", 4)[0]
    layers = table.count("g_mapping.dense{}.", 0)
    if layers == 0:
        raise UnusableFile(table.path, "lacks the tensor g_mapping.dense0.weight")
    w_dim, _ = table.shape(f"g_mapping.dense{layers - 1}.weight", 2)
    width, z_dim = table.shape("g_mapping.dense0.weight", 2)
    tensors: dict[str, Floats] = {"mapping.w_avg": read_average_latent(average_latent, w_dim)}
    sizes = [z_dim, *[width] * (layers - 1), w_dim]
    for index in range(layers):
        theirs, ours = f"g_mapping.dense{index}", f"mapping.layers.{index}"
        tensors[f"{ours}.weight"] = table.take(f"{theirs}.weight", (sizes[index + 1], sizes[index]))
        tensors[f"{ours}.bias"] = table.take(f"{theirs}.bias", (sizes[index + 1],)) / np.float32(math.sqrt(2.0))
    channels = {r: table.shape(f"g_synthesis.blocks.{r}x{r}.epi2.top_epi.noise.weight", 1)[0] for r in resolutions}
    for r in resolutions:
        _take_block(table, tensors, r, channels=channels, w_dim=w_dim)
    last = channels[resolution]
    tensors["synthesis.to_rgb.weight"] = table.take("g_synthesis.torgb.weight", (image_channels, last, 1, 1))
    tensors["synthesis.to_rgb.bias"] = table.take("g_synthesis.torgb.bias", (image_channels,))
    table.finish()
    noise = iter(drawn_noise([r for r in resolutions for _ in range(2)]))
    for r in resolutions:
        for epilogue in (0, 1):
            tensors[f"synthesis.blocks.{r}.epilogue{epilogue}.noise_const"] = next(noise)
    generator = build(
        table.path,
        StyleGAN1Spec,
        tensors,
        z_dim=z_dim,
        w_dim=w_dim,
        mapping_layers=layers,
        resolution=resolution,
        channels=channels,
        image_channels=image_channels,
        mapping_lr_multiplier=_LR_MULTIPLIER,
        mapping_width=None if width == w_dim else width,
        truncation_cutoff=7 if resolution == 256 else 8,
    )
    return Imported(generator, {"noise": "drawn", "average_latent": average_latent.name})


def _block(r: int) -> str:
    return f"g_synthesis.blocks.{r}x{r}."


def _take_block(table: NameTable, tensors: dict[str, Floats], r: int, *, channels: dict[int, int], w_dim: int) -> None:
    theirs, ours, out = _block(r).removesuffix("."), f"synthesis.blocks.{r}", channels[r]
    if r == 4:
        tensors["synthesis.const"] = table.take(f"{theirs}.const", (1, out, 4, 4))[0]
        tensors["synthesis.const_bias"] = table.take(f"{theirs}.bias", (out,))
    else:
        tensors[f"{ours}.conv0.weight"] = table.take(f"{theirs}.conv0_up.weight", (out, channels[r // 2], 3, 3))
        tensors[f"{ours}.conv0.bias"] = table.take(f"{theirs}.conv0_up.bias", (out,))
        blur = table.take(f"{theirs}.conv0_up.intermediate.kernel", (1, 1, 3, 3))
        if np.abs(blur - _BLUR).max() > 1e-6:
            raise UnusableFile(table.path, f"has a blur other than [1,2,1] in {theirs}")
    second = "conv" if r == 4 else "conv1"
    tensors[f"{ours}.conv1.weight"] = table.take(f"{theirs}.{second}.weight", (out, out, 3, 3))
    tensors[f"{ours}.conv1.bias"] = table.take(f"{theirs}.{second}.bias", (out,))
    for index in (0, 1):
        epilogue, name = f"{theirs}.epi{index + 1}", f"{ours}.epilogue{index}"
        tensors[f"{name}.noise_strength"] = table.take(f"{epilogue}.top_epi.noise.weight", (out,))
        tensors[f"{name}.affine.weight"] = table.take(f"{epilogue}.style_mod.lin.weight", (2 * out, w_dim))
        tensors[f"{name}.affine.bias"] = table.take(f"{epilogue}.style_mod.lin.bias", (2 * out,))


def read_average_latent(path: Path, w_dim: int) -> Floats:
    """Read float32 [w_dim] from a `.npy` file that has one row, or several equal rows (one per layer)."""
    if not path.is_file():
        raise UnusableFile(path, "does not exist")
    if path.stat().st_size > _MAX_LATENT_BYTES:
        raise UnusableFile(path, f"has more than {_MAX_LATENT_BYTES} bytes, which is too large for an average latent")
    try:
        # mmap compares the declared shape with the size of the file before it allocates anything.
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError, SyntaxError, TokenError) as error:  # NumPy parses the header as text
        raise UnusableFile(path, f"is not a NumPy array ({str(error)[:200]})") from error
    if array.dtype.kind != "f" or array.shape[-1:] != (w_dim,) or not array.size:
        raise UnusableFile(path, f"is not an average latent: it needs the shape [{w_dim}] or [layers, {w_dim}]")
    rows = to_float32(array).reshape(-1, w_dim)
    if not np.isfinite(rows).all() or np.abs(rows - rows[0]).max() > 1e-5 * max(1.0, float(np.abs(rows).max())):
        raise UnusableFile(path, "has NaN, infinity or rows that differ; an average latent is the same for all layers")
    return rows[0].copy()
