"""The client's command line: what it makes of its options before anything is asked."""

import argparse
import ast
import inspect
from pathlib import Path
from typing import NoReturn

import pytest

from labelmint_client import cli

pytestmark = pytest.mark.unit


def test_a_byte_order_mark_is_no_part_of_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Editors of Windows put one first."""
    token = tmp_path / "token"
    token.write_bytes(b"\xef\xbb\xbfsecret\r\n")
    given: dict[str, object] = {}

    def client(*_: object, **options: object) -> NoReturn:
        given.update(options)
        raise SystemExit(0)

    monkeypatch.setattr(cli, "_PatientClient", client)
    with pytest.raises(SystemExit):
        cli.main(["verify", "--endpoint", "localhost:1", "--token-file", str(token), str(tmp_path)])
    assert given["token"] == "secret"


@pytest.mark.parametrize("command", ["pull", "verify", "upload"])
def test_every_option_is_read_and_has_help(command: str) -> None:
    """`out` among them. What only stands beside the parsed options (`run`) is no option."""
    (commands,) = (action.choices for action in cli._parser()._actions if action.dest != "help")
    functions = (getattr(cli, f"_{command}"), cli._client)
    nodes = [node for function in functions for node in ast.walk(ast.parse(inspect.getsource(function)))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "parsed"}
    options = [action for action in commands[command]._actions if not isinstance(action, argparse._HelpAction)]
    assert {action.dest for action in options} <= read
    assert all(action.help for action in options)


def test_options_of_the_environment_come_before_those_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only those of `pull` are taken from it."""
    monkeypatch.setenv("LABELMINT_PULL_OPTIONS", "--count 5 --model 'a b'")
    assert cli._with_pull_options(["pull", "out", "--count=7"]) == [
        "pull",
        "--count",
        "5",
        "--model",
        "a b",
        "out",
        "--count=7",
    ]
    assert cli._with_pull_options(["verify", "pull"]) == ["verify", "pull"]
    monkeypatch.delenv("LABELMINT_PULL_OPTIONS")
    assert cli._with_pull_options(["pull", "out"]) == ["pull", "out"]


@pytest.mark.parametrize(
    "option",
    [["--sample", "7"], ["--sample", "all"], ["--token-file", "x"], ["--tls"], ["--tls-ca", "x"], ["--insecure"]],
)
def test_verify_refuses_what_it_has_no_use_for(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["verify", *option, "somewhere"])
    assert capsys.readouterr().err == f"labelmint: {option[0]} needs --endpoint: without it, verify calls no service\n"
