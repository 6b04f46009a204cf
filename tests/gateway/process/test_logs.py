"""What the log holds, and what it leaves out."""

import logging

import grpc.aio
import pytest

from labelmint.gateway.process.logs import configure_logging

pytestmark = pytest.mark.unit


def test_an_answer_for_a_client_that_had_gone_is_no_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    configure_logging("text", "info")
    for name, kind in (("grpc._cython.cygrpc", grpc.aio.InternalError), ("grpc._cython.cygrpc", ValueError)):
        try:
            raise kind("Failed execute_batch")
        except Exception:
            logging.getLogger(name).exception("%s raised in core by servicer method", kind.__name__)
    said = capsys.readouterr().err
    assert "InternalError" not in said and said.count("Traceback") == said.count("ValueError raised in core") == 1
