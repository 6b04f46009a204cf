"""Each format as its own readers see it, without a warning of theirs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import datasets
import httpx
import numpy as np
import pytest
import webdataset
from PIL import Image
from pycocotools.coco import COCO

from labelmint_client import Client, Sample, SampleOptions
from labelmint_client.pull import PullError, PullOptions, pull
from labelmint_client.pull.keypoints import MIN_CONFIDENCE
from tests.conftest import ROOT, Service, need_program

pytestmark = pytest.mark.triton


COUNT = 5
OURS = ("webdataset", "coco", "folder", "parquet")  # test_foreign_readers.py has the others


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves closing its files to Python
        yield


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[Client]:
    with Client(service.grpc) as connected:
        yield connected


@pytest.fixture(scope="module")
def samples(client: Client) -> list[Sample]:
    return list(client.stream_samples("faces", count=COUNT, options=SampleOptions(include_js_map=True)))


def pulled(client: Client, out: Path, name: str, model: str = "faces", **more: object) -> Path:
    pull(client, PullOptions(model, COUNT, name, samples_per_shard=3, **more), out)  # type: ignore[arg-type]
    return out


def test_webdataset(client: Client, samples: list[Sample], tmp_path: Path) -> None:
    out = pulled(client, tmp_path / "out", "webdataset")
    reader = webdataset.WebDataset(str(out / "shard-{000000..000001}.tar"), shardshuffle=False).decode("pil")
    for found, sample in zip(reader, samples, strict=True):
        assert found["__key__"] == f"{sample.seed:010d}" and found["json"]["js_score"] == sample.js_score
        assert np.array_equal(np.asarray(found["image.png"]), sample.image)
        assert np.array_equal(found["label.npy"], sample.label)


def test_a_tar_is_what_the_gateway_streams(client: Client, http: httpx.Client, tmp_path: Path) -> None:
    for model in ("faces", "faces_keypoints"):
        pull(client, PullOptions(model, 3, start_seed=40, shard_index=1, shard_count=2), tmp_path / model)
        query = {"start_seed": 40, "count": 3, "shard_index": 1, "shard_count": 2}
        streamed = http.get(f"/v1/models/{model}/samples.tar", params=query).content
        assert (tmp_path / model / "shard-000000.tar").read_bytes() == streamed


def test_folder(client: Client, samples: list[Sample], tmp_path: Path) -> None:
    out = pulled(client, tmp_path / "out", "folder")
    palette = client.get_model("faces").palette
    assert len(list(out.glob("images/*"))) == len(list(out.glob("labels/*"))) == COUNT
    for sample in samples:
        assert np.array_equal(np.asarray(Image.open(out / f"images/{sample.seed:010d}.png")), sample.image)
        label = Image.open(out / f"labels/{sample.seed:010d}.png")
        assert label.mode == "P" and np.array_equal(np.asarray(label), sample.label)
        assert np.array_equal(np.asarray(label.convert("RGB")), palette[sample.label])


def test_parquet(client: Client, samples: list[Sample], tmp_path: Path) -> None:
    out = pulled(client, tmp_path / "out", "parquet")
    found = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(found.features["image"], datasets.Image) and isinstance(found.features["label"], datasets.Image)
    classes = found.features["classes"].feature
    assert isinstance(classes, datasets.ClassLabel) and tuple(classes.names) == client.get_model("faces").class_names
    for row, sample in zip(found, samples, strict=True):
        assert row["seed"] == sample.seed and row["js_score"] == sample.js_score and row["style_seed"] is None
        assert np.array_equal(np.asarray(row["image"]), sample.image)
        assert np.array_equal(np.asarray(row["label"]), sample.label)
        assert row["classes"] == np.unique(sample.label).tolist()  # type: ignore[arg-type]


def test_coco(client: Client, samples: list[Sample], tmp_path: Path) -> None:
    """Both files, in pycocotools: every pixel of a class is in one annotation, and the other pixels are in none."""
    out = pulled(client, tmp_path / "out", "coco")
    polygons, run_lengths = (COCO(out / "annotations" / name) for name in ("instances.json", "instances_rle.json"))
    names = client.get_model("faces").class_names
    for coco in (polygons, run_lengths):
        assert [(c["id"], c["name"]) for c in coco.loadCats(coco.getCatIds())] == list(enumerate(names))[1:]
        assert [coco.imgs[i]["seed"] for i in coco.getImgIds()] == [sample.seed for sample in samples]
        for image_id, sample in zip(coco.getImgIds(), samples, strict=True):
            image = coco.imgs[image_id]
            assert np.array_equal(np.asarray(Image.open(out / "images" / image["file_name"])), sample.image)
            covered = np.zeros((image["height"], image["width"]), int)
            for annotation in coco.loadAnns(coco.getAnnIds(image_id)):
                mask = coco.annToMask(annotation)
                assert mask.sum() == annotation["area"] and _box(mask) == annotation["bbox"]
                covered += mask * annotation["category_id"]
            assert np.array_equal(covered, sample.label)
    assert polygons.anns.keys() == run_lengths.anns.keys()
    assert [{**a, "segmentation": None} for a in polygons.anns.values()] == [
        {**a, "segmentation": None} for a in run_lengths.anns.values()
    ]


def test_keypoints(client: Client, tmp_path: Path) -> None:
    """In every format of ours; those below the confidence that COCO's are cut at are not labelled there."""
    for name in OURS:
        pulled(client, tmp_path / name, name, "faces_keypoints")
    names = client.get_model("faces_keypoints").keypoint_names
    told = []
    for sample in client.stream_samples("faces_keypoints", count=COUNT):
        assert sample.keypoints is not None
        rows = zip(names, sample.keypoints.tolist(), strict=True)
        told.append([{"name": name, "x": x, "y": y, "confidence": confidence} for name, (x, y, confidence) in rows])
    assert [json.loads(path.read_bytes()) for path in sorted(tmp_path.glob("folder/keypoints/*"))] == told
    reader = webdataset.WebDataset(str(tmp_path / "webdataset/shard-{000000..000001}.tar"), shardshuffle=False)
    assert [found["json"]["keypoints"] for found in reader.decode("pil")] == told
    found = datasets.load_dataset(str(tmp_path / "parquet"), split="train", cache_dir=str(tmp_path / "cache"))
    assert list(found["keypoints"]) == told and "label" not in found.features
    coco = COCO(tmp_path / "coco" / "annotations" / "keypoints.json")
    (category,) = coco.loadCats(coco.getCatIds())
    # The same points, under the person's sides.
    person = ["right_eye", "left_eye", "nose_tip", "right_mouth_corner", "left_mouth_corner"]
    assert category["keypoints"] == [*person, "right_ear_tip", "left_ear_tip"] and names[0] == "left_eye"
    assert "the person's" in coco.dataset["info"]["note"]
    drawn = {frozenset(category["keypoints"][number - 1] for number in pair) for pair in category["skeleton"]}
    eyes_and_nose = {frozenset(pair) for pair in (("left_eye", "right_eye"), ("left_eye", "nose_tip"))}
    assert eyes_and_nose < drawn and frozenset(("left_eye", "right_ear_tip")) not in drawn
    for annotation, points in zip(coco.loadAnns(coco.getAnnIds()), told, strict=True):
        labelled = [point["confidence"] >= MIN_CONFIDENCE for point in points]
        triples = [(p["x"], p["y"], 2) if here else (0, 0, 0) for p, here in zip(points, labelled, strict=True)]
        assert annotation["keypoints"] == [value for triple in triples for value in triple]
        assert annotation["num_keypoints"] == sum(labelled) > 0


