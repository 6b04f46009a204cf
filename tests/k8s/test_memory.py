"""The memory and the threads that the manifests give Triton fit the models that it serves."""

import hashlib
import re
from typing import Any

import numpy as np
import onnxruntime
import pytest
from native_backend import Step, inputs_of

from labelmint.export.memory import ARENA_FACTOR, TRITON_BYTES, WEIGHT_COPIES, needed_bytes
from labelmint.gateway.process.settings import ServeSettings
from labelmint.triton.model_config import ensembles, read_config
from tests.conftest import REPOSITORY, ROOT
from tests.k8s.conftest import OVERLAYS, Rendered, deployment
from tests.support.kubernetes import quantity

pytestmark = pytest.mark.torch  # `labelmint.export` needs packages of that environment

DEPLOYING = (ROOT / "docs" / "deploying.md").read_text()
POOL = "--backend-config=onnxruntime,"


@pytest.fixture(params=["base", *OVERLAYS])
def service(request: pytest.FixtureRequest, render: Any) -> Rendered:
    found: Rendered = render(request.param)
    return found


def served(manifests: Rendered) -> list[str]:
    """The committed ensembles of the pipeline that the gateways request."""
    spec, gateway = deployment(manifests, "gateway")
    environment = manifests.environment(spec, gateway)
    pipeline = environment.get("LABELMINT_PIPELINE", ServeSettings.model_fields["pipeline"].default)
    found = ensembles(REPOSITORY).items()
    return [name for name, config in found if config.parameters["pipeline"].string_value == pipeline]


def test_the_models_fit_into_the_limit(service: Rendered) -> None:
    _, triton = deployment(service, "triton")
    names = served(service)
    assert {"faces", "faces_keypoints"} == set(names)
    limit = quantity(triton["resources"]["limits"]["memory"])
    assert needed_bytes(REPOSITORY, names) <= limit
    # The scheduler places the pod by its request. With less than the limit, a node could promise its memory twice.
    assert quantity(triton["resources"]["requests"]["memory"]) == limit


def test_the_docs_have_the_formula_and_the_limit(render: Any) -> None:
    factors = f"({WEIGHT_COPIES} * size of the file + {ARENA_FACTOR} * tensors of the largest batch)"
    assert f"    memory = {TRITON_BYTES >> 20} MiB + sum over all steps of {factors}\n" in DEPLOYING
    _, triton = deployment(render("base"), "triton")
    assert f"The {triton['resources']['limits']['memory']} of `k8s/base` are for " in DEPLOYING


def test_the_limit_is_not_far_above_what_a_cpu_needs(render: Any) -> None:
    """A limit that nobody needs keeps the pod away from small nodes."""
    _, triton = deployment(render("base"), "triton")
    assert quantity(triton["resources"]["limits"]["memory"]) <= 1.25 * needed_bytes(REPOSITORY, served(render("base")))


def test_the_models_share_one_pool_of_as_many_threads_as_the_pod_may_use(service: Rendered) -> None:
    _, triton = deployment(service, "triton")
    settings = dict(each.removeprefix(POOL).split("=") for each in triton["args"] if each.startswith(POOL))
    assert settings.keys() == {"enable-global-threadpool", "intra_op_thread_count", "inter_op_thread_count"}
    assert settings["enable-global-threadpool"] == "1", "without it, Triton ignores the other two"
    assert 0 < int(settings["intra_op_thread_count"]) <= quantity(triton["resources"]["requests"]["cpu"])
    if "nvidia.com/gpu" not in triton["resources"]["limits"]:
        assert int(settings["intra_op_thread_count"]) == quantity(triton["resources"]["requests"]["cpu"])


def test_samples_are_the_same_with_the_numbers_of_threads_that_the_docs_name() -> None:
    """With others, such as 5, ONNX Runtime rounds a few values of the JS map differently."""
    (named,) = re.findall(r"Samples are the same with ([0-9, ]+) or ([0-9]+) threads", DEPLOYING)
    digests, numbers = set(), {int(number) for part in named for number in part.split(", ")}
    assert len(numbers) > 1
    for threads in numbers:
        tensors = inputs_of(read_config(REPOSITORY / "faces" / "config.pbtxt"), 3, np.random.RandomState(7))
        for name in ("faces_generator", "faces_style_interpreter"):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            tensors = Step(REPOSITORY / name, options).run(tensors)
        content = b"".join(tensors[name].tobytes() for name in ("image", "label", "js_map", "js_score"))
        digests.add(hashlib.sha256(content).hexdigest())
    assert len(digests) == 1
