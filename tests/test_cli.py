"""The command line: help that helps, errors of one line."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from pydantic import BaseModel

from labelmint import cli
from tests.conftest import ROOT


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "labelmint.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment or None)


def test_help_lists_the_subcommands() -> None:
    said = run("--help").stdout
    for command in ("serve", "import", "synth", "fit", "export", "calibrate"):
        assert command in said


# `pull` and `verify` are the client's; their classes only stand in the list of commands.
COMMANDS = [field.alias or name for name, field in cli.Labelmint.model_fields.items() if name not in ("pull", "verify")]


def class_of(command: str) -> type[BaseModel]:
    (kind,) = (cls for cls in vars(cli).values() if isinstance(cls, type) and cls.__name__ == command.capitalize())
    return kind


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command: str) -> None:
    done = run(command, "--help", COLUMNS="1000", PATH="")
    assert done.returncode == 0
    for name, field in class_of(command).model_fields.items():
        assert field.description, f"{command} {name} has no description"
        flag = f"(--{name.replace('_', '-')}|{name.upper()})"  # an option, or a positional argument
        entry = re.search(rf"(?m)^  {flag}[ ,\n].*(\n {{5,}}.*)*", done.stdout)
        assert entry, f"the help of {command} does not list {name}"
        assert field.description in " ".join(entry[0].split()), entry[0]


def attributes_read(function: ast.AST, of: str) -> set[str]:
    """Names that the code reads of the variable `of`; the whole variable as an argument is not counted."""
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == of
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_read(command: str) -> None:
    """`serve` hands itself over as the gateway's settings; the others read their fields in `cli_cmd`."""
    kind = class_of(command)
    if command == "serve":
        files = (ROOT / "service" / "labelmint").rglob("*.py")
        read = set().union(*(attributes_read(ast.parse(path.read_text()), "settings") for path in files))
    else:
        read = attributes_read(ast.parse(textwrap.dedent(inspect.getsource(kind.cli_cmd))), "self")
    assert set(kind.model_fields) <= read, f"{command} ignores {set(kind.model_fields) - read}"


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
