"""Writes tests/data/annotations/: what `synth` writes, annotated by the real tools.

Rules of this file:
- The label files are saved by labelme's own window, shapes drawn on the images that it opened from the directory.
- masks/ is what labelme's own converter makes of them.
- The COCO files are exported by datumaro, the library with which CVAT writes its formats.

In an environment of its own (both tools need far more than the tests, datumaro a newer numpy):
    pip install labelme==6.3.1 datumaro==1.13.12 . pycocotools
    QT_QPA_PLATFORM=offscreen python tests/data/make_annotations.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from datumaro.components.annotation import AnnotationType as Kind
from datumaro.components.annotation import Bbox, LabelCategories, Mask, Points, PointsCategories, Polygon
from datumaro.components.dataset import Dataset
from labelme._label_file import LabelFile
from labelme._shape import Shape
from labelme.app import MainWindow
from labelme.utils import shapes_to_label
from PyQt5 import QtCore, QtWidgets

from labelmint.models.annotations import LabelClasses, image_path, write_dataset, write_masks
from labelmint.models.annotations.directory import write_names

OUT = Path(__file__).parent / "annotations"
CLASSES = LabelClasses(("background", "skin", "eye"), ((0, 0, 0), (224, 172, 140), (40, 90, 200)))
KEYPOINTS = (("left_eye", "right_eye", "nose"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
HEIGHT, WIDTH = 24, 40  # not square, so that nothing is transposed unseen
BLOT = np.array([[0, 1, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]], bool)
SHAPES = {
    3: [
        ("skin", "polygon", [(4.2, 3.1), (33.7, 2.4), (37.5, 20.9), (12.3, 22.6)], None),
        ("eye", "circle", [(14.5, 9.2), (17.1, 10.8)], None),
        ("eye", "rectangle", [(30.4, 12.7), (24.8, 8.3)], None),
        ("background", "mask", [(20, 15), (23, 17)], BLOT),
    ],
    12: [
        ("skin", "oriented_rectangle", [(8.0, 2.0), (30.0, 8.0), (26.0, 22.0), (4.0, 16.0)], None),
        ("eye", "mask", [(36, 21), (39, 23)], BLOT),
        ("eye", "circle", [(38.0, 2.0), (38.0, 6.5)], None),  # hangs over the edge
    ],
}


def annotate_with_labelme() -> None:
    application = QtWidgets.QApplication([])
    config = {"labels": list(CLASSES.names), "validate_label": "exact", "auto_save": True}
    window = MainWindow(config_overrides=config, file_or_dir=str(OUT / "images"))
    assert [Path(name) for name in window.image_list] == [image_path(OUT, seed) for seed in SHAPES]
    for seed, shapes in SHAPES.items():
        assert window._image_path == str(image_path(OUT, seed)) and window._image.width() == WIDTH
        drawn = []
        for label, kind, points, mask in shapes:
            shape = Shape(label=label, shape_type=kind, flags={}, mask=mask)
            for x, y in points:
                shape.add_point(QtCore.QPointF(x, y))
            shape.close()
            drawn.append(shape)
        window._load_shapes(drawn)
        assert window.save_labels(str(image_path(OUT, seed).with_suffix(".json")))
        window._open_next_image()
    del window, application


def convert_with_labelme() -> None:
    ids = {name: number for number, name in enumerate(CLASSES.names)}
    masks = {}
    for seed in SHAPES:
        shapes = LabelFile(str(image_path(OUT, seed).with_suffix(".json"))).shapes
        masks[seed] = shapes_to_label((HEIGHT, WIDTH), shapes, ids)[0].astype(np.uint8)
    (OUT / "masks").mkdir(exist_ok=True)
    write_masks(OUT, CLASSES, masks)


def export_with_datumaro() -> None:
    scratch = OUT / "scratch"
    rng = np.random.default_rng(1)
    images = Dataset.import_from(str(OUT / "images"), "image_dir")
    labels = LabelCategories.from_iterable(CLASSES.names)
    skeleton = LabelCategories.from_iterable(["face"])
    points = PointsCategories.from_iterable([(0, list(KEYPOINTS[0]), [(1, 3), (2, 3)])])
    areas, keypoints = [], []
    for item in images:
        assert item.media.size == (HEIGHT, WIDTH)
        blob = np.zeros((HEIGHT, WIDTH), bool)
        blob[10:20, 5:9] = rng.random((10, 4)) > 0.3
        areas.append(
            item.wrap(
                annotations=[
                    Polygon([3.5, 2.0, 36.25, 4.5, 30.0, 21.75, 6.0, 19.0], label=1, group=1),
                    Polygon([12.0, 6.0, 18.0, 6.5, 14.0, 12.0], label=2, group=2),
                    Mask(blob, label=2, group=3, attributes={"is_crowd": True}),
                    Polygon([25.0, 10.0, 28.0, 10.0, 28.0, 14.0, 25.0, 14.0], label=0, group=4),
                ]
            )
        )
        eyes = [*rng.uniform(0, 23, 6).round(2)]
        seen = [2, 1, 2] if item.id.endswith("3") else [2, 2, 0]
        group = [Points(eyes, seen, label=0, group=1), Bbox(2, 2, 20, 20, label=0, group=1)]
        keypoints.append(item.wrap(annotations=group))
    Dataset.from_iterable(areas, categories={Kind.label: labels}, media_type=images.media_type()).export(
        str(scratch), "coco_instances", save_media=False
    )
    Dataset.from_iterable(
        keypoints, categories={Kind.label: skeleton, Kind.points: points}, media_type=images.media_type()
    ).export(str(scratch), "coco_person_keypoints", save_media=False)
    (OUT / "annotations").mkdir()
    for exported in sorted((scratch / "annotations").glob("*.json")):
        content = json.loads(exported.read_text())
        (OUT / "annotations" / exported.name).write_text(json.dumps(content, indent=1) + "\n")
    shutil.rmtree(scratch)
    write_names(OUT / "keypoints.json", *KEYPOINTS)


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    rng = np.random.default_rng(0)
    images = {seed: rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for seed in SHAPES}
    write_dataset(OUT, "0" * 64, 1.0, images=images)
    annotate_with_labelme()
    convert_with_labelme()
    export_with_datumaro()


if __name__ == "__main__":
    main()
