"""Samples as members of a tar archive, in WebDataset's convention.

Rules of this file:
- The same samples give the same bytes: no time, no owner, ustar headers.
- The members of one sample share its seed as their key, in ten digits: `image.png`, those of its task's labels
  (segmentation: `label.npy`), and `json`.
- Only a whole archive ends with the two zero blocks. One that breaks off ends within a member: readers of tar take an
  end between two members for the end of the archive, and would not notice. So the last block of each sample, which
  holds the end of its JSON, waits for the next sample or for the end.
"""

from __future__ import annotations

import asyncio
import json
import tarfile
from collections.abc import AsyncGenerator
from contextlib import aclosing

from labelmint.gateway.encoding.fields import sample_fields
from labelmint.gateway.encoding.labels import labels_of
from labelmint.gateway.encoding.pixels import image_png
from labelmint.gateway.sampling.sample import Delivery, Sample

END = b"\0" * (2 * tarfile.BLOCKSIZE)


async def archive(deliveries: AsyncGenerator[Delivery, None]) -> AsyncGenerator[bytes, None]:
    """The archive of a walk, a part a sample; closes the walk in any case."""
    held = b""
    async with aclosing(deliveries):
        async for delivery in deliveries:
            if delivery.sample is not None:
                blocks = await asyncio.to_thread(members, delivery.sample, delivery.next_seed)
                yield held + blocks[: -tarfile.BLOCKSIZE]
                held = blocks[-tarfile.BLOCKSIZE :]
    yield held + END


def members(sample: Sample, next_seed: int) -> bytes:
    """The tar blocks of one sample: the image uint8 [R,R,3] as PNG, the members of its labels, and JSON.

    The JSON has what the sample's own has besides pixels, and `next_seed`, where an archive after this sample begins.
    """
    fields = {**sample_fields(sample), "next_seed": next_seed}
    parts = {
        "image.png": image_png(sample),
        **labels_of(sample).members(sample),
        "json": json.dumps(fields, sort_keys=True).encode(),
    }
    return b"".join(_member(f"{sample.seed:010d}.{suffix}", data) for suffix, data in parts.items())


def _member(name: str, data: bytes) -> bytes:
    header = tarfile.TarInfo(name)  # mode 0644, owner 0 without a name, time 0
    header.size = len(data)
    return header.tobuf(tarfile.USTAR_FORMAT) + data + b"\0" * (-len(data) % tarfile.BLOCKSIZE)
