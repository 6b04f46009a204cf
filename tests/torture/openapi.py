"""Runs schemathesis with all its checks on the OpenAPI document that a gateway serves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import Service
from tests.torture.outcome import Outcome, Watch

HERE = Path(__file__).parent


def explore(service: Service, directory: Path, examples: int, seconds: int) -> Outcome:
    """Try at most `examples` per operation. On a slow machine, `seconds` limits the attempts, but fails nothing."""
    outcome, watch = Outcome("schemathesis, all checks"), Watch(service)
    command = [
        str(Path(sys.executable).parent / "st"),
        "--config-file",
        str(HERE / "schemathesis.toml"),
        "run",
    ]
    command += [f"{service.http}/openapi.json", "--checks", "all", "--phases", "examples,coverage,fuzzing"]
    command += ["--max-examples", str(examples), "--max-time", str(seconds), "--request-timeout", "60"]
    command += ["--seed", "1", "--no-color"]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": str(HERE / "openapi_hooks.py")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds + 300, cwd=directory, env=environment
    )
    generated = re.search(r"(\d+) generated", done.stdout)
    outcome.tries = int(generated[1]) if generated else 0
    if done.returncode != 0:
        outcome.found(done.stdout[-3000:] + done.stderr[-1000:])
    watch.look(outcome)
    return outcome
