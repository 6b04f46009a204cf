"""A sample as a NumPy archive, and samples as members of a tar archive in WebDataset's convention.

Rules of this file:
- The same samples give the same bytes: no time, no owner, ustar headers. Some versions of numpy.savez stamp the members
  with the current time, so this file writes the NumPy archive itself.
- The members of one sample share a key, the seed in ten digits: `image.png`, the members of its task's labels
  (segmentation: `label.npy`), and `json`.
- Only a complete archive ends with the two zero blocks. An interrupted archive must end inside a member: a tar reader
  takes an end between two members for the end of the archive and reports no error. `archive` therefore sends the last
  block of each sample, which holds the end of its JSON, only with the next sample or with the end of the archive.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import numpy as np
import numpy.typing as npt

from labelmint.gateway.encoding.fields import sample_fields
from labelmint.gateway.encoding.labels import labels_of
from labelmint.gateway.encoding.pixels import image_of, image_png
from labelmint.gateway.sampling.sample import Delivery, Sample

END = b"\0" * (2 * tarfile.BLOCKSIZE)  # of a tar archive


def npz(sample: Sample) -> bytes:
    """Write `image`, `js_map`, `js_score`, `threshold`, `seed` and the arrays of the task's labels.

    Segmentation adds `label`. Keypoints add `keypoints` [K,2], `confidence` [K] and `keypoint_names` [K]. A mixed
    sample also has `style_seed`, `crossover` and `group_id`, and that of a conditional generator `class_index`.
    """
    arrays: dict[str, npt.NDArray[Any]] = {
        "image": image_of(sample),
        "js_score": np.array(sample.js_score),
        "threshold": np.array(sample.gate.threshold),
        "seed": np.array(sample.seed),
    }
    if sample.labels:
        arrays |= labels_of(sample).arrays(sample)
    if sample.js_map is not None:
        arrays["js_map"] = sample.js_map
    if sample.mixing is not None:
        arrays["style_seed"] = np.array(sample.mixing.style_seed)
        arrays["crossover"] = np.array(sample.mixing.crossover)
        arrays["group_id"] = np.array(sample.group_id)
    if sample.class_index is not None:
        arrays["class_index"] = np.array(sample.class_index)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


async def archive(
    deliveries: AsyncGenerator[Delivery, None], encode: Callable[[Sample, int], Awaitable[bytes]]
) -> AsyncGenerator[bytes, None]:
    """Yield the archive of a walk in parts, one per sample. The walk is closed in any case.

    `encode` runs `members` on a sample and its delivery's next_seed.
    """
    held = b""
    async with aclosing(deliveries):
        async for delivery in deliveries:
            if delivery.sample is not None:
                blocks = await encode(delivery.sample, delivery.next_seed)
                yield held + blocks[: -tarfile.BLOCKSIZE]
                held = blocks[-tarfile.BLOCKSIZE :]
    yield held + END


def members(sample: Sample, next_seed: int) -> bytes:
    """Return the tar blocks of one sample: the image uint8 [R,R,3] as PNG, the members of its labels, and JSON.

    The JSON has the fields of the sample's own JSON except the pixels. It adds `next_seed`, the seed at which the next
    archive begins if this sample is the last of its archive.
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
