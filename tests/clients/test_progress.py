"""The progress bar of a stream: rate, acceptance, and what remains if a count or an index tells it.

Rules of this file:
- The bar is read as it is after its walk, from stderr, which is no terminal here.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest

from labelmint_client import AsyncClient, Client, LabelmintError, Sample, SampleOptions
from labelmint_client.progress import Bar, Progress
from tests.clients.conftest import INDEXED, StartGateway
from tests.conftest import Service

pytestmark = [pytest.mark.triton, pytest.mark.torch]


def last(text: str) -> str:
    """The last state of a bar."""
    return re.split(r"[\r\n]+", text.strip())[-1]


def test_with_an_index_what_remains_is_known(
    indexed: Service, light_options: SampleOptions, light_accepted: list[Sample], capfd: pytest.CaptureFixture[str]
) -> None:
    seeds = [sample.seed for sample in light_accepted]
    with Client(indexed.grpc) as client:
        for arguments, wanted in (
            ({"end_seed": INDEXED.stop}, seeds),
            ({"start_seed": 100, "end_seed": 200}, [seed for seed in seeds if 100 <= seed < 200]),
            ({"end_seed": INDEXED.stop, "shard_index": 1, "shard_count": 3}, [seed for seed in seeds if seed % 3 == 1]),
            ({"end_seed": INDEXED.stop, "count": 7}, seeds[:7]),
            ({"end_seed": INDEXED.stop, "count": 1000}, seeds),
            ({"count": 5}, seeds[:5]),
        ):
            stream = client.stream_samples("light", options=light_options, progress=True, **arguments)  # type: ignore[arg-type]
            assert [sample.seed for sample in stream] == wanted
            assert f" {len(wanted)}/{len(wanted)} " in last(capfd.readouterr().err), arguments


def test_the_total_is_told_before_the_end(
    indexed: Service, light_options: SampleOptions, light_accepted: list[Sample], capfd: pytest.CaptureFixture[str]
) -> None:
    with Client(indexed.grpc) as client:
        stream = client.stream_samples("light", end_seed=INDEXED.stop, options=light_options, progress=True)
        for _ in range(10):
            sample = next(stream)
        stream.close()
    bar = last(capfd.readouterr().err)
    assert f" 10/{len(light_accepted)} " in bar and "sample/s" in bar
    assert f"{10 / (sample.seed + 1):.1%} accepted" in bar


def test_filtered_seeds_were_accepted(
    indexed: Service, light_options: SampleOptions, light_accepted: list[Sample], capfd: pytest.CaptureFixture[str]
) -> None:
    areas = sorted(float((sample.label == 1).mean()) for sample in light_accepted)
    options = replace(light_options, where=(f"b:{areas[-20]!r}..",))
    with Client(indexed.grpc) as client:
        stream = client.stream_samples("light", end_seed=INDEXED.stop, options=options, progress=True)
        delivered = len(list(stream))
        filtered, seeds = stream.filtered_count, delivered + stream.filtered_count + stream.rejected_count
    bar = last(capfd.readouterr().err)
    assert filtered and f"{(delivered + filtered) / seeds:.1%} accepted, {filtered} filtered" in bar


def test_without_an_index_the_rest_is_unknown(
    start_light: StartGateway, light_options: SampleOptions, capfd: pytest.CaptureFixture[str]
) -> None:
    options = light_options
    with Client(start_light().grpc) as client:
        assert [each.seed for each in client.stream_samples("light", end_seed=64, options=options, progress=True)]
        assert re.match(r"\d+sample \[", last(capfd.readouterr().err))
        assert len(list(client.stream_samples("light", count=3, options=options, progress=True))) == 3
        assert " 3/3 " in last(capfd.readouterr().err)
        list(client.stream_samples("light", count=3, options=options))
        list(client.stream_samples("light", 5, end_seed=5, options=options, progress=True))
        with pytest.raises(LabelmintError):  # it is not hidden
            client.stream_samples("light", options=SampleOptions(truncation_psi=9, max_js=1), progress=True)
    assert capfd.readouterr().err == ""


async def test_the_asyncio_client_shows_the_same(
    indexed: Service, light_options: SampleOptions, light_accepted: list[Sample], capfd: pytest.CaptureFixture[str]
) -> None:
    async with AsyncClient(indexed.grpc) as client:
        stream = await client.stream_samples("light", end_seed=INDEXED.stop, options=light_options, progress=True)
        assert [sample.seed async for sample in stream] == [sample.seed for sample in light_accepted]
    count = len(light_accepted)
    bar = last(capfd.readouterr().err)
    assert f" {count}/{count} " in bar and "accepted" in bar


def test_a_bar_needs_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tqdm"):
        Bar(None)


def test_a_bar_begins_with_what_earlier_runs_did(capfd: pytest.CaptureFixture[str]) -> None:
    with Bar(10) as bar:
        bar.show(Progress(done=4, accepted=4, filtered=0, seeds=8))
        assert capfd.readouterr().err == ""
        bar.show(Progress(done=5, accepted=5, filtered=0, seeds=10))
    assert " 5/10 " in last(capfd.readouterr().err)
