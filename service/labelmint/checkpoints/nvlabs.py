"""Imports the StyleGAN2 generators of NVlabs' repositories stylegan2-ada-pytorch and stylegan3 (`*.pkl`).

Rules of this file:
- The importer reads the attributes that the modules recorded (`conv_clamp`, `architecture`, gains, ...). It ignores the
  constructor arguments, because the defaults of the two repositories differ.
- Every module is read completely. A missing tensor or submodule is an error, and so is an unexpected one.
- A conditional generator is imported with all its classes, or as an unconditional generator of one class. That class is
  then a constant part of the first layer's input. So its contribution is added to that layer's bias, computed in
  float64.
- Layers that ran in float16 run in float32. A layer without noise gets zero noise. If the file has no average latent
  (its `w_avg_beta` is None), the importer measures one, and the notes record that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from labelmint.checkpoints.container import Checkpoint
from labelmint.checkpoints.generators import Imported, build, filter_taps, scaled
from labelmint.checkpoints.known_globals import PersistentObject
from labelmint.checkpoints.name_table import Floats, TensorTaker, check_resolution, one_value, to_float32
from labelmint.checkpoints.torch_file import Tensor
from labelmint.core.errors import InvalidRequest, UnusableFile
from labelmint.models.stylegan2 import StyleGAN2Spec
from labelmint.untrusted.content import escaped

T = TypeVar("T")


def is_nvlabs(value: object) -> bool:
    """Whether the value is a dictionary of networks with `G_ema` (the averaged generator), or a generator alone."""
    return isinstance(_generator_of(value), PersistentObject)


def _generator_of(value: object) -> object:
    """Return the `G_ema` of a dictionary, or the value itself if it is a module with a mapping and a synthesis."""
    if isinstance(value, dict):
        return value.get("G_ema")
    modules = value.state.get("_modules") if isinstance(value, PersistentObject) else None
    return value if isinstance(modules, dict) and {"mapping", "synthesis"} <= modules.keys() else None


@dataclass(frozen=True)
class Classes:
    """What to import of a conditional generator: the class `only`, or all classes with these `names`.

    Without names, they are "class 0", "class 1" and so on. For any other generator, both are None.
    """

    only: int | None = None
    names: tuple[str, ...] | None = None


def import_nvlabs(checkpoint: Checkpoint, classes: Classes) -> Imported:
    """Import the file's `G_ema`; raises InvalidRequest for classes that it does not have."""
    root = _Module(TensorTaker(checkpoint.path), "G_ema", _generator_of(checkpoint.value))
    return _GeneratorReader(checkpoint.path, root, classes).read()


