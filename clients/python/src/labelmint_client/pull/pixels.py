"""Images and labels as the PNGs and arrays that the gateway writes. Pure functions of arrays.

Rules of this file:
- Same arrays, same bytes: no time stamps, and the compression that the gateway uses.
- 255 in a label means: train on nothing here.
"""

from __future__ import annotations

import io
import zlib

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from labelmint_client import Sample

Bytes = npt.NDArray[np.uint8]

IGNORE = 255
_IMAGE_STRATEGY, _LABEL_STRATEGY = zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE  # the gateway's
_IGNORE_COLOUR = (224, 224, 192)  # PASCAL VOC's


def image_png(image: Bytes) -> bytes:
    """uint8 [H,W,3] as RGB PNG."""
    return _png(Image.fromarray(image), _IMAGE_STRATEGY)


def label_png(label: Bytes, palette: Bytes | None) -> bytes:
    """Class ids uint8 [H,W] as a palette PNG whose indices they are; palette uint8 [K,3], K at most 255.

    Without a palette they are the values of an 8-bit gray PNG.
    """
    picture = Image.fromarray(label)
    if palette is None:
        return _png(picture, _LABEL_STRATEGY)
    colours = palette
    if (label == IGNORE).any():
        colours = np.zeros((IGNORE + 1, 3), np.uint8)
        colours[: len(palette)] = palette
        colours[IGNORE] = _IGNORE_COLOUR
    picture.putpalette(colours.tobytes())
    return _png(picture, _LABEL_STRATEGY)


def label_npy(label: Bytes) -> bytes:
    """The label as a NumPy file."""
    buffer = io.BytesIO()
    np.save(buffer, label, allow_pickle=False)
    return buffer.getvalue()


def written_label(sample: Sample, ignore_js_quantile: float | None) -> Bytes | None:
    """The label as it is written, uint8 [H,W]; None for a model of keypoints.

    With a quantile, pixels whose JS is above that quantile of the same image's js_map are IGNORE. The quantile is one
    of the values of the map (the next higher one), so that no library's interpolation is part of the label.
    """
    if sample.label is None or ignore_js_quantile is None:
        return sample.label
    assert sample.js_map is not None, "ignoring pixels needs include_js_map"
    limit = np.quantile(sample.js_map, ignore_js_quantile, method="higher")
    return np.where(sample.js_map > limit, np.uint8(IGNORE), sample.label)


def _png(picture: Image.Image, strategy: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_type=strategy, pnginfo=PngInfo())
    return buffer.getvalue()
