"""A pull opens with the calls that the README.md inside it names, and with what a user would type first."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from labelmint_client import Client
from labelmint_client.pull import PullError, PullOptions, pull
from labelmint_client.pull.formats import FORMATS
from labelmint_client.pull.sides import of_the_person
from labelmint_client.pull_formats import PULL_FORMATS
from tests.conftest import ROOT, Service, need_program

pytestmark = pytest.mark.triton


COUNT = 2


@pytest.fixture(scope="module")
def pulls(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MODEL-FORMAT, each of one shard, and labels of class ids in faces-ids."""
    path = tmp_path_factory.mktemp("pulls")
    with Client(service.grpc) as client:
        for name in FORMATS:
            pull(client, PullOptions("faces", COUNT, name), path / f"faces-{name}")
            if not PULL_FORMATS[name].only_label_images:
                pull(client, PullOptions("faces_keypoints", COUNT, name), path / f"faces_keypoints-{name}")
        pull(client, PullOptions("faces", COUNT, "folder", label_mode="ids"), path / "faces-ids")
        pull(client, PullOptions("faces", COUNT, "parquet", label_mode="ids"), path / "faces-parquet-ids")
    return path


# Runs each program of a list in its directory, with names of its own, and prints a line of JSON with what it printed.
RUNNER = """
import contextlib, io, json, os, sys
for directory, program in json.load(sys.stdin):
    os.chdir(directory)
    sys.path[0] = directory
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(program, {"__name__": "__main__"})
    print(json.dumps(printed.getvalue()))
"""


def run_all(python: str, programs: list[tuple[Path, str]], home: Path, **environment: str) -> list[str]:
    """The outputs of programs, run in one process, because importing their libraries takes seconds."""
    home.mkdir()
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", **environment}
    told = json.dumps([(str(directory), program) for directory, program in programs])
    done = subprocess.run(
        [python, "-c", RUNNER], input=told, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    outputs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('"')]
    assert len(outputs) == len(programs)
    return outputs


def test_the_calls_of_the_readme_inside(pulls: Path, tmp_path: Path) -> None:
    """All blocks of each README. Those that need another project's reader run in the environment of the readers."""
    readers = need_program(str(ROOT / ".venv-readers" / "bin" / "python"), "the readers, by `make readers`")
    ours, foreign = list[tuple[Path, str]](), list[tuple[Path, str]]()
    for out in sorted(pulls.iterdir()):
        blocks = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
        opened = "mds" not in out.name  # by `datasets`
        assert len(blocks) == (2 if opened else 1) and ("datasets.load_dataset" in blocks[-1]) == opened, out
        for block in blocks:
            (foreign if re.search("ultralytics|torchvision|streaming", block) else ours).append((out, block))
    home = str(tmp_path / "readers")
    environment = {"PYTHONPATH": str(ROOT / "tests" / "support" / "readers"), "HOME": home, "YOLO_CONFIG_DIR": home}
    outputs = run_all(sys.executable, ours, tmp_path / "ours")
    outputs += run_all(readers, foreign, tmp_path / "readers", YOLO_OFFLINE="true", **environment)
    for (out, block), printed in zip([*ours, *foreign], outputs, strict=True):
        if "datasets.load_dataset" in block:
            assert f"num_rows: {COUNT}" in printed, (out, printed)
        elif not re.search("pandas|COCO", block):
            assert len(printed.splitlines()) >= COUNT, (out, printed)  # a line for each sample


def test_datasets_sees_the_samples_and_nothing_else(pulls: Path, tmp_path: Path) -> None:
    columns = {
        "faces-webdataset": {"image.png", "label.npy", "json", "__key__", "__url__"},
        "faces-folder": {"image", "label", "seed", "js_score"},
        "faces-ids": {"image", "label", "seed", "js_score"},
        "faces_keypoints-folder": {"image", "keypoints", "seed", "js_score"},
        "faces-coco": {"image"},
        "faces-masks": {"image"},
        "faces-voc": {"image"},
        "faces-yolo": {"image"},
        "faces-labelme": {"image"},
    }
    for name, wanted in columns.items():
        rows = datasets.load_dataset(str(pulls / name), split="train", cache_dir=str(tmp_path))
        assert len(rows) == COUNT and set(rows.column_names) == wanted, (name, rows)
    rows = datasets.load_dataset(str(pulls / "faces-ids"), split="train", cache_dir=str(tmp_path))
    for row, path in zip(rows, sorted((pulls / "faces-ids" / "labels").iterdir()), strict=True):
        assert row["seed"] == int(path.stem) and np.array_equal(np.asarray(row["label"]), np.asarray(Image.open(path)))


def test_labels_read_as_gray(pulls: Path, tmp_path: Path) -> None:
    """As OpenCV and torchvision read them, too: ids stay ids, a palette's gray is the gray of its colours."""
    rows = datasets.load_dataset(str(pulls / "faces-parquet-ids"), split="train", cache_dir=str(tmp_path))
    for path, row in zip(sorted((pulls / "faces-ids" / "labels").iterdir()), rows, strict=True):
        ids, palette = Image.open(path), Image.open(pulls / "faces-folder" / "labels" / path.name)
        assert ids.mode == row["label"].mode == "L" and palette.mode == "P"
        assert np.array_equal(np.asarray(ids.convert("L")), np.asarray(palette))
        assert np.array_equal(np.asarray(row["label"]), np.asarray(palette))
        assert not np.array_equal(np.asarray(palette.convert("L")), np.asarray(palette))
    assert "gray of the palette's colours" in (pulls / "faces-folder" / "README.md").read_text().replace("\n", " ")


def test_the_label_mode_is_part_of_a_pull(service: Service, pulls: Path) -> None:
    with Client(service.grpc) as client:
        with pytest.raises(PullError, match="label_mode ids, not palette"):
            pull(client, PullOptions("faces", COUNT, "folder"), pulls / "faces-ids")
        with pytest.raises(PullError, match="no label PNGs"):
            PullOptions("faces", COUNT, "coco", label_mode="ids")
        with pytest.raises(PullError, match="no label PNGs"):
            pull(client, PullOptions("faces_keypoints", COUNT, "folder", label_mode="ids"), pulls / "points-ids")
        assert not (pulls / "points-ids" / "images").exists()


def test_left_and_right_of_keypoints() -> None:
    """`test_formats.py` has the demo's with their coordinates."""
    names = ("left_eye", "Right knee", "LEFT-HIP", "nose", "cleft", "leftmost", "eye.right.2")
    swapped = ("right_eye", "Left knee", "RIGHT-HIP", "nose", "cleft", "leftmost", "eye.left.2")
    assert tuple(map(of_the_person, names)) == swapped
