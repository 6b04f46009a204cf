"""Formats of other projects, as the readers of those projects see them: to the pixel, also of labels that are hard.

The readers run in an environment of their own, because Mosaic Streaming does not admit the transformers of the tests,
and because a torchvision that does not fit torch breaks every library that would use it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from labelmint.models.annotations.directory import Drawn
from labelmint.models.annotations.labelme import read_shapes
from labelmint_client import Client, Model, Sample, SampleOptions
from labelmint_client.pull import PullError, PullOptions, mds, pull, verify
from labelmint_client.pull.directory import PullDirectory
from labelmint_client.pull.formats import Written, open_format
from labelmint_client.pull.keypoints import MIN_CONFIDENCE
from labelmint_client.pull_formats import PULL_FORMATS
from tests.conftest import ROOT, Service, need_program
from tests.support.labels import noise

pytestmark = [pytest.mark.triton, pytest.mark.torch]


COUNT = 5
IGNORED = 0.9
FOREIGN = ("labelme", "masks", "mds", "voc", "yolo")
REGIONS = ("labelme", "yolo")  # they know no ignored pixels
POSES = tuple(name for name in FOREIGN if not PULL_FORMATS[name].only_label_images)

Seen = dict[str, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[Client]:
    with Client(service.grpc) as connected:
        yield connected


@pytest.fixture(scope="module")
def samples(client: Client) -> list[Sample]:
    return list(client.stream_samples("faces", count=COUNT, options=SampleOptions(include_js_map=True)))


@pytest.fixture(scope="module")
def hard(client: Client) -> tuple[Model, list[np.ndarray]]:
    """A model of six classes, and labels: of noise, of background only, of one class only, of ignored pixels only."""
    names = ("background", "a b", 'quo"te', "ünï", "10", "no: yes, {it} #is")
    model = client.get_model("faces")
    model = replace(model, name="hard", class_names=names, palette=model.palette[: len(names)])
    noises = [noise(128, grain, len(names)) for grain in (1.0, 2.0, 6.0)]
    return model, [*noises, *(np.full((128, 128), value, np.uint8) for value in (0, 5, 255))]


@pytest.fixture(scope="module")
def seen(
    client: Client, hard: tuple[Model, list[np.ndarray]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Seen]:
    """The pulls, and what the readers saw of them, by NAME-FORMAT."""
    python = need_program(str(ROOT / ".venv-readers" / "bin" / "python"), "the readers, by `make readers`")
    path = tmp_path_factory.mktemp("foreign")
    for name in FOREIGN:
        pull(client, PullOptions("faces", COUNT, name, samples_per_shard=3), path / f"faces-{name}")
        ignoring = PullOptions("faces", COUNT, name, samples_per_shard=3, ignore_js_quantile=IGNORED)
        pull(client, ignoring, path / f"ignoring-{name}")
        model = hard[0] if name != "voc" else replace(hard[0], class_names=(*hard[0].class_names[:5], "no colon"))
        write(path / f"hard-{name}", name, model, hard[1])
    for name in POSES:
        pull(client, PullOptions("faces_keypoints", COUNT, name, samples_per_shard=3), path / f"poses-{name}")
    outs = sorted(path.iterdir())
    (path / "home").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support" / "readers"), "HOME": str(path / "home")}
    environment |= {"YOLO_OFFLINE": "true", "YOLO_CONFIG_DIR": str(path / "home"), "QT_QPA_PLATFORM": "offscreen"}
    command = [python, str(Path(__file__).with_name("foreign_reads.py")), *map(str, outs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "corrupt image/label" not in done.stderr + done.stdout and "duplicate" not in done.stderr + done.stdout
    return path, {out.name: dict(np.load(out.with_suffix(".npz"))) for out in outs}


def write(out: Path, name: str, model: Model, labels: list[np.ndarray]) -> None:
    """Write labels as a pull would write them, with images of the class ids."""
    with PullDirectory(out) as directory:
        writer, samples = open_format(name, directory, model, label_mode="palette"), []
        for seed, label in enumerate(labels):
            writer.add(Written(seed, np.stack([label] * 3, -1), label, {"seed": seed, "js_score": 0.5}))
            samples.append({"line": {"seed": seed}})
        directory.add_part(0, {"files": writer.end_shard(0), "samples": samples})
        writer.finish()


def ious(found: np.ndarray, label: np.ndarray) -> dict[int, float]:
    """The intersection over union of each class that either has."""
    return {
        int(class_id): float(((found == class_id) & (label == class_id)).sum())
        / float(((found == class_id) | (label == class_id)).sum())
        for class_id in np.union1d(found, label)
    }


@pytest.mark.parametrize("name", FOREIGN)
def test_images_and_labels(name: str, seen: tuple[Path, Seen], samples: list[Sample]) -> None:
    found = seen[1][f"faces-{name}"]
    assert found["seed"].tolist() == [sample.seed for sample in samples]
    images = np.stack([sample.image for sample in samples if sample.image is not None])
    if name == "voc":  # JPEG loses a little; docs/pulling.md says how much
        error = np.mean((found["image"].astype(float) - images) ** 2)
        assert 40 < 10 * np.log10(255**2 / error) < 60
    else:
        assert np.array_equal(found["image"], images)
    for label, sample in zip(found["label"], samples, strict=True):
        assert sample.label is not None
        assert set(ious(label, sample.label).values()) == {1.0}


@pytest.mark.parametrize("name", FOREIGN)
def test_ignored_pixels(name: str, seen: tuple[Path, Seen], samples: list[Sample]) -> None:
    """255 where a label is an image, and in no polygon, so that it looks like background there."""
    for label, sample in zip(seen[1][f"ignoring-{name}"]["label"], samples, strict=True):
        assert sample.js_map is not None and sample.label is not None
        ignored = sample.js_map > np.quantile(sample.js_map, IGNORED, method="higher")
        assert ignored.any()
        assert np.array_equal(label, np.where(ignored, 0 if name in REGIONS else 255, sample.label))


@pytest.mark.parametrize("name", FOREIGN)
def test_hard_labels(name: str, seen: tuple[Path, Seen], hard: tuple[Model, list[np.ndarray]]) -> None:
    """Holes, parts that touch at a corner, single pixels, and images without any part: the IoU of each class is 1."""
    found = seen[1][f"hard-{name}"]
    assert len(found["seed"]) == len(hard[1])
    for label, wanted in zip(found["label"], hard[1], strict=True):
        wanted = np.where(wanted == 255, 0, wanted) if name in REGIONS else wanted
        assert set(ious(label, wanted).values()) == {1.0}


def test_the_names_of_classes(seen: tuple[Path, Seen], client: Client, hard: tuple[Model, list[np.ndarray]]) -> None:
    """Where a format has names, its readers find those of the model."""
    path, found = seen
    names = client.get_model("faces").class_names
    assert found["faces-yolo"]["names"][0].tolist() == list(names[1:])
    assert found["hard-yolo"]["names"][0].tolist() == list(hard[0].class_names[1:])
    for file in ("faces-masks/classes.txt", "faces-labelme/labels.txt"):
        assert (path / file).read_text().splitlines() == list(names)
    colours = client.get_model("faces").palette.tolist()
    told = (path / "faces-voc" / "VOCdevkit" / "VOC2012" / "labelmap.txt").read_text().splitlines()[1:]
    assert told == [f"{name}:{r},{g},{b}::" for name, (r, g, b) in zip(names, colours, strict=True)]
    assert found["poses-yolo"]["point_names"][0].tolist() == list(client.get_model("faces_keypoints").keypoint_names)


def test_boxes_of_voc(seen: tuple[Path, Seen], samples: list[Sample], client: Client) -> None:
    """Each is the box of pixels of its class, with its last row and column; together they hold the whole class."""
    names = client.get_model("faces").class_names
    for told, sample in zip(seen[1]["faces-voc"]["json"], samples, strict=True):
        assert sample.label is not None
        boxed = np.zeros((len(names), *sample.label.shape), bool)
        for part in json.loads(str(told)):
            left, top, right, bottom = (int(part["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax"))
            mask = sample.label[top - 1 : bottom, left - 1 : right] == names.index(part["name"])
            assert all(side.any() for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))
            boxed[names.index(part["name"]), top - 1 : bottom, left - 1 : right] = True
        for class_id in range(1, len(names)):
            assert boxed[class_id][sample.label == class_id].all()
        assert not boxed[0].any()


@pytest.mark.parametrize("name", POSES)
def test_keypoints(name: str, seen: tuple[Path, Seen], client: Client) -> None:
    found = seen[1][f"poses-{name}"]["keypoints"]
    model = client.get_model("faces_keypoints")
    wanted = np.stack([s.keypoints for s in client.stream_samples("faces_keypoints", count=COUNT)])  # type: ignore[arg-type]
    labelled = wanted[..., 2:] >= MIN_CONFIDENCE
    if name == "mds":
        assert np.array_equal(found, wanted)
    elif name == "yolo":
        assert np.allclose(found[..., :2], np.where(labelled, (wanted[..., :2] + 0.5) / model.resolution, 0), atol=1e-6)
        assert np.array_equal(found[..., 2:], np.where(labelled, 2, 0))
        assert np.allclose(seen[1]["poses-yolo"]["box"], (0.5, 0.5, 1, 1))
    else:
        assert np.array_equal(found, np.where(labelled, wanted[..., :2] + 0.5, np.nan), equal_nan=True)


def test_a_flip_swaps_the_sides(seen: tuple[Path, Seen], client: Client) -> None:
    names = client.get_model("faces_keypoints").keypoint_names
    swapped = [names[place] for place in seen[1]["poses-yolo"]["flip"][0]]
    sides = {"left": "right", "right": "left"}
    assert swapped == ["_".join(sides.get(word, word) for word in name.split("_")) for name in names]


def test_what_readers_leave_behind_is_no_difference(seen: tuple[Path, Seen]) -> None:
    """Ultralytics writes a cache next to the labels."""
    assert (seen[0] / "faces-yolo" / "labels.cache").exists()
    for out in seen[0].glob("*-*"):
        if (out / "manifest.json").exists():
            assert verify(out).problems == []


def test_labelmint_fit_reads_labelme(seen: tuple[Path, Seen], samples: list[Sample], client: Client) -> None:
    """What was corrected in labelme can be learnt from: the service's own reader finds the same pixels."""
    names = client.get_model("faces").class_names
    drawn = Drawn(1.0, {sample.seed: sample.image for sample in samples if sample.image is not None})
    labels = {sample.seed: np.zeros((128, 128), np.uint8) for sample in samples}
    for shape in read_shapes(seen[0] / "faces-labelme", drawn):
        labels[shape.seed][shape.area] = names.index(shape.name)
    for sample in samples:
        assert np.array_equal(labels[sample.seed], sample.label)


