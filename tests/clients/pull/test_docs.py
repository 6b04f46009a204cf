"""docs/pulling.md from top to bottom in one directory: each command and each script, against a live service."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Service

pytestmark = pytest.mark.triton


PAGE = (ROOT / "docs" / "pulling.md").read_text()


def test_every_block_runs(service: Service, tmp_path: Path) -> None:
    """With fewer samples, by the program of this environment."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "labelmint").write_text(f'#!/bin/sh\nexec {sys.executable} -m labelmint.cli "$@"\n')
    (programs / "labelmint").chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "HF_HOME": str(tmp_path / "hf")}
    outputs = []
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", PAGE, re.DOTALL):
        text = block.replace("localhost:50051", service.grpc).replace("..000001", "..000000")
        text = re.sub(r"--count \d+", "--count 2", text)
        command = ["bash", "-ec", text] if language == "sh" else [sys.executable, "-W", "error", "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, text + done.stderr
        outputs.append(done.stdout)
    assert len(outputs) == 11
    assert "compared 3 files with the manifest, 2 samples with what is served: no difference" in outputs[1]
    assert "(128, 128)" in outputs[2] and outputs[5].split()[3] == "P"
