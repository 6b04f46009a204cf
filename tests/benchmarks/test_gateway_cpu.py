"""Tests of the gateway's CPU benchmark: the null model is served like the demo, the bare server answers the same bytes,
and seconds are counted correctly."""

import os
import time
from pathlib import Path

import grpc.aio
import numpy as np
import pytest

pytest.importorskip("matplotlib")
import gateway_cpu
import null_model
from serving import RAW, gateway, samples_of

from labelmint.core.policy import latent_of
from labelmint.triton.model_config import read_config
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.torch


async def test_the_null_model_is_served_and_the_bare_server_answers_its_bytes(tmp_path: Path) -> None:
    repository, path = tmp_path / "repository", tmp_path / "sample.bin"
    null_model.export(repository)
    ours, demo = (read_config(each / "faces" / "config.pbtxt") for each in (repository, REPOSITORY))
    assert ours.input == demo.input and ours.output == demo.output and ours.max_batch_size == demo.max_batch_size
    assert set(ours.parameters) == set(demo.parameters)
    with gateway("--model-repository", str(repository)) as served:
        async with samples_of(served.grpc, null_model.MODEL) as ask:
            samples = [await ask(seed) for seed in (0, 1)]
    assert len(samples[0].image.data) == 128 * 128 * 3 and samples[0].image.data == samples[1].image.data
    assert len(np.unique(np.frombuffer(samples[0].label.data, np.uint8))) > 5, "it compresses like a sample"
    for seed, sample in enumerate(samples):
        assert sample.js_score == pytest.approx(float((latent_of(seed, 64) ** 2).sum()), rel=1e-5)
    path.write_bytes(samples[0].SerializeToString())
    with gateway_cpu.bare(path) as server:
        async with grpc.aio.insecure_channel(server.grpc) as channel:
            stub = pb_grpc.SampleServiceStub(channel)
            assert (await stub.GetSample(pb.GetSampleRequest(seed=5, options=RAW))).sample == samples[0]
            batch = await stub.BatchGetSamples(pb.BatchGetSamplesRequest(seeds=[5, 6]))
            assert [outcome.sample for outcome in batch.outcomes] == [samples[0]] * 2
            assert await gateway_cpu.streams(2)(stub, 1.0) > 2
        assert gateway_cpu.cpu_seconds(server.pid) > 0.1, "its imports"


def test_seconds_are_those_of_the_process() -> None:
    before, mine = gateway_cpu.cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() < mine + 0.2:
        pass
    assert gateway_cpu.cpu_seconds(os.getpid()) - before == pytest.approx(0.2, abs=0.05)


def test_ratios_are_taken_within_a_round() -> None:
    def round_of(gateway_seconds: float, bare: float, relay: float) -> gateway_cpu.Figures:
        seconds = dict(zip(gateway_cpu.SERVERS, (gateway_seconds, bare, relay), strict=True))
        return {
            gateway_cpu.part_of(server, method): {"cpu_seconds": each, "samples_per_second": 100.0}
            for server, each in seconds.items()
            for method in gateway_cpu.METHODS
        }

    found = gateway_cpu.summary([round_of(3, 1, 2), round_of(6, 2, 4), round_of(4, 2, 2)])
    for each in found["methods"].values():
        assert each["ratios"]["gateway to bare"] == {"median": 3.0, "least": 2.0, "most": 3.0}
        assert each["ratios"]["relay to bare"]["median"] == 2.0 and each["ratios"]["gateway to relay"]["median"] == 1.5
