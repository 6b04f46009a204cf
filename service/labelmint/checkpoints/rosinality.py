"""Imports generators of rosinality's stylegan2-pytorch (`*.pt`): `{"g_ema": state_dict, "latent_avg": ...}`,
or the state dict alone.

Rules of this file:
- The learning-rate multiplier of the mapping is 0.01, because rosinality's code has no other value. The tensor shapes
  determine all other dimensions.
- Training files have no average latent, because rosinality's code measures it whenever it truncates. The importer
  measures it too, with a fixed seed. Files that predate the noise buffers get noise from a fixed seed. The notes record
  where the average latent and the noise came from.
"""

from __future__ import annotations

from labelmint.checkpoints.container import Checkpoint
from labelmint.checkpoints.generators import Imported, build, drawn_noise, filter_taps
from labelmint.checkpoints.name_table import Floats, NameTable, TensorTaker, check_resolution, holds, one_value
from labelmint.checkpoints.torch_file import Tensor
from labelmint.core.errors import UnusableFile
from labelmint.models.stylegan2 import StyleGAN2Spec

# Upsampling by two inserts zeros. A gain of 2 in each direction makes up for the lost brightness.
_FILTER_GAIN = 4.0
_LR_MULTIPLIER = 0.01


def is_rosinality(value: object) -> bool:
    """Whether the file's value, or its entry `g_ema`, is the state dict of an averaged generator."""
    return isinstance(value, dict) and isinstance(_state(value), dict)


def _state(value: dict[str, object]) -> object:
    return value if holds(value, "input.input") else value.get("g_ema")


