"""The golden digests of the demo, and a few seeds requested in every way; `make torture` requests a thousand."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from labelmint_client import Client
from tests.conftest import Service, start_service
from tests.torture import identity

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def services(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Service]]:
    """By executor; the first is the default."""
    other = start_service(tmp_path_factory.mktemp("other") / "serve.log", "--executor", "onnxruntime")
    yield {"kernel": service, "onnxruntime": other}
    assert other.stop() == 0


@pytest.mark.parametrize("executor", identity.EXECUTORS)
def test_the_demo_gives_the_golden_digests(services: dict[str, Service], executor: str) -> None:
    """A failure says what changed. If that is intended, `python -m tests.torture.identity` rewrites the digests."""
    golden = json.loads(identity.GOLDEN.read_text())
    if identity.kind(executor) not in golden:
        pytest.skip(f"there are digests for {'; '.join(golden)}; this machine is {identity.kind(executor)}")
    golden = golden[identity.kind(executor)]
    with Client(services[executor].grpc) as client:
        assert client.get_model(identity.MODEL).executor == executor
        now = identity.depends_on(client)
        found = {str(seed): vars(each) for seed, each in identity.alone(client, identity.GOLDEN_SEEDS).items()}
    different = sorted(seed for seed in golden["digests"] if found[seed] != golden["digests"][seed])
    changed = [f"{name} was {old}, is {now[name]}" for name, old in golden["depends_on"].items() if now[name] != old]
    why = "; ".join(changed) or "none of the recorded dependencies: look at the gateway and the machine"
    assert not different, f"other bytes for the seeds {', '.join(different)}; what changed: {why}"


def test_images_do_not_depend_on_the_executor() -> None:
    golden = json.loads(identity.GOLDEN.read_text())
    processors = {name.partition(", ")[0] for name in golden if ", " in name}
    for processor in processors:
        both = [golden[f"{processor}, {executor}"]["digests"] for executor in identity.EXECUTORS]
        images = [{seed: each["image"] for seed, each in digests.items()} for digests in both]
        assert images[0] == images[1], processor


def test_a_seed_is_the_same_however_it_is_asked_for(tmp_path: Path) -> None:
    assert len(identity.same_everywhere(tmp_path, 10)) == 5
