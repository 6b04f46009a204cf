"""The golden digests of the demo, and a few seeds requested in every way; `make torture` requests a thousand."""

import json
from pathlib import Path

import pytest

from labelmint_client import Client
from tests.conftest import Service
from tests.torture import identity

pytestmark = pytest.mark.triton


def test_the_demo_gives_the_golden_digests(service: Service) -> None:
    """A failure says what changed. If that is intended, `python -m tests.torture.identity` rewrites the digests."""
    golden = json.loads(identity.GOLDEN.read_text())
    if identity.kernels() not in golden:
        pytest.skip(f"there are digests for {', '.join(golden)}, this machine is {identity.kernels()}")
    golden = golden[identity.kernels()]
    with Client(service.grpc) as client:
        now = identity.depends_on(client)
        found = {str(seed): vars(each) for seed, each in identity.alone(client, identity.GOLDEN_SEEDS).items()}
    different = sorted(seed for seed in golden["digests"] if found[seed] != golden["digests"][seed])
    changed = [f"{name} was {old}, is {now[name]}" for name, old in golden["depends_on"].items() if now[name] != old]
    why = "; ".join(changed) or "none of the recorded dependencies: look at the gateway and the machine"
    assert not different, f"other bytes for the seeds {', '.join(different)}; what changed: {why}"


def test_a_seed_is_the_same_however_it_is_asked_for(tmp_path: Path) -> None:
    assert len(identity.same_everywhere(tmp_path, 10)) == 5
