"""The command line: help that helps, errors of one line."""

import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "labelmint.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment or None)


def test_help_lists_the_subcommands() -> None:
    said = run("--help").stdout
    for command in ("serve", "import", "synth", "fit", "export", "calibrate"):
        assert command in said


@pytest.mark.parametrize("command", ["serve", "import", "synth", "fit", "export", "calibrate"])
def test_every_option_has_help(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert "==SUPPRESS==" not in done.stdout and "--" in done.stdout


def test_wrong_values_are_named() -> None:
    done = run("serve", "--http-port", "99999")
    assert done.returncode == 2 and "http_port" in done.stderr and "Traceback" not in done.stderr
    done = run("serve", "--pipeline", "fast")
    assert done.returncode == 2 and "fused" in done.stderr


def test_environment_sets_what_flags_set() -> None:
    done = run("serve", PATH="", LABELMINT_MODEL_REPOSITORY="/nonexistent/here")
    assert done.returncode == 2 and "/nonexistent/here is not a directory" in done.stderr


def test_missing_files_are_one_line(tmp_path: Path) -> None:
    nothing = str(tmp_path / "nothing.safetensors")
    for arguments in (
        ("synth", "--generator", nothing, str(tmp_path / "out")),
        ("export", "--generator", nothing, "--interpreter", nothing, "faces"),
        ("fit", "--generator", nothing, "--annotations", str(tmp_path), str(tmp_path / "out.safetensors")),
        ("calibrate", "--model-repository", str(tmp_path / "nothing"), "faces"),
    ):
        done = run(*arguments)
        assert done.returncode == 2, arguments
        assert done.stderr.startswith("labelmint: ") and done.stderr.count("\n") == 1, done.stderr


def test_a_model_name_must_be_a_name(tmp_path: Path) -> None:
    done = run("export", "--generator", "g", "--interpreter", "i", "../escape", "--model-repository", str(tmp_path))
    assert done.returncode == 2 and "model" in done.stderr and "Traceback" not in done.stderr
