"""Encodes images and labels as the same PNG and NumPy files that the gateway writes. Pure functions of arrays.

Rules of this file:
- The same arrays give the same bytes: there are no time stamps, and the compression is that of the gateway.
- 255 in a label is the ignore label: training leaves out these pixels. The gateway writes it (ignore_js_quantile).
"""

from __future__ import annotations

import io
import zlib

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

Bytes = npt.NDArray[np.uint8]

IGNORE = 255
_IMAGE_STRATEGY, _LABEL_STRATEGY = zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE  # the gateway's
_IGNORE_COLOUR = (224, 224, 192)  # PASCAL VOC's


def image_png(image: Bytes) -> bytes:
    """Encode an image, uint8 [H,W,3], as an RGB PNG."""
    return _png(Image.fromarray(image), _IMAGE_STRATEGY)


def label_png(label: Bytes, palette: Bytes | None) -> bytes:
    """Encode class ids, uint8 [H,W], as the indices of a palette PNG; palette uint8 [K,3], K at most 255.

    Without a palette, the class ids are the values of an 8-bit gray PNG.
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
    """Encode the label as a NumPy file."""
    buffer = io.BytesIO()
    np.save(buffer, label, allow_pickle=False)
    return buffer.getvalue()


def _png(picture: Image.Image, strategy: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_type=strategy, pnginfo=PngInfo())
    return buffer.getvalue()
