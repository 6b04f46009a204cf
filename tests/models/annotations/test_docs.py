"""The commands of docs/annotating.md, in their order; a stand-in draws what a person would."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic_settings import CliApp

from labelmint.cli import Labelmint
from labelmint.models.annotations import read_keypoints, read_masks
from labelmint.models.generator import Generator
from labelmint.models.pixels import FitSettings
from labelmint.models.store import load_interpreter, save_generator
from labelmint.models.stylegan2 import StyleGAN2Spec
from tests.conftest import ROOT
from tests.models.annotations.conftest import edit, label_path

pytestmark = pytest.mark.torch


DOCUMENT = (ROOT / "docs" / "annotating.md").read_text()
SPEC = StyleGAN2Spec(z_dim=8, w_dim=8, mapping_layers=2, resolution=32, channels={4: 8, 8: 8, 16: 8, 32: 8})
SKIN, EYE = [[2, 2], [30, 3], [28, 30], [4, 27]], [[8, 8], [14, 8], [14, 12], [8, 12]]

BACKGROUND = {"label": "background", "points": [[0, 0], [1, 1]], "shape_type": "rectangle"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


def labelmint(command: str) -> None:
    CliApp.run(Labelmint, cli_args=shlex.split(command)[1:])


def save_with_labelme(directory: Path, seeds: list[int]) -> None:
    for seed in seeds:
        shapes = [
            {"label": label, "points": points, "group_id": None, "shape_type": "polygon", "flags": {}, "mask": None}
            for label, points in (("skin", SKIN), ("eye", EYE))
        ]
        path = label_path(directory, seed)
        size = {"imageHeight": 32, "imageWidth": 32}
        path.write_text(json.dumps({"imagePath": f"{path.stem}.png", "imageData": None, "shapes": shapes, **size}))


def export_from_cvat(archive: Path, names: list[str], seeds: list[int]) -> None:
    images = [
        {"id": number, "file_name": f"{seed:010d}.png", "width": 32, "height": 32} for number, seed in enumerate(seeds)
    ]
    annotations = [
        {"image_id": number, "category_id": category, "segmentation": [np.ravel(points).tolist()]}
        for number in range(len(seeds))
        for category, points in ((2, SKIN), (3, EYE))
    ]
    for number, annotation in enumerate(annotations):
        annotation["id"] = number + 1
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number + 1, "name": name} for number, name in enumerate(names)],
    }
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("annotations/instances_default.json", json.dumps(content))


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    settings = FitSettings(pixels_per_image=64, steps=20, batch=16)
    monkeypatch.setattr("labelmint.models.fit.FitSettings", lambda **given: replace(settings, **given | {"steps": 20}))
    torch.manual_seed(0)
    save_generator(Path("generator.safetensors"), Generator(SPEC).eval(), {})
    return tmp_path / "parts"


def test_the_commands(parts: Path) -> None:
    page, synth, choose, labelme, fit_labelme, cvat, fit_sparse, fit_report, suggest, _ = (
        block.strip() for block in blocks("sh")
    )
    assert page == "labelmint annotate --generator generator.safetensors drawings"  # tests/annotate/page runs it
    labelmint(synth)
    many, remove, chosen = choose.splitlines()
    labelmint(many.replace("--count 200", "--count 2"))
    subprocess.run(shlex.split(remove), check=True)
    labelmint(chosen)
    assert json.loads((parts / "dataset.json").read_text())["seeds"] == [4000000003, 4000000017, 4000000042]
    shutil.rmtree(parts)
    labelmint(synth)
    (classes,) = blocks("json")
    (parts / "classes.json").write_text(classes)
    names = [entry["name"] for entry in json.loads(classes)]
    seeds = json.loads((parts / "dataset.json").read_text())["seeds"]
    assert len(seeds) == 16

    # The window needs a screen: tests/data/annotations holds what it saved. Its arguments must fit the rest, though.
    assert shlex.split(labelme)[:4] == ["labelme", "parts/images", "--labels", ",".join(names)]
    save_with_labelme(parts, seeds)
    labelmint(fit_labelme)
    assert load_interpreter(Path("interpreter.safetensors")).spec.class_names == tuple(names)
    Path("interpreter.safetensors").unlink()

    unpack, fit_coco = cvat.splitlines()
    export_from_cvat(Path("task.zip"), names, seeds)
    subprocess.run([sys.executable, *shlex.split(unpack)[1:]], check=True)
    labelmint(fit_coco)
    assert load_interpreter(Path("interpreter.safetensors")).spec.class_names == tuple(names)

    edit(label_path(parts, seeds[0]), lambda file: file["shapes"].append(BACKGROUND))
    labelmint(fit_sparse)
    assert load_interpreter(Path("sparse.safetensors")).spec.class_names == tuple(names)
    edit(label_path(parts, seeds[0]), lambda file: file["shapes"].pop())
    labelmint(fit_report)
    labelmint(suggest.replace("--count 4", "--count 2 --candidates 20"))
    assert "Are the annotations enough?" in Path("report.html").read_text()

    # Two tools, the same polygons: the two converters differ in the outlines alone.
    one, other = read_masks(parts, "labelme").labels, read_masks(parts, "coco").labels
    assert all((one[seed] == other[seed]).mean() > 0.85 and set(np.unique(one[seed])) == {0, 1, 2} for seed in seeds)


def test_the_keypoints(parts: Path) -> None:
    labelmint(blocks("sh")[1].replace("--count 16", "--count 1"))
    (rows,) = blocks("csv")
    (parts / "keypoints.csv").write_text(rows.replace("63.5,70", "23.5,30").replace("48,52.25", "8,12.25"))
    (parts / "keypoints.json").write_text(
        '[{"name": "left_eye", "rgb": [0, 0, 0]}, {"name": "nose", "rgb": [0, 0, 0]}]'
    )
    assert read_keypoints(parts, "csv").labels[4_000_000_000].tolist() == [[8, 12.25, 2], [23.5, 30, 2]]
    labelmint(blocks("sh")[-1].strip())
    spec = load_interpreter(Path("keypoints.safetensors")).spec
    assert (spec.task, spec.class_names) == ("keypoints", ("left_eye", "nose"))
