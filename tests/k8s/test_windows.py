"""Triton's flags leave every call the time that a gateway's windows allow it (`triton/window.py`)."""

import re
from typing import Any

import pytest

from labelmint.gateway.process.settings import ServeSettings
from labelmint.gateway.sampling.sampler import DEFAULT_TIMEOUT_SECONDS
from labelmint.triton.window import ANSWER_SECONDS, INITIAL, MOST_SECONDS
from tests.conftest import ROOT
from tests.k8s.conftest import ADDED, OVERLAYS, Rendered

pytestmark = pytest.mark.unit


@pytest.fixture(params=["base", *OVERLAYS, *ADDED])
def service(request: pytest.FixtureRequest, render: Any) -> Rendered:
    """Yield each composition that serves."""
    rendered: Rendered = render(request.param)
    return rendered


def connection_seconds(manifests: Rendered, flag: str) -> float:
    """Return a flag of Triton in seconds. Raises AssertionError unless it is there once."""
    (container,) = manifests.named("Deployment", "labelmint-triton")["spec"]["template"]["spec"]["containers"]
    (found,) = [match for each in container["args"] if (match := re.fullmatch(rf"--{flag}=(\d+)", each))]
    return int(found[1]) / 1000


def most_gateways(manifests: Rendered) -> int:
    for each in manifests.of_kind("HorizontalPodAutoscaler"):
        if each["spec"]["scaleTargetRef"]["name"] == "labelmint-gateway":
            return int(each["spec"]["maxReplicas"])
    return int(manifests.named("Deployment", "labelmint-gateway")["spec"]["replicas"])


def test_a_call_ends_before_triton_cuts_its_connection(service: Rendered) -> None:
    """A call that began just before its connection reached its age has only the grace."""
    grace = connection_seconds(service, "grpc-max-connection-age-grace")
    assert MOST_SECONDS >= 2 * ANSWER_SECONDS, "a window may double before a late answer tells"
    assert grace >= 2 * MOST_SECONDS, "one of two Tritons may end, and the other gets its samples"


def test_a_sample_comes_before_its_request_ends() -> None:
    assert 2 * MOST_SECONDS <= DEFAULT_TIMEOUT_SECONDS


def test_the_document_says_how_slow_a_triton_may_be(service: Rendered) -> None:
    """The first samples of all gateways have the grace too."""
    grace = connection_seconds(service, "grpc-max-connection-age-grace")
    text = " ".join((ROOT / "docs" / "deploying.md").read_text().split())
    (rate,) = re.findall(r"at least ([\d.]+) samples per second", text)
    assert INITIAL * most_gateways(service) / float(rate) <= grace


def test_the_document_has_the_numbers_of_the_code() -> None:
    for name in ("deploying.md", "operating.md"):
        text = " ".join((ROOT / "docs" / name).read_text().split())
        assert f"within {ANSWER_SECONDS:g} seconds" in text and f"begins with {INITIAL} samples" in text, name


def test_the_slots_do_not_make_a_new_triton_wait(service: Rendered) -> None:
    """A Triton that hangs keeps its first samples. The slots must be enough for those and for another Triton."""
    spec = service.named("Deployment", "labelmint-gateway")["spec"]["template"]["spec"]
    slots = int(service.environment(spec, spec["containers"][0])["LABELMINT_TRITON_SLOTS"])
    assert min(slots, ServeSettings().triton_slots) >= 2 * INITIAL
