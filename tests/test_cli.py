"""The command line: help that helps, errors of one line."""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic_settings import CliApp

from labelmint import cli
from labelmint.cli import Fit, Labelmint, Serve
from labelmint.core.task import KEYPOINTS, SEGMENTATION
from tests.conftest import ROOT
from tests.support.commands import run

pytestmark = pytest.mark.unit


FREE_PORTS = ("--http-port", "0", "--grpc-port", "0")


def test_help_lists_the_subcommands() -> None:
    said = run("--help").stdout
    for command in ("serve", "import", "synth", "fit", "export", "calibrate"):
        assert command in said


# The client's commands only stand in the list of commands.
COMMANDS = [
    field.alias or name
    for name, field in cli.Labelmint.model_fields.items()
    if name not in ("version", *cli._CLIENT_COMMANDS)
]


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


def source_tree(function: Callable[..., object]) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def attributes_read(function: ast.AST, of: str) -> set[str]:
    """Names that the code reads of the variable `of`; the whole variable as an argument is not counted."""
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == of
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_read(command: str) -> None:
    """`serve` hands itself over as the gateway's settings; the others read their fields in `cli_cmd`.

    `config` is read before there are settings: test_flags_win_over_the_environment_and_that_over_the_file.
    """
    kind = class_of(command)
    if command == "serve":
        files = (ROOT / "service" / "labelmint").rglob("*.py")
        read = {"config"}.union(*(attributes_read(ast.parse(path.read_text()), "settings") for path in files))
        for name in read & {name for name, value in vars(Serve.__base__).items() if isinstance(value, property)}:
            read |= attributes_read(source_tree(vars(Serve.__base__)[name].fget), "self")
    else:
        read = attributes_read(source_tree(kind.cli_cmd), "self")
        for method in [getattr(kind, name) for name in read if inspect.isfunction(getattr(kind, name, None))]:
            read |= attributes_read(source_tree(method), "self")
    assert set(kind.model_fields) <= read, f"{command} ignores {set(kind.model_fields) - read}"


def test_wrong_values_are_named() -> None:
    done = run("serve", "--http-port", "99999")
    assert done.returncode == 2 and "http_port" in done.stderr and "Traceback" not in done.stderr
    done = run("serve", "--pipeline", "fast")
    assert done.returncode == 2 and "fused" in done.stderr


@pytest.mark.parametrize(
    ("task", "option", "said"),
    [
        ("keypoints", ("--mask-format", "png"), "mask_format does not apply to --task keypoints"),
        ("segmentation", ("--keypoint-format", "coco"), "keypoint_format does not apply to --task segmentation"),
        ("keypoints", ("--unlabelled", "ignore"), "unlabelled does not apply to --task keypoints"),
        (
            "segmentation",
            ("--unlabelled", "background"),
            "unlabelled=background does not apply to --mask-format png; there, id 255 is not drawn",
        ),
    ],
)
@pytest.mark.parametrize("command", [("fit", "--annotations", "a"), ("suggest",)])
def test_the_format_of_the_other_task_is_refused(
    command: tuple[str, ...], task: str, option: tuple[str, str], said: str
) -> None:
    done = run(*command, "--generator", "g", "--task", task, *option, "out")
    assert done.returncode == 2 and done.stderr == f"labelmint: {said}\n"


def test_tasks_may_share_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(KEYPOINTS, annotation_option="mask_format")
    monkeypatch.setattr("labelmint.cli.TASKS", {"segmentation": SEGMENTATION, "keypoints": other})
    for task in ("segmentation", "keypoints"):
        Fit(generator=Path("g"), annotations=Path("a"), out=Path("o"), task=task, mask_format="coco")


def test_environment_sets_what_flags_set() -> None:
    done = run("serve", *FREE_PORTS, PATH="", LABELMINT_MODEL_REPOSITORY="/nonexistent/here")
    assert done.returncode == 2 and "/nonexistent/here is not a directory" in done.stderr


def test_the_version_and_a_missing_command() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"labelmint {version('labelmint')}\n")
    done = run()
    assert done.returncode == 2 and done.stderr.startswith("labelmint: no command; give one of serve, import, synth")
    assert "import_" not in done.stderr


def test_variables_of_a_container_are_no_options() -> None:
    done = run("index", "faces", "--seeds", "9:3", VERSION="1", INDEX="faces", SERVE="{}")
    assert done.returncode == 2 and done.stderr.startswith("labelmint: seeds: '9:3' is not a range of seeds")


def test_what_is_said_has_no_python_in_it() -> None:
    assert "lambda" not in run("serve", "--help").stdout
    done = run("serve", "--tls-certificate", "x")
    assert done.returncode == 2
    assert done.stderr == "labelmint: tls_certificate and tls_key belong together; give both\n"


def test_a_misspelt_variable_is_named() -> None:
    of_kubernetes = {"LABELMINT_SERVICE_HOST": "10.0.0.1", "LABELMINT_PORT": "tcp://10.0.0.1:80"}
    variables = {"LABELMINT_MODEL_REPOSITRY": "/one", "LABELMINT_HTTP_PORT": "0", "LABELMINT_GRPC_PORT": "0"}
    done = run("serve", "--model-repository", "/nonexistent", PATH="", **variables, **of_kubernetes)
    assert (
        "LABELMINT_MODEL_REPOSITRY is not a setting and has no effect; is LABELMINT_MODEL_REPOSITORY meant?"
        in done.stderr
    )
    assert done.stderr.count("is not a setting") == 1


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('max_streams = 2\nmax_window = 2\ntriton_slots = 2\nmodel_repository = "of/the/file"\n')
    monkeypatch.setenv("LABELMINT_MAX_WINDOW", "3")
    monkeypatch.setenv("LABELMINT_TRITON_SLOTS", "3")
    monkeypatch.setattr(Serve, "cli_cmd", lambda settings: served.append(settings))
    for given in (["--config", str(file)], []):
        served: list[Serve] = []
        CliApp.run(Labelmint, cli_args=["serve", *given, "--triton-slots", "4"])
        (settings,) = served
        assert (settings.max_streams, settings.max_window, settings.triton_slots) == (2, 3, 4)
        assert settings.model_repository == Path("of/the/file")
        monkeypatch.setenv("LABELMINT_CONFIG", str(file))  # the second time it is named there


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_steams = 2", "sets 'max_steams', which is not a setting; is max_streams meant?"),
        ("max_streams = ", "is not a TOML file"),
        ("max_streams = 0", "max_streams: Input should be greater than or equal to 1"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_configuration_file_that_cannot_be(text: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    if text is not None:
        file.write_text(text)
    done = run("serve", "--config", str(file))
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--seeds", "7,7"), "--seeds has 7 twice"),
        (("--seeds", "7", "--count", "2"), "--count and --first-seed do not apply"),
        (("--seeds", "4294967296"), "seeds"),
        (("--seeds", "seven"), "seeds"),
    ],
)
def test_seeds_of_synth_that_cannot_be(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = run("synth", "--generator", "g", *arguments, str(tmp_path / "out"))
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_name_must_be_a_name(tmp_path: Path) -> None:
    done = run("export", "--generator", "g", "--interpreter", "i", "../escape", "--model-repository", str(tmp_path))
    assert done.returncode == 2 and "model" in done.stderr and "Traceback" not in done.stderr
