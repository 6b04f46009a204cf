"""The command line, as a person runs it."""

import subprocess
import sys


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "labelmint.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment or None)
