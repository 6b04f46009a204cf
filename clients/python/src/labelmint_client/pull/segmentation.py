"""Writes segmentation labels: images of class ids.

Rules of this file:
- COCO gets `instances.json` with polygons and `instances_rle.json` with run lengths. Both have one annotation for each
  connected region of a class, and differ only in `segmentation`. Area and box are those of exactly these pixels.
- Category ids are class ids. Class 0 is the background and not a category.
- YOLO and labelme get a polygon for each part of a class but the background. YOLO's class ids begin with 0 at class 1.
- Ignored pixels have the value 255 where a label is an image. They belong to no annotation, box or polygon.
"""

from __future__ import annotations

from typing import Any

from labelmint_client import Model, Sample
from labelmint_client.pull.directory import Json
from labelmint_client.pull.formats import LabelmeShape, LabelMode, MdsColumn, Written, YoloLine, in_yaml, label_of
from labelmint_client.pull.outlines import outlines
from labelmint_client.pull.pixels import Bytes, label_npy, label_png

HAS_LABEL_IMAGE = True
NO_FIELDS: dict[str, Any] = {}
COLUMN = "label"
COCO_NOTE = ""
CALLS = {
    "webdataset": 'sample["label.npy"].shape',
    "folder": """from pathlib import Path

import numpy
from PIL import Image

for path in sorted(Path("images").iterdir()):
    image = numpy.asarray(Image.open(path))
    class_ids = numpy.asarray(Image.open(Path("labels", path.name)))
    print(path.stem, image.shape, class_ids.shape, class_ids.max())""",
    "coco": "instances.json",
    "mds": 'sample["label"].size',
}
_PALETTE = """The labels are palette PNGs: the palette indices are the class ids, and PIL reads the indices. A reader
that converts them to gray (OpenCV's IMREAD_GRAYSCALE, torchvision, PIL's convert("L")) gets the gray of the palette's
colours instead of class ids. For such readers, `labelmint pull --format masks` writes class ids as gray values."""
_IDS = "The labels are gray PNGs: the values are the class ids. They look black, because class ids are small numbers."
_EXACT = """`instances.json` has polygons along the edges of pixels, which pycocotools fills exactly. OpenCV's fillPoly
also draws the border, so its regions are up to one pixel larger. `instances_rle.json` has the same regions as run
lengths, which are exact in every reader. Hugging Face `datasets` finds only the images."""

_PARTS = """Each polygon is a part of a class: pixels that are connected by their edges. Its line runs 0.01 pixels
inside these edges, and around holes. So OpenCV's fillPoly, Pillow and pycocotools fill exactly these pixels. Background
and ignored pixels are in no polygon."""
_REMARKS = {
    "coco": _EXACT,
    "folder": _PALETTE,
    "parquet": _PALETTE,
    "voc": _PALETTE,
    "masks": _IDS,
    "mds": _IDS,
    "yolo": _PARTS,
    "labelme": _PARTS,
}


def fields(sample: Sample, model: Model) -> dict[str, Any]:
    return {}


def members(written: Written) -> dict[str, bytes]:
    """Return the label as a NumPy array, because WebDataset's image decoders turn a palette PNG into its colours."""
    return {"label.npy": label_npy(label_of(written))}


def file(written: Written, palette: Bytes | None) -> tuple[str, bytes]:
    """Return a palette PNG whose indices are class ids, or a gray PNG whose values are class ids."""
    return f"labels/{written.key}.png", label_png(label_of(written), palette)


def metadata(line: Json, path: str) -> Json:
    return {"label_file_name": path}


def column_type() -> Any:
    import pyarrow as pa

    return pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def cell(written: Written, palette: Bytes | None) -> Any:
    return {"bytes": label_png(label_of(written), palette), "path": f"{written.key}.png"}


def coco_annotations(written: Written, model: Model) -> list[Json]:
    from labelmint_client.pull.regions import regions

    return [
        {
            "category_id": region.class_id,
            "iscrowd": 0,
            "area": region.area,
            "bbox": region.box,
            "polygons": region.polygons,
            "run_lengths": region.run_lengths,
        }
        for region in regions(label_of(written), range(1, len(model.class_names)))
    ]


def coco_files(model: Model) -> list[tuple[str, list[Json], str]]:
    classes = list(enumerate(model.class_names))[1:]
    categories = [{"id": class_id, "name": label, "supercategory": model.name} for class_id, label in classes]
    return [("instances.json", categories, "polygons"), ("instances_rle.json", categories, "run_lengths")]


def remarks(name: str, label_mode: LabelMode) -> list[str]:
    told = _IDS if label_mode == "ids" else _REMARKS.get(name)
    return [told] if told else []


def yolo_lines(written: Written, model: Model) -> list[YoloLine]:
    side = model.resolution
    return [
        (class_id - 1, [share for x, y in line for share in (x / side, y / side)])
        for class_id, line in outlines(label_of(written), range(1, len(model.class_names)))
    ]


def yolo_facts(model: Model) -> dict[str, str]:
    return {"names": in_yaml(list(model.class_names[1:]))}


def labelme_shapes(written: Written, model: Model) -> list[LabelmeShape]:
    names = model.class_names
    return [(names[class_id], "polygon", line) for class_id, line in outlines(label_of(written), range(1, len(names)))]


def mds_column(model: Model) -> MdsColumn:
    return "label", "png", None


def mds_value(written: Written) -> dict[str, bytes]:
    return {"label": label_png(label_of(written), None)}
