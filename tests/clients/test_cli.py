"""The client's command line: what it makes of its options before anything is asked."""

from pathlib import Path
from typing import NoReturn

import pytest

from labelmint_client import cli


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
