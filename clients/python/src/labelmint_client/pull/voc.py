"""Writes samples in the layout of PASCAL VOC 2012, below `VOCdevkit/VOC2012/`.

Rules of this file:
- `JPEGImages/SEED.jpg` is a JPEG of high quality, because readers of VOC look for that name. This loses a little of the
  image; all other formats have PNG.
- `SegmentationClass/SEED.png` is a palette PNG whose indices are class ids. An ignored pixel is 255, as in VOC.
- `Annotations/SEED.xml` has a box for each connected region of a class but class 0. Corners count from 1 and are part
  of the box, as in VOC.
"""

from __future__ import annotations

import io
from xml.etree import ElementTree

from PIL import Image

from labelmint_client import Model
from labelmint_client.pull.directory import Json, PullDirectory
from labelmint_client.pull.errors import PullError
from labelmint_client.pull.formats import Kept, LabelMode, Written, label_of
from labelmint_client.pull.pixels import Bytes, label_png
from labelmint_client.pull.regions import Region, regions

CALL = """import numpy
from torchvision.datasets import VOCDetection, VOCSegmentation

for image, label in VOCSegmentation(".", "2012", "train"):
    print(image.size, numpy.unique(numpy.asarray(label)))  # class ids, 255 where ignored
for image, boxes in VOCDetection(".", "2012", "train"):
    print([part["name"] for part in boxes["annotation"].get("object", [])])"""

_BASE = "VOCdevkit/VOC2012"
_QUALITY = 95
_SIDES = ("xmin", "ymin", "xmax", "ymax")


class Writer:
    """Writes three files per sample."""

    def __init__(self, directory: PullDirectory, model: Model, label_mode: LabelMode) -> None:
        self._directory = directory
        self._model = model
        for name in model.class_names:
            if ":" in name or name.startswith("#"):
                raise PullError(f"class {name!r}: labelmap.txt cannot hold this name; use another format than voc")

    def reopen(self, files: list[Json], samples: int) -> None:
        pass  # nothing to reopen: each sample of the shard has its own files

    def add(self, written: Written) -> Kept:
        label, names = label_of(written), self._model.class_names
        annotation = _annotation(
            written, [(names[each.class_id], each) for each in regions(label, range(1, len(names)))]
        )
        files = {
            f"JPEGImages/{written.key}.jpg": _jpeg(written.image),
            f"SegmentationClass/{written.key}.png": label_png(label, self._model.palette),
            f"Annotations/{written.key}.xml": annotation,
        }
        return Kept([self._directory.write(f"{_BASE}/{name}", data) for name, data in files.items()])

    def end_shard(self, index: int) -> list[Json]:
        return []

    def finish(self) -> list[Json]:
        return [
            self._write_seeds("Segmentation"),
            self._write_seeds("Main"),
            self._directory.write(f"{_BASE}/labelmap.txt", _label_map(self._model)),
        ]

    def _write_seeds(self, kind: str) -> Json:
        """Write the list of samples that readers of segmentation or of boxes go by."""
        with self._directory.aside.open("w", encoding="ascii") as file:
            for part in self._directory.parts():
                file.writelines(f"{sample['line']['seed']:010d}\n" for sample in part["samples"])
        return self._directory.publish(f"{_BASE}/ImageSets/{kind}/train.txt")


def _jpeg(image: Bytes) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    return buffer.getvalue()


def _annotation(written: Written, named: list[tuple[str, Region]]) -> bytes:
    root = ElementTree.Element("annotation")
    height, width, depth = written.image.shape
    _add(root, "folder", "VOC2012")
    _add(root, "filename", f"{written.key}.jpg")
    size = ElementTree.SubElement(root, "size")
    for name, value in (("width", width), ("height", height), ("depth", depth)):
        _add(size, name, value)
    _add(root, "segmented", 1)
    for label, region in named:
        part = ElementTree.SubElement(root, "object")
        for name, text in (("name", label), ("pose", "Unspecified"), ("truncated", 0), ("difficult", 0)):
            _add(part, name, text)
        box = ElementTree.SubElement(part, "bndbox")
        left, top, across, down = (int(value) for value in region.box)
        for name, value in zip(_SIDES, (left + 1, top + 1, left + across, top + down), strict=True):
            _add(box, name, value)
    ElementTree.indent(root)
    return f"{ElementTree.tostring(root, encoding='unicode')}\n".encode()


def _add(parent: ElementTree.Element, name: str, text: object) -> None:
    ElementTree.SubElement(parent, name).text = str(text)


def _label_map(model: Model) -> bytes:
    """Return the names and colours of the classes, in the form that CVAT writes."""
    lines = ["# label:color_rgb:parts:actions"]
    for name, colour in zip(model.class_names, model.palette.tolist(), strict=True):
        lines.append(f"{name}:{','.join(map(str, colour))}::")
    return "\n".join([*lines, ""]).encode()
