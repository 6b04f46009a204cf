"""The curl cookbook from top to bottom in one shell, command by command, against a live service."""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from labelmint_client import Client
from tests.conftest import ROOT, Service, need_program

pytestmark = pytest.mark.triton


PAGE = (ROOT / "clients" / "curl" / "README.md").read_text()
MARK = "-- next --"


def commands() -> list[str]:
    """One a line; a line that ends with a backslash goes on."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    return [command for block in blocks for command in re.split(r"(?<!\\)\n", block) if command]


def test_each_command_does_what_the_page_says(service: Service, tmp_path: Path) -> None:
    for program in ("curl", "jq"):
        need_program(program, program)
    # One shell, because later commands use earlier ones' variables; it stops at the first that fails.
    script = f"\necho '{MARK}'\n".join(["set -euo pipefail; TOKEN=secret", *commands()])
    script = script.replace("http://localhost:8080", service.http)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    _, *outputs = done.stdout.split(f"{MARK}\n")
    assert done.returncode == 0, f"{commands()[len(outputs) - 1]}\n{done.stdout[-500:]}{done.stderr}"
    said = dict(zip(commands(), outputs, strict=True))

    def of(part: str) -> str:
        """What the one command with this in it printed."""
        (output,) = (output for command, output in said.items() if part in command)
        return output

    with Client(service.grpc) as client:
        model = client.get_model("faces")
        sample = client.get_sample("faces", 7)
    assert sample.image is not None and sample.label is not None and model.calibration is not None
    assert of(".models[]").splitlines()[0].split("\t") == ["faces", model.version, model.task, model.digest[:12]]
    assert [line.split("\t")[1] for line in of(".classes[]").splitlines()] == list(model.class_names)
    assert json.loads(of(".calibration |"))["threshold"] == model.calibration.threshold
    for name in ("overlay.png", "uncertainty.png"):
        assert Image.open(tmp_path / name).size[0] > 600
    for name in ("image.png", "decoded.png"):
        assert np.array_equal(np.asarray(Image.open(tmp_path / name)), sample.image)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "label.png")), sample.label)
    with np.load(tmp_path / "sample.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["label"], sample.label) and arrays["js_map"].shape == sample.label.shape
    assert json.loads(of("{seed, accepted, js_score, threshold}"))["js_score"] == sample.js_score
    assert len(of("samples/7 | jq -r '.keypoints").splitlines()) == 7
    rejected = json.loads(of("reason, metadata"))
    assert rejected["status"] == 422 and rejected["reason"] == "SAMPLE_REJECTED"
    assert json.loads(of("include_rejected=true"))["accepted"] is False and of("max_js=1e9") == "true\n"
    assert [json.loads(line)["seed"] for line in of("-c '.outcomes[]").splitlines()] == [0, 1, 2, 3]
    assert len(groups := of(".outcomes[].group_id").splitlines()) == 3 and len(set(groups)) == 1
    assert len(of("tar -tf").splitlines()) == 15
    last = max(int(line.split(".")[0]) for line in of("tar -tf").splitlines())
    assert of(".[-1].next_seed") == f"{last + 1}\n"
    for name, rest in (("even.tar", 0), ("odd.tar", 1)):
        with tarfile.open(tmp_path / name) as archive:
            assert {int(member.split(".")[0]) % 2 for member in archive.getnames()} == {rest}
    assert of("if-none-match") == "304\n" and "immutable" in of("cache-control")
    assert of("--retry") == "8\n" and of("metrics").count("labelmint_samples_total") >= 1