class _Module:
    """A module of the file. Tensors and submodules are taken one by one, so `finish` can report those left over."""

    def __init__(self, taker: TensorTaker, name: str, value: object) -> None:
        self.name = name
        self._taker = taker
        if not isinstance(value, PersistentObject):
            raise self.problem(f"has {name} that is not a module")
        self._state = value.state
        self._tensors = {**self._mapping("_parameters"), **self._mapping("_buffers")}
        self._modules = self._mapping("_modules")
        self._left = set(self._tensors) | set(self._modules)

    def problem(self, text: str) -> UnusableFile:
        return UnusableFile(self._taker.path, text)

    def has(self, name: str) -> bool:
        return name in self._tensors or name in self._modules

    def child(self, name: str) -> _Module:
        if name not in self._modules:
            raise self.problem(f"lacks the module {self.name}.{name}")
        self._left.discard(name)
        return _Module(self._taker, f"{self.name}.{name}", self._modules[name])

    def shape(self, name: str) -> tuple[int, ...]:
        value = self._tensors.get(name)
        if not isinstance(value, Tensor):
            raise self.problem(f"lacks the tensor {self.name}.{name}")
        return value.shape

    def length(self, name: str) -> int:
        """The length of a vector that determines a dimension of the network."""
        shape = self.shape(name)
        if len(shape) != 1 or shape[0] == 0:
            raise self.problem(f"has {self.name}.{name} of shape {shape}, expected a vector")
        return shape[0]

    def take(self, name: str, shape: Sequence[int]) -> Floats:
        if name not in self._tensors:
            raise self.problem(f"lacks the tensor {self.name}.{name}")
        self._left.discard(name)
        return self._taker.take(f"{self.name}.{name}", self._tensors[name], shape)

    def finish(self) -> None:
        for name in sorted(self._left):
            raise self.problem(f"has an unexpected tensor or module {self.name}.{escaped(name)}")

    def attribute(self, name: str) -> object:
        if name not in self._state:
            raise self.problem(f"lacks the attribute {self.name}.{name}")
        return self._state[name]

    def number(self, name: str) -> float:
        value = self.attribute(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
            raise self.problem(f"has {self.name}.{name} that is not a number")
        return float(value)

    def gain(self, name: str) -> float:
        value = self.number(name)
        if not 1e-9 < value < 1e9:
            raise self.problem(f"has {self.name}.{name} = {value:g}; a gain must be between 1e-9 and 1e9")
        return value

    def integer(self, name: str) -> int:
        value = self.number(name)
        if value != int(value):
            raise self.problem(f"has {self.name}.{name} that is not a whole number")
        return int(value)

    def flag(self, name: str) -> bool:
        value = self.attribute(name)
        if not isinstance(value, bool):
            raise self.problem(f"has {self.name}.{name} that is neither true nor false")
        return value

    def text(self, name: str) -> str:
        value = self.attribute(name)
        if not isinstance(value, str):
            raise self.problem(f"has {self.name}.{name} that is not text")
        return value

    def expect(self, **wanted: object) -> None:
        """Check attributes for which our modules support only one value."""
        for name, want in wanted.items():
            value = self.attribute(name)
            same = (
                math.isclose(self.number(name), want, rel_tol=1e-6)
                if isinstance(want, float)
                else type(value) is type(want) and value == want
            )
            if not same:
                text = escaped(value) if isinstance(value, str) else value if _is_plain(value) else "something else"
                raise self.problem(f"has {self.name}.{name} = {text}; only {want} can be imported")

    def _mapping(self, name: str) -> dict[str, object]:
        """Return a dictionary of a torch module, without the entries that are None (such as `bias=None`)."""
        found = self._state.get(name)
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise self.problem(f"has {self.name} that is not a module: it has no {name}")
        return {key: value for key, value in found.items() if value is not None}


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 1e9)


