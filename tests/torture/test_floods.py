"""A short flood: every request is answered or refused. `make torture` judges the figures."""

from pathlib import Path

import pytest

from tests.torture.floods import flood

pytestmark = [pytest.mark.triton, pytest.mark.torch, pytest.mark.minutes]


async def test_a_flood_is_answered_or_refused(tmp_path: Path) -> None:
    found = await flood(tmp_path, 6.0, warm_loops=())
    assert found.findings == []
    assert found.outcomes["answered"] > 0 and found.outcomes["refused"] > 0
