"""Imports DatasetGAN's pixel classifiers (`model_{0..N-1}.pth` in one directory) as one Style Interpreter.

Rules of this file:
- N, D, h1, h2 and K come from the files. A gap in the numbering, or a head whose shape differs, is an error that names
  the file.
- The D columns are a layout's channels, from the lowest resolution to the highest. The generator and the layout's name
  determine how many channels each resolution has. Their sum must equal the D of the files.
- BatchNorm follows ReLU and uses its running statistics. It is folded into the next layer in float64.

Source: `pixel_classifier` of datasetGAN_release and of editGAN_release.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from labelmint.checkpoints.container import Checkpoint, open_checkpoint
from labelmint.checkpoints.name_table import NameTable
from labelmint.core.errors import IncompatibleWeights, InvalidRequest, UnusableFile
from labelmint.models.annotations import LabelClasses
from labelmint.models.generator import GeneratorSpec
from labelmint.models.interpreter import InterpreterSpec, StyleInterpreter, fold_batch_norm
from labelmint.models.layout import channels_of

_FILE_NAME = re.compile(r"model_(0|[1-9]\d{0,5})\.pth")


def is_classifier(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("model_state_dict"), dict)


@dataclass(frozen=True)
class Head:
    """One classifier with folded BatchNorm, float64: [h1,D], [h1], [h2,h1], [h2], [K,h2], [K]."""

    tensors: tuple[Tensor, ...]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """D, h1, h2, K."""
        first, _, second, _, third, _ = self.tensors
        return first.shape[1], first.shape[0], second.shape[0], third.shape[0]


def head_files(directory: Path) -> list[Path]:
    """Return `model_0.pth` ... `model_{N-1}.pth` in order; other files, such as training checkpoints, are ignored."""
    found = {int(match[1]): path for path in directory.iterdir() if (match := _FILE_NAME.fullmatch(path.name))}
    if not found:
        raise UnusableFile(directory, "holds no model_0.pth; the numbers of the classifiers start at 0")
    for number in range(max(found) + 1):
        if number not in found:
            raise UnusableFile(directory, f"lacks model_{number}.pth, but has model_{max(found)}.pth")
    return [found[number] for number in sorted(found)]


def import_classifiers(
    directory: Path, spec: GeneratorSpec, layout: str, *, classes: LabelClasses | None
) -> tuple[StyleInterpreter, dict[str, str]]:
    """Return the ensemble for a generator, and the SHA-256 of each file of the ensemble."""
    paths = head_files(directory)
    heads, digests = [], {}
    for path in paths:
        checkpoint = open_checkpoint(path)
        heads.append(read_head(checkpoint))
        digests[path.name] = checkpoint.sha256
        if heads[-1].sizes != heads[0].sizes:
            raise UnusableFile(path, f"has D, h1, h2, K = {heads[-1].sizes}; {paths[0].name} has {heads[0].sizes}")
    feature_dim, h1, h2, num_classes = heads[0].sizes
    try:
        channels = channels_of(layout, spec.taps)
    except ValueError as error:
        raise IncompatibleWeights(str(error)) from error
    if sum(channels.values()) != feature_dim:
        raise IncompatibleWeights(
            f"the classifiers read D = {feature_dim} features, but layout {layout!r} of this generator has "
            f"D = {sum(channels.values())}; name the layout and the generator that they were trained with"
        )
    if classes is None:
        classes = numbered_classes(num_classes)
    if len(classes.names) != num_classes:
        raise InvalidRequest(
            "classes", f"the classifiers have {num_classes} classes, the file lists {len(classes.names)}"
        )
    try:
        interpreter_spec = InterpreterSpec(
            layout, spec.resolution, channels, len(heads), (h1, h2), classes.names, classes.palette
        )
    except ValueError as error:
        raise UnusableFile(directory, f"cannot be imported: {error}") from error
    stacked = [torch.stack(parts) for parts in zip(*(head.tensors for head in heads), strict=True)]
    interpreter = StyleInterpreter(interpreter_spec)
    interpreter.take_layers(list(zip(stacked[::2], stacked[1::2], strict=True)))
    return interpreter.eval(), digests


def read_head(checkpoint: Checkpoint) -> Head:
    """Fold the Linear, ReLU, BatchNorm, Linear, ReLU, BatchNorm, Linear of one file into three linear layers."""
    if not is_classifier(checkpoint.value):
        raise UnusableFile(checkpoint.path, "is not a DatasetGAN classifier: it has no model_state_dict")
    assert isinstance(checkpoint.value, dict)
    table = NameTable(checkpoint.path, checkpoint.value["model_state_dict"])
    h1, feature_dim = table.shape("layers.0.weight", 2)
    h2, _ = table.shape("layers.3.weight", 2)
    num_classes, _ = table.shape("layers.6.weight", 2)

    def take(name: str, *shape: int) -> Tensor:
        return torch.from_numpy(table.take(name, shape)).double()

    folded = [take("layers.0.weight", h1, feature_dim), take("layers.0.bias", h1)]
    for norm, linear, width, out in ((2, 3, h1, h2), (5, 6, h2, num_classes)):
        weight, bias = take(f"layers.{linear}.weight", out, width), take(f"layers.{linear}.bias", out)
        mean, variance = (take(f"layers.{norm}.running_{part}", width) for part in ("mean", "var"))
        if bool((variance < 0).any()):
            raise UnusableFile(checkpoint.path, f"has a negative variance in layers.{norm}.running_var")
        gamma, beta = (take(f"layers.{norm}.{part}", width) for part in ("weight", "bias"))
        table.drop(f"layers.{norm}.num_batches_tracked")
        folded += fold_batch_norm(weight, bias, mean, variance=variance, gamma=gamma, beta=beta)
        if not all(bool(torch.isfinite(part.float()).all()) for part in folded[-2:]):
            raise UnusableFile(checkpoint.path, f"leads to NaN or infinity when layers.{norm} is folded")
    table.finish()
    return Head(tuple(folded))


def numbered_classes(count: int) -> LabelClasses:
    """Return `class_0`, ... with the colours of PASCAL VOC: the class id's bits go to red, green and blue in turn."""
    palette = []
    for class_id in range(count):
        bits = np.unpackbits(np.uint8(class_id), bitorder="little")
        colour = [0, 0, 0]
        for position, bit in enumerate(bits):
            colour[position % 3] |= int(bit) << (7 - position // 3)
        palette.append((colour[0], colour[1], colour[2]))
    return LabelClasses(tuple(f"class_{class_id}" for class_id in range(count)), tuple(palette))
