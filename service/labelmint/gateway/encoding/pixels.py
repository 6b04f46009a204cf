"""Encoders of images and label images for programs: one table from encoding to encoder, for gRPC and REST.

Rules of this file:
- The same arrays give the same bytes: no time stamps, fixed compression.
- Every encoding except JPEG is lossless.
- IGNORE in a label is the ignore label, which is no class id: training leaves out these pixels.
- Compressing a large image takes milliseconds of CPU. Callers therefore compress in a thread, not on the event loop.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from labelmint.gateway.sampling.sample import Sample

Bytes: TypeAlias = npt.NDArray[np.uint8]
Encoding = Literal["raw", "png", "jpeg"]
Encoder: TypeAlias = Callable[[Sample], bytes]

# The fastest of zlib's strategies and levels whose file is at most a tenth larger than the smallest file at level 6, as
# measured by benchmarks/encoders.py. A PNG-filtered image hardly repeats itself, so Huffman coding alone suffices. A
# label consists of runs of one class, so run-length encoding suffices. With both, every level gives the same bytes.
IMAGE_STRATEGY, LABEL_STRATEGY = zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE
_JPEG_QUALITY = 95

IGNORE = 255
IGNORE_COLOUR = (224, 224, 192)  # PASCAL VOC's


def image_raw(sample: Sample) -> bytes:
    """Encode the image as rows of RGB bytes."""
    return image_of(sample).tobytes()


def image_png(sample: Sample) -> bytes:
    return png(Image.fromarray(image_of(sample)), IMAGE_STRATEGY)


def image_jpeg(sample: Sample) -> bytes:
    """Encode the image as JPEG of quality 95 with full chroma: lossy, for viewing and training, never for labels."""
    buffer = io.BytesIO()
    Image.fromarray(image_of(sample)).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def label_raw(sample: Sample) -> bytes:
    """Encode the label as rows of class ids, one byte each."""
    return label_of(sample).tobytes()


def label_png(sample: Sample) -> bytes:
    """Encode the label as a palette PNG whose indices are class ids. The palette reaches IGNORE only if it occurs."""
    label, palette = label_of(sample), sample.model.palette
    if (label == IGNORE).any():
        palette = (*palette, *((0, 0, 0),) * (IGNORE - len(palette)), IGNORE_COLOUR)
    picture = Image.fromarray(label, mode="P")
    picture.putpalette(bytes(value for colour in palette for value in colour))
    return png(picture, LABEL_STRATEGY)


IMAGE_ENCODERS: Mapping[Encoding, Encoder] = {"raw": image_raw, "png": image_png, "jpeg": image_jpeg}
LABEL_ENCODERS: Mapping[Encoding, Encoder] = {"raw": label_raw, "png": label_png}  # JPEG would change class ids


def image_of(sample: Sample) -> Bytes:
    """Return the image, uint8 [R,R,3]."""
    assert sample.image is not None, "the image was left out"
    return sample.image


def label_of(sample: Sample) -> Bytes:
    """Return the class ids, uint8 [R,R], with IGNORE in the pixels to ignore.

    The quantile is one of the values of the JS map (the next higher one), so the label does not depend on a library's
    interpolation.
    """
    assert sample.label is not None, "the label was left out, or the model's task has no label image"
    if sample.ignored is None:
        return sample.label
    js_map = sample.ignored.js_map
    limit = np.quantile(js_map, sample.ignored.quantile, method="higher")
    return np.where(js_map > limit, np.uint8(IGNORE), sample.label)


def png(picture: Image.Image, strategy: int) -> bytes:
    """Encode a picture as PNG, compressed with one of zlib's strategies."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_type=strategy, pnginfo=PngInfo())
    return buffer.getvalue()