def test_the_most_uncertain_pixels_are_ignored(client: Client, samples: list[Sample], tmp_path: Path) -> None:
    """Of each image those above the quantile of its own; in COCO they are in no annotation."""
    out = {name: pulled(client, tmp_path / name, name, ignore_js_quantile=0.9) for name in OURS}
    found = datasets.load_dataset(str(out["parquet"]), split="train", cache_dir=str(tmp_path / "cache"))
    reader = webdataset.WebDataset(str(out["webdataset"] / "shard-{000000..000001}.tar"), shardshuffle=False)
    coco = COCO(out["coco"] / "annotations" / "instances.json")
    for sample, row, member, image_id in zip(samples, found, reader.decode("pil"), coco.getImgIds(), strict=True):
        assert sample.js_map is not None and sample.label is not None
        place = math.ceil(0.9 * (sample.js_map.size - 1))
        ignored = sample.js_map > np.sort(sample.js_map, axis=None)[place]
        assert 0 < ignored.sum() <= sample.js_map.size - 1 - place
        label = np.where(ignored, 255, sample.label)
        assert np.array_equal(np.asarray(Image.open(out["folder"] / f"labels/{sample.seed:010d}.png")), label)
        assert np.array_equal(np.asarray(row["label"]), label) and np.array_equal(member["label.npy"], label)
        assert row["classes"] == [class_id for class_id in np.unique(label) if class_id != 255]
        annotations = coco.loadAnns(coco.getAnnIds(image_id))
        covered = sum(coco.annToMask(annotation) * annotation["category_id"] for annotation in annotations)
        assert np.array_equal(covered, np.where(ignored, 0, label))
    with pytest.raises(PullError, match="no label pixels to ignore"):
        pulled(client, tmp_path / "none", "folder", "faces_keypoints", ignore_js_quantile=0.9)


def test_fiftyone(client: Client, tmp_path: Path) -> None:
    """FiftyOne's importer, in an environment of its own: it is large, and needs no database for this."""
    python = need_program(str(ROOT / ".venv-fiftyone" / "bin" / "python"), "fiftyone, by `make fiftyone`")
    pulled(client, tmp_path / "parts", "coco")
    pulled(client, tmp_path / "points", "coco", "faces_keypoints")
    environment = {**os.environ, "FIFTYONE_DO_NOT_TRACK": "true", "HOME": str(tmp_path)}
    command = [python, str(Path(__file__).with_name("fiftyone_reads.py")), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "parts" / "annotations" / "instances.json").read_text())["annotations"]
    counts = {"instances.json": len(parts), "instances_rle.json": len(parts), "keypoints.json": COUNT}
    assert json.loads(done.stdout.splitlines()[-1]) == counts


def _box(mask: np.ndarray) -> list[float]:
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
