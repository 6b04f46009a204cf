"""Runs a script as the two processes of a training job, under the variables of torchrun."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

SCRIPT = ROOT / "tests" / "clients" / "rank.py"
STEPS = 4


def run(library: str, arguments: list[str], out: Path, ranks: int = 2, script: Path = SCRIPT) -> list[dict[str, Any]]:
    """What the first `ranks` of two processes got; torchrun's variables, but Lightning starts its own processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LABELMINT_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    inherited |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "STEPS": str(STEPS), "OMP_NUM_THREADS": "1"}
    inherited |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), library, *arguments, str(out)]
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    processes = [
        subprocess.Popen(command, env=inherited | place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for place in ([{}] if library == "lightning" else places)
    ]
    try:
        for process in processes[:ranks]:
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
    return [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(ranks)]
