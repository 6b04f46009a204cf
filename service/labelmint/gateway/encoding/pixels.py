"""Images and label images as bytes for machines: one table from encoding to encoder, for both wires.

Rules of this file:
- The same arrays give the same bytes: no time stamps, fixed compression.
- Every encoding but JPEG keeps the arrays exactly.
- Encoding a large image takes milliseconds of CPU: the wires call these functions in a thread.
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

# The fastest of zlib's strategies and levels within a tenth of the smallest file that level 6 gives, as measured by
# benchmarks/encoders.py: what PNG's filters leave of an image hardly repeats itself, and a label is runs of one class.
# Both strategies give the same at every level.
IMAGE_STRATEGY, LABEL_STRATEGY = zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE
_JPEG_QUALITY = 95


def image_raw(sample: Sample) -> bytes:
    """The image as rows of RGB bytes."""
    return image_of(sample).tobytes()


def image_png(sample: Sample) -> bytes:
    """The image as RGB PNG."""
    return png(Image.fromarray(image_of(sample)), IMAGE_STRATEGY)


def image_jpeg(sample: Sample) -> bytes:
    """The image as JPEG of quality 95 with full chroma: lossy, for people and for training, never for labels."""
    buffer = io.BytesIO()
    Image.fromarray(image_of(sample)).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def label_raw(sample: Sample) -> bytes:
    """The label as rows of class ids, a byte each."""
    return label_of(sample).tobytes()


def label_png(sample: Sample) -> bytes:
    """The label as a palette PNG: the indices are class ids."""
    picture = Image.fromarray(label_of(sample), mode="P")
    picture.putpalette(bytes(value for colour in sample.model.palette for value in colour))
    return png(picture, LABEL_STRATEGY)


IMAGE_ENCODERS: Mapping[Encoding, Encoder] = {"raw": image_raw, "png": image_png, "jpeg": image_jpeg}
LABEL_ENCODERS: Mapping[Encoding, Encoder] = {"raw": label_raw, "png": label_png}  # JPEG would change class ids


def image_of(sample: Sample) -> Bytes:
    """uint8 [R,R,3]."""
    assert sample.image is not None, "the image was left out"
    return sample.image


def label_of(sample: Sample) -> Bytes:
    """Class ids uint8 [R,R]."""
    assert sample.label is not None, "the label was left out, or the model's task has no label image"
    return sample.label


def png(picture: Image.Image, strategy: int) -> bytes:
    """A picture as PNG, compressed by one of zlib's strategies."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_type=strategy, pnginfo=PngInfo())
    return buffer.getvalue()
