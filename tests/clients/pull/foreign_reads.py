"""Reads pulls with the readers of other projects and saves what they saw as NumPy arrays.

python foreign_reads.py DIRECTORY/NAME-FORMAT ...     It runs in the environment that `make readers` installs.

DIRECTORY/NAME-FORMAT.npz gets `seed` [N], `image` [N,H,W,3], `label` [N,H,W] or `keypoints` [N,...], and what else the
format says.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

Seen = dict[str, Any]


def mds(out: Path) -> Iterator[Seen]:
    """Mosaic Streaming's own reader. Its writer, given the same values, makes the same files."""
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.format.mds import encodings
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(out), batch_size=1, shuffle=False, validate_hash=None)
    for sample in dataset:
        assert sample["image"].mode == "RGB" and ("label" not in sample or sample["label"].mode == "L")
        seen = {name: sample[name] for name in ("label", "keypoints") if name in sample}
        yield {"seed": sample["seed"], "image": sample["image"], **seen, "score": sample["json"]["js_score"]}
    for shard in dataset.shards:
        columns = dict(zip(shard.column_names, shard.column_encodings, strict=True))
        again = out.parent / "again"
        # PNG and JSON can be written in more than one way, so the writer gets the bytes that were read.
        with (
            patch.dict(encodings._encodings, {"png": encodings.Bytes, "json": encodings.Bytes}),
            MDSWriter(columns=columns, out=str(again), size_limit=None, exist_ok=True) as writer,
        ):
            for index in range(len(shard)):
                writer.write(shard[index])
        name = shard.raw_data.basename
        assert (again / "shard.00000.mds").read_bytes() == (out / name).read_bytes(), name
        (written,) = json.loads((again / "index.json").read_text())["shards"]
        (told,) = (
            s for s in json.loads((out / "index.json").read_text())["shards"] if s["raw_data"]["basename"] == name
        )
        assert {**written, "raw_data": {**written["raw_data"], "basename": name}} == told


def yolo(out: Path) -> Iterator[Seen]:
    """Ultralytics' data set, up to the tensors that it trains on."""
    from ultralytics.cfg import get_cfg
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    data = check_det_dataset(str(out / "data.yaml"), autodownload=False)
    task = "pose" if "kpt_shape" in data else "segment"
    hyp = get_cfg(overrides={"mask_ratio": 1, "overlap_mask": True})
    assert data["val"] == data["train"]
    dataset = YOLODataset(data["train"], imgsz=128, augment=False, hyp=hyp, data=data, task=task, batch_size=1)
    assert len(dataset) == len(list((out / "images").iterdir())), "it leaves out what it cannot read"
    for item in dataset:
        image, classes = item["img"].numpy().transpose(1, 2, 0), item["cls"].numpy().ravel().astype(int)
        seen: Seen = {"seed": int(Path(item["im_file"]).stem), "image": image}
        seen["names"] = [data["names"][class_id] for class_id in range(data["nc"])]
        if task == "segment":
            # In the mask of an image, i + 1 is the i-th part.
            numbers = item["masks"].numpy()[0].astype(int)
            seen["label"] = np.concatenate([[0], classes + 1])[numbers]
        else:
            seen["flip"], seen["point_names"] = data["flip_idx"], data["kpt_names"][0]
            seen["keypoints"] = item["keypoints"].numpy()[0]
            seen["box"] = item["bboxes"].numpy()[0]
        yield seen


def labelme(out: Path) -> Iterator[Seen]:
    """labelme's reader of files, and its converter of shapes to class ids."""
    from labelme import utils
    from labelme._label_file import read_label_file
    from PIL import Image

    names = (out / "labels.txt").read_text().splitlines()
    for path in sorted((out / "images").glob("*.json")):
        file = read_label_file(str(path))
        image = np.asarray(Image.open(path.with_suffix(".png")))
        assert np.array_equal(utils.img_data_to_arr(file.image_data), image)
        seen: Seen = {"seed": int(path.stem), "image": image}
        if any(shape["shape_type"] == "point" for shape in file.shapes):
            points = {shape["label"]: shape["points"][0] for shape in file.shapes}
            seen["keypoints"] = [points.get(name, (np.nan, np.nan)) for name in names]
        else:
            ids = {name: class_id for class_id, name in enumerate(names)}
            seen["label"], _ = utils.shapes_to_label(image.shape, file.shapes, ids)
        yield seen


def voc(out: Path) -> Iterator[Seen]:
    """torchvision's VOCSegmentation and VOCDetection."""
    from torchvision.datasets import VOCDetection, VOCSegmentation

    labels = VOCSegmentation(str(out), "2012", "train")
    boxes = VOCDetection(str(out), "2012", "train")
    for path, (image, label), (same, told) in zip(labels.images, labels, boxes, strict=True):
        assert np.array_equal(image, same) and told["annotation"]["filename"] == Path(path).name
        yield {
            "seed": int(Path(path).stem),
            "image": image,
            "label": label,
            "json": json.dumps(told["annotation"].get("object", [])),
        }


def masks(out: Path) -> Iterator[Seen]:
    """OpenCV, as most readers of masks call it."""
    import cv2

    for path in sorted((out / "masks").iterdir()):
        image = cv2.imread(str(out / "images" / path.name))[..., ::-1]
        yield {"seed": int(path.stem), "image": image, "label": cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)}


READERS: dict[str, Callable[[Path], Iterator[Seen]]] = {
    "labelme": labelme,
    "masks": masks,
    "mds": mds,
    "voc": voc,
    "yolo": yolo,
}

if __name__ == "__main__":
    for out in map(Path, sys.argv[1:]):
        seen = list(READERS[out.name.rpartition("-")[2]](out))
        keys = {key: [np.asarray(each[key]) for each in seen] for key in seen[0]}
        np.savez(out.with_suffix(".npz"), **{key: np.stack(values) for key, values in keys.items()})