class _GeneratorReader:
    """Reads one generator. Collects the tensors, and the values that must be the same in all layers."""

    def __init__(self, path: Path, root: _Module, classes: Classes) -> None:
        self._path = path
        self._root = root
        self._classes = classes
        self._tensors: dict[str, Floats] = {}
        self._architectures: dict[str, str] = {}  # these three: a value to a module that has it
        self._clamps: dict[float | None, str] = {}
        self._filters: dict[tuple[float, ...], str] = {}
        self._without_noise: list[str] = []
        self._half_precision: list[int] = []

    def read(self) -> Imported:
        mapping, synthesis = self._root.child("mapping"), self._root.child("synthesis")
        if synthesis.has("input"):
            kind = "StyleGAN-XL" if mapping.has("embed_proj") else "StyleGAN3"
            raise self._root.problem(
                f"holds a {kind} network; only StyleGAN2 networks can be imported "
                "(train.py --cfg=stylegan2 of the stylegan3 repository makes one)"
            )
        self._root.finish()
        w_dim, image_channels = synthesis.integer("w_dim"), synthesis.integer("img_channels")
        resolution = check_resolution(self._path, synthesis.integer("img_resolution"))
        blocks = {2**i: synthesis.child(f"b{2**i}") for i in range(2, resolution.bit_length())}
        synthesis.expect(num_ws=2 * len(blocks))
        synthesis.finish()
        channels = {r: block.child("conv1").length("bias") for r, block in blocks.items()}
        for r, block in blocks.items():
            block.expect(resolution=r, w_dim=w_dim, img_channels=image_channels, is_last=r == resolution)
            block.expect(in_channels=channels.get(r // 2, 0))
            self._block(block, r, channels)
        mapping_spec = self._mapping(mapping, w_dim)
        generator = build(
            self._path,
            StyleGAN2Spec,
            self._tensors,
            **mapping_spec,
            w_dim=w_dim,
            resolution=resolution,
            channels=channels,
            image_channels=image_channels,
            architecture=one_value(self._path, self._architectures, "architecture"),
            conv_clamp=one_value(self._path, self._clamps, "conv_clamp"),
            resample_filter=one_value(self._path, self._filters, "resample_filter"),
        )
        remarks: dict[str, object] = {"average_latent": "file" if "mapping.w_avg" in self._tensors else "measured"}
        if self._classes.only is not None:
            remarks["class_index"] = self._classes.only
        if self._half_precision:
            remarks["float16_resolutions_in_float32"] = self._half_precision
        if self._without_noise:
            remarks["layers_without_noise"] = self._without_noise
        return Imported(generator, remarks)

    def _block(self, block: _Module, r: int, channels: Mapping[int, int]) -> None:
        out, w_dim, architecture = channels[r], block.integer("w_dim"), block.text("architecture")
        self._architectures.setdefault(architecture, block.name)
        if block.flag("use_fp16"):
            self._half_precision.append(r)
        ours = f"synthesis.blocks.{r}"
        self._filter(block, used=r > 4)
        if r == 4:
            self._tensors["synthesis.const"] = block.take("const", (out, 4, 4))
        else:
            self._styled_conv(block.child("conv0"), f"{ours}.conv0", r, size=(out, channels[r // 2]), w_dim=w_dim, up=2)
        self._styled_conv(block.child("conv1"), f"{ours}.conv1", r, size=(out, out), w_dim=w_dim, up=1)
        if architecture == "resnet" and r > 4:
            self._skip(block.child("skip"), f"{ours}.skip", out, in_channels=channels[r // 2])
        if architecture == "skip" or block.flag("is_last"):
            self._to_rgb(
                block.child("torgb"), f"{ours}.to_rgb", block.integer("img_channels"), in_channels=out, w_dim=w_dim
            )
        block.finish()

    def _styled_conv(
        self, layer: _Module, ours: str, resolution: int, *, size: tuple[int, int], w_dim: int, up: int
    ) -> None:
        layer.expect(activation="lrelu", act_gain=math.sqrt(2.0), up=up, padding=1, resolution=resolution)
        out_channels, in_channels = size
        self._clamp(layer)
        self._filter(layer, used=up == 2)
        self._linear(
            layer.child("affine"), f"{ours}.affine", (in_channels, w_dim), activation="linear", lr_multiplier=1.0
        )
        self._tensors[f"{ours}.weight"] = layer.take("weight", (out_channels, in_channels, 3, 3))
        self._tensors[f"{ours}.bias"] = layer.take("bias", (out_channels,))
        if layer.flag("use_noise"):
            self._tensors[f"{ours}.noise_const"] = layer.take("noise_const", (resolution, resolution))
            self._tensors[f"{ours}.noise_strength"] = layer.take("noise_strength", ())
        else:
            self._without_noise.append(ours)
            self._tensors[f"{ours}.noise_const"] = np.zeros((resolution, resolution), np.float32)
            self._tensors[f"{ours}.noise_strength"] = np.zeros((), np.float32)
        layer.finish()

    def _to_rgb(self, layer: _Module, ours: str, image_channels: int, *, in_channels: int, w_dim: int) -> None:
        self._clamp(layer)
        self._linear(
            layer.child("affine"), f"{ours}.affine", (in_channels, w_dim), activation="linear", lr_multiplier=1.0
        )
        weight = layer.take("weight", (image_channels, in_channels, 1, 1))
        self._tensors[f"{ours}.weight"] = scaled(weight, layer.gain("weight_gain"), 1.0 / math.sqrt(in_channels))
        self._tensors[f"{ours}.bias"] = layer.take("bias", (image_channels,))
        layer.finish()

    def _skip(self, layer: _Module, ours: str, out_channels: int, *, in_channels: int) -> None:
        layer.expect(activation="linear", act_gain=1.0, up=2, down=1, padding=0, conv_clamp=None)
        self._filter(layer, used=True)
        weight = layer.take("weight", (out_channels, in_channels, 1, 1))
        self._tensors[f"{ours}.weight"] = scaled(weight, layer.gain("weight_gain"), 1.0 / math.sqrt(in_channels))
        layer.finish()

    def _linear(
        self, layer: _Module, ours: str, size: tuple[int, int], *, activation: str, lr_multiplier: float
    ) -> None:
        """Take a fully connected layer of `size` (out, in), rescaled to the gains of our module."""
        layer.expect(activation=activation)
        weight, bias = layer.take("weight", size), layer.take("bias", size[:1])
        layer.finish()
        self._tensors[f"{ours}.weight"] = scaled(weight, layer.gain("weight_gain"), lr_multiplier / math.sqrt(size[1]))
        self._tensors[f"{ours}.bias"] = scaled(bias, layer.gain("bias_gain"), lr_multiplier)

    def _clamp(self, layer: _Module) -> None:
        clamp = None if layer.attribute("conv_clamp") is None else layer.gain("conv_clamp")
        self._clamps.setdefault(clamp, layer.name)

    def _filter(self, layer: _Module, used: bool) -> None:
        """Take a layer's filter. A layer that does not resample has a filter too, which may differ and is ignored."""
        shape = layer.shape("resample_filter")
        kernel = layer.take("resample_filter", shape)
        taps = filter_taps(kernel, gain=1.0)
        if used and taps is None:
            raise layer.problem(f"has {layer.name}.resample_filter that is not a separable filter of sum 1")
        if used and taps is not None:
            self._filters.setdefault(taps, layer.name)

    def _mapping(self, mapping: _Module, w_dim: int) -> dict[str, Any]:
        """Take the mapping network and return its part of the spec."""
        mapping.expect(w_dim=w_dim)
        z_dim, classes, count = mapping.integer("z_dim"), mapping.integer("c_dim"), mapping.integer("num_layers")
        if z_dim < 1 or count < 1:
            raise mapping.problem(
                f"has a mapping of {count} layers from {z_dim} latent dimensions; both must be positive"
            )
        if classes < 0:
            raise mapping.problem(f"has a mapping of {classes} classes")
        if mapping.has("w_avg"):
            self._tensors["mapping.w_avg"] = mapping.take("w_avg", (w_dim,))
        self._check_classes(classes)
        embedded = self._embedding(mapping.child("embed"), classes) if classes else 0
        first = mapping.child("fc0")
        lr_multiplier, width = first.gain("bias_gain"), first.length("bias")
        # `count` may be false, so nothing is allocated from it. The first layer that the file lacks ends the loop.
        for index in range(count):
            layer = first if index == 0 else mapping.child(f"fc{index}")
            size = (w_dim if index == count - 1 else width, width if index else z_dim + embedded)
            self._linear(layer, f"mapping.layers.{index}", size, activation="lrelu", lr_multiplier=lr_multiplier)
        mapping.finish()
        spec: dict[str, Any] = {
            "z_dim": z_dim,
            "mapping_layers": count,
            "mapping_lr_multiplier": lr_multiplier,
            "mapping_width": None if width == w_dim else width,
        }
        if self._classes.only is not None:
            self._fold(self._classes.only, z_dim, lr_multiplier)
        elif classes:
            names = self._classes.names or tuple(f"class {index}" for index in range(classes))
            spec |= {"generator_classes": names, "embedding_width": embedded}
        return spec

    def _check_classes(self, classes: int) -> None:
        """Refuse options that do not fit the number of classes in the file."""
        only, names = self._classes.only, self._classes.names
        if classes == 0:
            for name, value in (("class_index", only), ("class_names", names)):
                if value is not None:
                    raise InvalidRequest(name, "this generator has no classes; omit the option")
        elif only is not None and not 0 <= only < classes:
            raise InvalidRequest(
                "class_index", f"this generator is conditional; choose a class from 0 to {classes - 1}, not {only}"
            )
        elif names is not None and len(names) != classes:
            raise InvalidRequest("class_names", f"the file names {len(names)} classes; this generator has {classes}")

    def _embedding(self, layer: _Module, classes: int) -> int:
        """Take the layer that embeds a class, and return the width of the embedding."""
        width = layer.length("bias")
        self._linear(layer, "mapping.embed", (width, classes), activation="linear", lr_multiplier=1.0)
        return width

    def _fold(self, class_index: int, z_dim: int, lr_multiplier: float) -> None:
        """Add the class's share of the first layer to its bias, and keep the latent's share as its weight."""
        embed = self._tensors.pop("mapping.embed.weight").astype(np.float64)  # [E,C]
        embedded = embed[:, class_index] / math.sqrt(embed.shape[1]) + self._tensors.pop("mapping.embed.bias")  # [E]
        condition = embedded / np.sqrt(np.square(embedded).mean() + 1e-8)
        name = "mapping.layers.0"
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]  # [H,z+E], [H]
        gain, our_gain = lr_multiplier / math.sqrt(weight.shape[1]), lr_multiplier / math.sqrt(z_dim)
        share = weight[:, z_dim:].astype(np.float64) @ condition * gain / lr_multiplier  # [H]
        self._tensors[f"{name}.weight"] = scaled(weight[:, :z_dim], gain, our_gain)
        self._tensors[f"{name}.bias"] = to_float32(bias + share)
