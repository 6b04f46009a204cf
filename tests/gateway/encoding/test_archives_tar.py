"""A samples.tar that is cut is an error to whoever reads it: tarfile, GNU tar and WebDataset; a whole one is none."""

import io
import subprocess
import tarfile
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from labelmint.gateway.encoding import archives
from labelmint.gateway.sampling.sample import Delivery

pytestmark = pytest.mark.unit


COUNT = 16


async def members(seed: Any, _: int) -> bytes:
    """In place of a sample's. The sizes of the JSON go over a whole block: padding of every length is among them."""
    image = np.random.default_rng(seed).bytes(700 + 31 * seed)
    parts = (("image.png", image), ("json", b"{}" + b" " * (37 * seed)))
    return b"".join(archives._member(f"{seed:010d}.{name}", data) for name, data in parts)


async def sent() -> list[bytes]:
    """All that had been sent whenever the archive waited for a sample; the last is the whole archive."""

    async def walk() -> AsyncGenerator[Delivery, None]:
        for seed in range(COUNT):
            yield Delivery(seed, seed + 1, 0)  # type: ignore[arg-type]

    totals = [b""]
    async for part in archives.archive(walk(), members):
        totals.append(totals[-1] + part)
    return totals[1:]


def with_tarfile(path: Path) -> int:
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes()), mode="r|*") as archive:
        return len([archive.extractfile(member).read() for member in archive])  # type: ignore[union-attr]


def with_webdataset(path: Path) -> int:
    return 2 * len(list(webdataset.WebDataset(str(path), shardshuffle=False)))


def with_gnu_tar(path: Path) -> int:
    return len(subprocess.run(["tar", "tf", str(path)], check=True, capture_output=True).stdout.splitlines())


@pytest.mark.parametrize("read", [with_tarfile, with_webdataset, with_gnu_tar])
async def test_each_cut_is_an_error(tmp_path: Path, read: Callable[[Path], int]) -> None:
    path = tmp_path / "cut.tar"
    *cuts, whole = await sent()
    assert len(cuts) == COUNT
    path.write_bytes(whole)
    assert read(path) == 2 * COUNT
    for cut in cuts:
        path.write_bytes(cut)
        with pytest.raises((tarfile.ReadError, subprocess.CalledProcessError)):
            read(path)
