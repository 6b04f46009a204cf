"""A short run through each kind of fault; `make torture` runs the long one."""

from pathlib import Path

import pytest

from labelmint_client import SampleOptions
from tests.clients.conftest import StartGateway
from tests.torture.faults import rolling_restart, survive

pytestmark = [pytest.mark.triton, pytest.mark.torch, pytest.mark.minutes]


def test_nothing_is_lost_or_doubled(tmp_path: Path, tiny_repository: Path) -> None:
    kinds = ("Triton killed", "gateway killed", "connections cut")
    rows = survive(tmp_path, tiny_repository, 600, kinds, 30)
    assert sum("back after" in figure for _, figure in rows) == len(kinds)


def test_a_rolling_restart_fails_nothing(start_gateway: StartGateway, options: SampleOptions) -> None:
    assert rolling_restart(start_gateway, options, 1)
