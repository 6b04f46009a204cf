"""Samples as bytes: PNG, overlay, heat map, npz. Pure functions of arrays.

Rules of this file:
- The same arrays give the same bytes: no time stamps, fixed compression. Only names that Pillow's own font lacks, in
  pictures for people, look as the fonts of the machine do.
- `*.png` routes for machines carry exactly the arrays; `overlay` and `uncertainty` are for people and carry words.
- Encoding a large image takes milliseconds of CPU: the wire adapters call these functions in a thread.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from labelmint.gateway.encoding.lettering import draw_text, length_of, own_font
from labelmint.gateway.sampling.sample import Keypoints, Sample

Bytes = npt.NDArray[np.uint8]

# The fastest of zlib's strategies and levels within a tenth of the smallest file that level 6 gives, as measured by
# benchmarks/encoders.py: what PNG's filters leave of an image hardly repeats itself, and a label is runs of one class.
# Both strategies give the same at every level.
_IMAGE_STRATEGY, _LABEL_STRATEGY = zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE
_JPEG_QUALITY = 95
_PANEL = 384  # side of a picture for people, in pixels
_MARGIN = 12
_INK, _PAPER, _FAINT = (28, 30, 36), (250, 250, 248), (110, 114, 122)
_ACCEPTED, _REJECTED = (0, 110, 84), (178, 34, 34)
# Anchors of a perceptually ordered map from dark to bright.
_HEAT = np.array([(8, 6, 36), (84, 18, 110), (187, 55, 84), (249, 142, 9), (252, 255, 164)], np.float64)
MAX_JS = float(np.log(2.0))  # nats; the ensemble split in two halves, each sure of its own class


def image_raw(sample: Sample) -> bytes:
    """The image as rows of RGB bytes."""
    return _image(sample).tobytes()


def image_png(sample: Sample) -> bytes:
    """The image as RGB PNG."""
    return _png(Image.fromarray(_image(sample)), _IMAGE_STRATEGY)


def image_jpeg(sample: Sample) -> bytes:
    """The image as JPEG of quality 95 with full chroma: lossy, for people and for training, never for labels."""
    buffer = io.BytesIO()
    Image.fromarray(_image(sample)).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def label_raw(sample: Sample) -> bytes:
    """The label as rows of class ids, a byte each."""
    return _label(sample).tobytes()


def label_png(sample: Sample) -> bytes:
    """The label as a palette PNG: the indices are class ids."""
    picture = Image.fromarray(_label(sample), mode="P")
    picture.putpalette(bytes(value for colour in sample.model.palette for value in colour))
    return _png(picture, _LABEL_STRATEGY)


def overlay_png(sample: Sample) -> bytes:
    """For people: the image, the label or keypoints over it, the legend, and the score against the gate."""
    image, names, palette = _image(sample), sample.model.label_names, sample.model.palette
    if sample.keypoints is not None:
        confidence = sample.keypoints.confidence.tolist()
        legend = [(f"{name} {c:.2f}", rgb) for name, rgb, c in zip(names, palette, confidence, strict=True)]
        return _figure(sample, [image, _points(image, sample.keypoints, palette)], legend)
    label = _label(sample)
    colours = np.asarray(palette, np.float32)[label]  # [R,R,3]
    blend = image.astype(np.float32) * 0.35 + colours * 0.65
    legend = [(names[i], palette[i]) for i in np.unique(label)]
    return _figure(sample, [image, np.clip(blend, 0, 255).astype(np.uint8)], legend)


def _points(image: Bytes, keypoints: Keypoints, palette: Sequence[tuple[int, int, int]]) -> Bytes:
    """The image enlarged to a panel, with a ringed dot at each keypoint: uint8 [_PANEL,_PANEL,3]."""
    picture = Image.fromarray(image).resize((_PANEL, _PANEL), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    scale = _PANEL / image.shape[0]
    for (x, y), rgb in zip(((keypoints.positions + 0.5) * scale).tolist(), palette, strict=True):
        draw.ellipse((x - 7, y - 7, x + 7, y + 7), _PAPER, _INK)
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), rgb)
    return np.asarray(picture)


def uncertainty_png(sample: Sample) -> bytes:
    """For people: the image and the JS divergence of its pixels, dark for agreement, bright from ln 2 nats on."""
    assert sample.js_map is not None, "uncertainty needs include_js_map"
    ticks = np.linspace(0.0, MAX_JS, 5)
    legend = [
        (f"{tick:.2f} nats", tuple(colour)) for tick, colour in zip(ticks, heat_colours(ticks).tolist(), strict=True)
    ]
    return _figure(sample, [_image(sample), heat_colours(sample.js_map)], legend)


def heat_colours(nats: npt.NDArray[np.floating[Any]]) -> Bytes:
    """Colours of JS divergences: float [...] in nats to uint8 [...,3]."""
    position = np.clip(nats / MAX_JS, 0.0, 1.0) * (len(_HEAT) - 1)
    anchors = np.arange(len(_HEAT))
    return np.stack([np.interp(position, anchors, _HEAT[:, c]) for c in range(3)], axis=-1).round().astype(np.uint8)


def npz(sample: Sample) -> bytes:
    """The sample as a NumPy archive.

    `image`, `label`, `js_map`, `js_score`, `threshold`, `seed`; and of a mixed sample `style_seed`, `crossover`,
    `group_id`. A keypoint model has `keypoints` [K,2], `confidence` [K] and `keypoint_names` [K] instead of `label`.
    """
    arrays: dict[str, npt.NDArray[Any]] = {
        "image": _image(sample),
        "js_score": np.array(sample.js_score),
        "threshold": np.array(sample.gate.threshold),
        "seed": np.array(sample.seed),
    }
    if sample.label is not None:
        arrays["label"] = sample.label
    if sample.keypoints is not None:
        arrays["keypoints"] = sample.keypoints.positions
        arrays["confidence"] = sample.keypoints.confidence
        arrays["keypoint_names"] = np.array(sample.model.label_names)
    if sample.js_map is not None:
        arrays["js_map"] = sample.js_map
    if sample.mixing is not None:
        arrays["style_seed"] = np.array(sample.mixing.style_seed)
        arrays["crossover"] = np.array(sample.mixing.crossover)
        arrays["group_id"] = np.array(sample.group_id)
    # numpy.savez stamps its members with the present time in some versions; these members carry none.
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _image(sample: Sample) -> Bytes:
    assert sample.image is not None, "the image was left out"
    return sample.image


def _label(sample: Sample) -> Bytes:
    assert sample.label is not None, "the label was left out, or the model is one of keypoints"
    return sample.label


def _figure(sample: Sample, panels: Sequence[Bytes], legend: Sequence[tuple[str, tuple[int, ...]]]) -> bytes:
    widest = math.ceil(max(length_of(name, 14) for name, _ in legend)) + 21 + _MARGIN
    width = max(len(panels) * (_PANEL + _MARGIN) + _MARGIN, widest + _MARGIN)
    columns = max(1, min(6, (width - _MARGIN) // widest))
    rows = (len(legend) + columns - 1) // columns
    top, line = 40, 24
    picture = Image.new("RGB", (width, top + _PANEL + _MARGIN + rows * line + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(picture)
    verdict = "accepted" if sample.accepted else "rejected"
    colour = _ACCEPTED if sample.accepted else _REJECTED
    title = f"{sample.model.name} · seed {sample.seed}"
    if sample.mixing is not None:
        title += f" · style {sample.mixing.style_seed} from layer {sample.mixing.crossover}"
    draw.text((_MARGIN, 11), title, _INK, own_font(16))
    score = f"{verdict}: JS {sample.js_score:.4g}, gate {sample.gate.threshold:.4g} nats"
    draw.text((width - _MARGIN, 11), score, colour, own_font(16), anchor="ra")
    for index, panel in enumerate(panels):
        enlarged = Image.fromarray(panel).resize((_PANEL, _PANEL), Image.Resampling.NEAREST)
        picture.paste(enlarged, (_MARGIN + index * (_PANEL + _MARGIN), top))
    step = (width - _MARGIN) // columns
    for index, (name, rgb) in enumerate(legend):
        x, y = _MARGIN + index % columns * step, top + _PANEL + _MARGIN + index // columns * line
        draw.rectangle((x, y, x + 15, y + 15), rgb, _FAINT)
        draw_text(draw, (x + 21, y - 1), name, fill=_INK, size=14)
    return _png(picture, _LABEL_STRATEGY)


def _png(picture: Image.Image, strategy: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_type=strategy, pnginfo=PngInfo())
    return buffer.getvalue()
