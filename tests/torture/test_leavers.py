"""A few clients that disconnect; `make torture` has tens of thousands."""

from pathlib import Path

import pytest

from tests.conftest import start_service
from tests.torture.leavers import leave

pytestmark = [pytest.mark.triton, pytest.mark.torch]


async def test_who_leaves_does_not_end_triton(tmp_path: Path, tiny_repository: Path) -> None:
    service = start_service(tmp_path / "serve.log", repository=tiny_repository)
    outcome = await leave(service, "tiny", 600)
    assert service.stop() == 0, service.log.read_text()
    assert not outcome.findings
    assert "DEADLINE_EXCEEDED" in outcome.note and "OK" in outcome.note