def import_rosinality(checkpoint: Checkpoint) -> Imported:
    assert isinstance(checkpoint.value, dict)
    table = NameTable(checkpoint.path, _state(checkpoint.value))
    reader = _StateReader(table)
    convolutions = table.count("convs.{}.", 0)
    if convolutions % 2:
        raise UnusableFile(table.path, f"lacks the tensor convs.{convolutions}.conv.weight")
    resolution = check_resolution(table.path, 4 << (convolutions // 2))
    channels = {4: table.shape("input.input", 4)[1]}
    w_dim = table.shape("conv1.conv.modulation.weight", 2)[1]
    image_channels = table.shape("to_rgb1.bias", 4)[1]
    layers = table.count("style.{}.", 1)
    z_dim = reader.mapping(layers, w_dim)
    reader.tensors["synthesis.const"] = table.take("input.input", (1, channels[4], 4, 4))[0]
    reader.styled_conv("conv1", "synthesis.blocks.4.conv1", (channels[4], channels[4]), w_dim=w_dim, up=False)
    reader.to_rgb(
        "to_rgb1", "synthesis.blocks.4.to_rgb", image_channels, in_channels=channels[4], w_dim=w_dim, up=False
    )
    for index in range(convolutions // 2):
        r, ours = 8 << index, f"synthesis.blocks.{8 << index}"
        up, flat = f"convs.{2 * index}", f"convs.{2 * index + 1}"
        channels[r] = table.shape(f"{up}.activate.bias", 1)[0]
        reader.styled_conv(up, f"{ours}.conv0", (channels[r], channels[r // 2]), w_dim=w_dim, up=True)
        reader.styled_conv(flat, f"{ours}.conv1", (channels[r], channels[r]), w_dim=w_dim, up=False)
        reader.to_rgb(
            f"to_rgbs.{index}", f"{ours}.to_rgb", image_channels, in_channels=channels[r], w_dim=w_dim, up=True
        )
    remarks: dict[str, object] = {"noise": reader.noise(list(channels))}
    table.finish()
    average = checkpoint.value.get("latent_avg")
    if average is not None:
        # Some scripts keep the dimension over which the mean was taken.
        shape = (1, w_dim) if isinstance(average, Tensor) and len(average.shape) == 2 else (w_dim,)
        latent = TensorTaker(table.path).take("latent_avg", average, shape)
        reader.tensors["mapping.w_avg"] = latent.reshape(w_dim)
    remarks["average_latent"] = "measured" if average is None else "file"
    generator = build(
        table.path,
        StyleGAN2Spec,
        reader.tensors,
        z_dim=z_dim,
        w_dim=w_dim,
        mapping_layers=layers,
        resolution=resolution,
        channels=channels,
        image_channels=image_channels,
        mapping_lr_multiplier=_LR_MULTIPLIER,
        resample_filter=one_value(table.path, reader.filters, "filter"),
    )
    return Imported(generator, remarks)


class _StateReader:
    """Takes tensors by rosinality's names and stores them under ours."""

    def __init__(self, table: NameTable) -> None:
        self._table = table
        self.filters: dict[tuple[float, ...], str] = {}
        self.tensors: dict[str, Floats] = {}

    def mapping(self, layers: int, w_dim: int) -> int:
        """Take the equalised layers, all of width `w_dim`; returns z_dim."""
        if layers == 0:
            raise UnusableFile(self._table.path, "lacks the tensor style.1.weight")
        z_dim = self._table.shape("style.1.weight", 2)[1]
        for index in range(layers):
            size = (w_dim, w_dim if index else z_dim)
            self.tensors[f"mapping.layers.{index}.weight"] = self._table.take(f"style.{index + 1}.weight", size)
            self.tensors[f"mapping.layers.{index}.bias"] = self._table.take(f"style.{index + 1}.bias", size[:1])
        return z_dim

    def styled_conv(self, theirs: str, ours: str, size: tuple[int, int], *, w_dim: int, up: bool) -> None:
        self._affine(theirs, ours, size[1], w_dim=w_dim)
        self.tensors[f"{ours}.weight"] = self._table.take(f"{theirs}.conv.weight", (1, *size, 3, 3))[0]
        self.tensors[f"{ours}.bias"] = self._table.take(f"{theirs}.activate.bias", size[:1])
        self.tensors[f"{ours}.noise_strength"] = self._table.take(f"{theirs}.noise.weight", (1,))[0]
        if up:
            self._filter(f"{theirs}.conv.blur.kernel")

    def to_rgb(self, theirs: str, ours: str, image_channels: int, *, in_channels: int, w_dim: int, up: bool) -> None:
        self._affine(theirs, ours, in_channels, w_dim=w_dim)
        shape = (1, image_channels, in_channels, 1, 1)
        self.tensors[f"{ours}.weight"] = self._table.take(f"{theirs}.conv.weight", shape)[0]
        self.tensors[f"{ours}.bias"] = self._table.take(f"{theirs}.bias", (1, image_channels, 1, 1))[0, :, 0, 0]
        if up:
            self._filter(f"{theirs}.upsample.kernel")

    def noise(self, resolutions: list[int]) -> str:
        """Set the noise of every layer. Returns "file" if the file has noise, and "drawn" if it was drawn."""
        layers = [(r, name) for r in resolutions for name in (("conv1",) if r == 4 else ("conv0", "conv1"))]
        held = any(f"noises.noise_{index}" in self._table for index in range(len(layers)))
        drawn = [] if held else drawn_noise([r for r, _ in layers])
        for index, (r, name) in enumerate(layers):
            noise = self._table.take(f"noises.noise_{index}", (1, 1, r, r))[0, 0] if held else drawn[index]
            self.tensors[f"synthesis.blocks.{r}.{name}.noise_const"] = noise
        return "file" if held else "drawn"

    def _affine(self, theirs: str, ours: str, channels: int, *, w_dim: int) -> None:
        for part, shape in (("weight", (channels, w_dim)), ("bias", (channels,))):
            self.tensors[f"{ours}.affine.{part}"] = self._table.take(f"{theirs}.conv.modulation.{part}", shape)

    def _filter(self, name: str) -> None:
        taps = filter_taps(self._table.take(name, self._table.shape(name, 2)), _FILTER_GAIN)
        if taps is None:
            raise UnusableFile(self._table.path, f"has {name} that is not a separable filter of sum {_FILTER_GAIN:g}")
        self.filters.setdefault(taps, name)
