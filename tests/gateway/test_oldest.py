"""The oldest ONNX Runtime that pyproject.toml admits: a seed is an identity there too."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from importlib.metadata import requires
from pathlib import Path

import grpc.aio
import pytest
import pytest_asyncio
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import ROOT, need_program, start_service
from tests.support.wire import RAW

pytestmark = pytest.mark.triton


SEEDS = range(16)  # a whole batch of the demo


def lowest_admitted() -> Version:
    """Of ONNX Runtime, to serve with; an export, which checks its files with it, admits the same."""
    requirements = [Requirement(line) for line in requires("labelmint") or ()]
    found = [each for each in requirements if each.name == "onnxruntime"]
    (specifier,) = {str(each.specifier) for each in found if each.marker}
    return min(Version(bound.version) for bound in SpecifierSet(specifier))


@pytest.fixture(scope="module")
def python() -> str:
    """That of an environment with the oldest one."""
    python = need_program(str(ROOT / ".venv-oldest" / "bin" / "python"), "by `make oldest`")
    command = [python, "-c", "import importlib.metadata as m; print(m.version('onnxruntime'))"]
    installed = Version(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    assert installed == lowest_admitted(), "remove .venv-oldest and call `make oldest` again"
    return python


@pytest_asyncio.fixture(scope="module")
async def stub(python: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[pb_grpc.SampleServiceStub]:
    log: Path = tmp_path_factory.mktemp("oldest") / "serve.log"
    running = await asyncio.to_thread(start_service, log, python=python)
    async with grpc.aio.insecure_channel(running.grpc) as channel:
        yield pb_grpc.SampleServiceStub(channel)
    assert running.stop() == 0


@pytest.mark.parametrize("model", ["faces", "faces_keypoints"])
async def test_sixteen_seeds_are_the_same_alone_and_in_one_batch(stub: pb_grpc.SampleServiceStub, model: str) -> None:
    options = pb.SampleOptions()
    options.CopyFrom(RAW)
    options.include_js_map = True
    if model == "faces_keypoints":
        options.label_encoding = pb.ENCODING_UNSPECIFIED

    async def alone(seed: int) -> pb.Sample:
        return (await stub.GetSample(pb.GetSampleRequest(model=model, seed=seed, options=options))).sample

    single = [await alone(seed) for seed in SEEDS]
    batch = await stub.BatchGetSamples(pb.BatchGetSamplesRequest(model=model, seeds=SEEDS, options=options))
    differ = [sample.seed for sample, outcome in zip(single, batch.outcomes, strict=True) if sample != outcome.sample]
    assert differ == []