def test_what_a_format_cannot_hold_is_one_line(
    client: Client, hard: tuple[Model, list[np.ndarray]], tmp_path: Path
) -> None:
    for name in sorted(set(FOREIGN) - set(POSES)):
        with pytest.raises(PullError, match=f"task 'keypoints': format '{name}' holds only label images; use .*yolo"):
            pull(client, PullOptions("faces_keypoints", 1, name), tmp_path / name)
        assert not (tmp_path / name / "images").exists()
    with pytest.raises(PullError, match="class 'no: yes, {it} #is': labelmap.txt cannot hold this name"):
        write(tmp_path / "voc", "voc", hard[0], hard[1])


def test_a_shard_that_mds_cannot_hold(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pull(client, PullOptions("faces", 4, "mds", samples_per_shard=2), tmp_path / "whole")
    monkeypatch.setattr(mds, "_LARGEST", whole["files"][0]["bytes"])
    pull(client, PullOptions("faces", 2, "mds", samples_per_shard=2), tmp_path / "fits")
    monkeypatch.setattr(mds, "_LARGEST", whole["files"][0]["bytes"] - 1)
    with pytest.raises(PullError, match="with a smaller samples_per_shard, such as 1"):
        pull(client, PullOptions("faces", 2, "mds", samples_per_shard=2), tmp_path / "too large")
