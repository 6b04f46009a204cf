"""A sample as a NumPy archive.

Rules of this file:
- The same sample gives the same bytes. Some versions of numpy.savez stamp the members with the current time, so this
  file writes the archive itself, without time stamps.
"""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np
import numpy.typing as npt

from labelmint.gateway.encoding.labels import labels_of
from labelmint.gateway.encoding.pixels import image_of
from labelmint.gateway.sampling.sample import Sample


def npz(sample: Sample) -> bytes:
    """Write `image`, `js_map`, `js_score`, `threshold`, `seed` and the arrays of the task's labels.

    Segmentation adds `label`. Keypoints add `keypoints` [K,2], `confidence` [K] and `keypoint_names` [K]. A mixed
    sample also has `style_seed`, `crossover` and `group_id`.
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
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
