"""Identity: a seed's image and its label have one SHA-256 each, however and whenever the sample is requested.

Rules of this file:
- Only image and label are guaranteed. A score may differ in its last digits between machines, so it is left out.
- Each way of requesting runs while another one fills Triton's batches in a different way.
- The golden digests are those of the demo, per kind of processor and executor. What they depend on is stored with them,
  to explain a difference.

After an intended change of samples, run `python -m tests.torture.identity` to rewrite the digests of this machine's
processor. Those of other processors are kept as long as they depend on the same things. With AVX-512, the same command
with `--as-avx2` adds those of a processor without it: qemu-user emulates one for Triton's model processes.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import webdataset

from labelmint.core.executor import Choice
from labelmint_client import Client, Sample, SampleOptions
from labelmint_client.pull import PullOptions, pull
from tests.conftest import REPOSITORY, ROOT, Service, start_service
from tests.torture.emulated import emulated

GOLDEN = ROOT / "tests" / "data" / "golden_digests.json"
GOLDEN_SEEDS = range(12)
MODEL = "faces"
EXECUTORS: tuple[Choice, ...] = ("kernel", "onnxruntime")
ALL = SampleOptions(max_js=1e9)
Row = tuple[str, str]


@dataclass(frozen=True)
class Digests:
    """The SHA-256 of the bytes of an image uint8 [R,R,3] and of a label uint8 [R,R]."""

    image: str
    label: str


def digests_of(image: np.ndarray[Any, Any], label: np.ndarray[Any, Any]) -> Digests:
    return Digests(*(hashlib.sha256(np.ascontiguousarray(part).tobytes()).hexdigest() for part in (image, label)))


def of_sample(sample: object) -> Digests:
    assert isinstance(sample, Sample) and sample.image is not None and sample.label is not None
    return digests_of(sample.image, sample.label)


def alone(client: Client, seeds: Iterable[int]) -> dict[int, Digests]:
    """Request the seeds with one call each, one after the other."""
    return {seed: of_sample(client.get_sample(MODEL, seed, ALL)) for seed in seeds}


def in_batches(client: Client, seeds: range) -> dict[int, Sample]:
    """Request the seeds in batches of 1 to 16, which grow and shrink."""
    found: dict[int, Sample] = {}
    sizes = iter_sizes()
    first = seeds.start
    while first < seeds.stop:
        batch = range(first, min(first + next(sizes), seeds.stop))
        found |= {sample.seed: sample for sample in client.batch_get_samples(MODEL, batch, ALL)}  # type: ignore[misc]
        first = batch.stop
    return found


def iter_sizes() -> Iterator[int]:
    while True:
        yield from (1, 16, 2, 11, 3, 8, 5)


def pulled(client: Client, seeds: range, out: Path) -> dict[int, Digests]:
    """Pull the seeds to disk as a WebDataset, and read it with webdataset."""
    pull(client, PullOptions(MODEL, len(seeds), "webdataset", start_seed=seeds.start, sample=ALL), out)
    shards = sorted(map(str, out.glob("*.tar")))
    dataset = webdataset.WebDataset(shards, shardshuffle=False).decode("pil")
    found = {}
    for item in dataset:
        image, label = np.asarray(item["image.png"]), np.asarray(item["label.npy"])
        found[int(item["json"]["seed"])] = digests_of(image, label)
    return found


def same_everywhere(directory: Path, count: int) -> list[Row]:
    """Request `count` seeds of the demo in each way. Raises AssertionError for the first way that differs."""
    seeds = range(count)
    rows = []
    service = start_service(directory / "first.log")
    with Client(service.grpc) as client:
        wanted = alone(client, seeds)
    assert service.stop() == 0
    rows.append((f"{count} seeds alone", "the digests that the others must have"))

    service = start_service(directory / "second.log")
    with Client(service.grpc) as client, ThreadPoolExecutor() as pool:
        pulling = pool.submit(pulled, client, seeds, directory / "pulled")
        batched = in_batches(client, seeds)
        check("in batches, under load, after a restart", {s: of_sample(x) for s, x in batched.items()}, wanted, rows)
        check("pulled, under load", pulling.result(), wanted, rows)
    assert service.stop() == 0

    service = start_service(directory / "staged.log", "--pipeline", "staged")
    with Client(service.grpc) as client:
        staged = in_batches(client, seeds)
        few = seeds[:: max(1, count // 50)]
        check("staged, alone against in batches", alone(client, few), {s: of_sample(staged[s]) for s in few}, rows)
    assert service.stop() == 0
    assert all(of_sample(staged[seed]).image == wanted[seed].image for seed in seeds), "staged gives other images"
    agreement = float(np.mean([np.mean(staged[seed].label == batched[seed].label) for seed in seeds]))
    assert agreement >= 0.9999, f"staged and fused labels agree on {agreement:.4%} of the pixels"
    rows.append(("staged against fused", f"the same images, {agreement:.4%} of the labels' pixels"))
    return rows


def check(way: str, found: Mapping[int, Digests], wanted: Mapping[int, Digests], rows: list[Row]) -> None:
    assert found.keys() == wanted.keys()
    different = [seed for seed in wanted if found[seed] != wanted[seed]]
    assert not different, f"{way}: other bytes for {len(different)} of {len(wanted)} seeds, the first {different[:5]}"
    rows.append((f"{len(wanted)} seeds {way}", "one SHA-256 each"))


def depends_on(client: Client) -> dict[str, str]:
    """Return everything that may change the digests, except for the seed, the processor and the executor."""
    return {
        "model_digest": client.get_model(MODEL).digest,
        "onnxruntime": version("onnxruntime"),
        "numpy": version("numpy"),
    }


def kind(executor: str, vectors: str = "") -> str:
    """Return the key of the golden digests of this machine, or of another one with the instruction set `vectors`.

    The processor decides which float32 kernels ONNX Runtime uses for the generator; others round in another order. The
    labels depend on the executor, too.
    """
    flags = Path("/proc/cpuinfo").read_text().split()
    vectors = vectors or next((flag for flag in ("avx512f", "avx2") if flag in flags), "plain")
    return f"{platform.machine()} {vectors}, {executor}"


def golden_of(service: Service, executor: str) -> dict[str, Any]:
    """Request the golden seeds from a service, and return their digests with what they depend on."""
    try:
        with Client(service.grpc, deadline_seconds=600.0) as client:
            assert client.get_model(MODEL).executor == executor, service.log.read_text()
            found = {str(seed): vars(each) for seed, each in alone(client, GOLDEN_SEEDS).items()}
            return {"depends_on": depends_on(client), "digests": found}
    finally:
        assert service.stop() == 0


def of_this_machine(directory: Path) -> dict[str, dict[str, Any]]:
    return {
        kind(executor): golden_of(start_service(directory / f"{executor}.log", "--executor", executor), executor)
        for executor in EXECUTORS
    }


async def of_avx2(directory: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for executor in EXECUTORS:
        async with emulated(REPOSITORY, MODEL, executor, directory=directory / executor) as triton:
            url = ("--triton-url", triton.grpc_url)
            service = await asyncio.to_thread(start_service, directory / f"{executor}.log", *url, repository=directory)
            found[kind(executor, "avx2")] = await asyncio.to_thread(golden_of, service, executor)
    return found


def write_golden(mine: dict[str, dict[str, Any]]) -> None:
    """Replace these digests in the file, and forget those that depend on something else."""
    now = next(iter(mine.values()))["depends_on"]
    kept = {name: each for name, each in json.loads(GOLDEN.read_text()).items() if each["depends_on"] == now}
    aside = GOLDEN.with_suffix(".part")
    aside.write_text(json.dumps(dict(sorted((kept | mine).items())), indent=1) + "\n")
    aside.replace(GOLDEN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--as-avx2", action="store_true", help="emulate a processor with AVX2 and without AVX-512")
    arguments = parser.parse_args()
    with TemporaryDirectory() as name:
        directory = Path(name)
        write_golden(asyncio.run(of_avx2(directory)) if arguments.as_avx2 else of_this_machine(directory))


if __name__ == "__main__":
    main()
