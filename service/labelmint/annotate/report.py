"""Writes the estimate of `estimate.py` as one HTML file: the curve, the classes, and a contact sheet of every image.

Rules of this file:
- The file needs nothing else: no script, no style sheet, no address. Pictures are PNGs within it, the curve is SVG.
- Everything that a picture shows is said in words beside it, and nothing by colour alone.
- Every text that comes from the annotator is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from labelmint.annotate.estimate import NEAR, Estimate, Figure, estimate
from labelmint.core.task import TaskName, task_of
from labelmint.models.annotations import UNDRAWN, AnnotatedDataset, Unlabelled, sha256_of, write_text
from labelmint.models.draw import counted, features_of
from labelmint.models.extension import extended
from labelmint.models.fit import same_images
from labelmint.models.quick import quick_spec
from labelmint.models.store import load_generator
from labelmint.models.tasks import learning_of

Picture = npt.NDArray[np.uint8]  # [R,R,3]

_STYLE = """
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1b; background: #fff }
table { border-collapse: collapse } th, td { padding: .25rem .75rem; border-bottom: 1px solid #8a8a8a }
td { text-align: right; font-variant-numeric: tabular-nums } th { text-align: left }
.sheet { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: .5rem; margin: 0 0 2rem }
.sheet img { width: 100%; image-rendering: pixelated } figure { margin: 0 }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .5em; border: 1px solid #1b1b1b }
svg { max-width: 40rem; width: 100%; height: auto }
"""
_WRONG, _RIGHT, _PALE = (200, 0, 60), (235, 235, 235), (120, 120, 120)


def write_report(
    generator_path: Path,
    annotations: Path,
    out: Path,
    *,
    layout: str,
    task: TaskName,
    annotation_format: str,
    unlabelled: Unlabelled,
) -> None:
    """Estimate from the annotations of a directory, and write the report. Raises UnusableFile as `fit` does."""
    generator = load_generator(generator_path)
    dataset = learning_of(task).read(annotations, annotation_format, unlabelled)
    about = f"{len(dataset.labels)} annotated images, generator {sha256_of(generator_path)[:12]}"
    check = same_images(dataset, annotations, generator_path)
    drawn = dataset
    if unlabelled == "extend":
        dataset = extended(generator, drawn, layout=layout, check=check)
        about += ", undrawn pixels as a quick interpreter of all images labels them"
    with counted(features_of(generator, dataset, layout, check), 2 * len(dataset.labels), "leave one out") as features:
        found = estimate(quick_spec(generator, dataset, layout), dataset, features, drawn=drawn)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page(dataset, found, about))
    print(f"{out}: {_said(dataset, found)}")


def page(dataset: AnnotatedDataset, found: Estimate, about: str) -> str:
    """Return the report as HTML. `about` says what it is about."""
    measure = _measure(dataset)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>labelmint: are the annotations enough?</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>Are the annotations enough?</h1>
<p>{html.escape(about)}. <strong>{html.escape(_said(dataset, found))}</strong></p>
<p>{_next_step(found)}</p>
<p>How it is estimated: each annotated image is left out once. A quick linear interpreter, not the ten classifiers that
<code>labelmint fit</code> trains, learns from the others and labels it, and the label is compared with the image's
mask. The curve shows whether more images help; the classifiers label differently, and usually better. The spread is the
standard deviation when the images are drawn again with replacement.</p>
<h2>{measure}, by number of annotated images</h2>
{_curve(found.curve, measure)}
<h2>{measure}, by {"class" if task_of(dataset.task).has_label_image else "keypoint"}</h2>
{_classes(dataset, found, measure)}
<h2>Every image</h2>
{_sheets(dataset, found)}
</main>
</body>
</html>
"""


def _measure(dataset: AnnotatedDataset) -> str:
    return "IoU" if task_of(dataset.task).has_label_image else f"Keypoints found within {NEAR:.0%} of the side"


def _text(figure: Figure, digits: int = 3) -> str:
    return "not known" if math.isnan(figure.value) else f"{figure.value:.{digits}f} ± {figure.spread:.{digits}f}"


def _said(dataset: AnnotatedDataset, found: Estimate) -> str:
    """Return the main result in one sentence."""
    known = [count for count, figure in found.curve.items() if not math.isnan(figure.value)]
    if not known:
        return "Nothing can be estimated yet: no class is shown by two images or more."
    figure = found.curve[known[-1]]
    if task_of(dataset.task).has_label_image:
        return f"Estimated mean IoU {_text(figure)} with {known[-1]} images."
    return (
        f"Estimated with {known[-1]} images: {figure.value:.0%} ± {figure.spread:.0%} of the keypoints within "
        f"{NEAR:.0%} of the side, {found.distance:.1f} pixels away on average."
    )


def _next_step(found: Estimate) -> str:
    """Say which class would gain most from one more image, and why."""
    name = max(found.gain, key=lambda name: found.gain[name])
    figure, images = found.by_class[name], found.shown_in[name]
    reason = f"{images} image{'s show' if images != 1 else ' shows'} it"
    if not math.isnan(figure.value):
        reason += f", and its value is {figure.value:.3f}"
    return f"One more image would help most if it shows <strong>{html.escape(name)}</strong>: {reason}."


def _curve(curve: Mapping[int, Figure], measure: str) -> str:
    """Return the curve with its spread as SVG, and as a table."""
    known = {count: figure for count, figure in curve.items() if not math.isnan(figure.value)}
    if not known:
        return "<p>A curve needs two images that show the same class.</p>"
    left, right, top, bottom, last = 60.0, 620.0, 20.0, 280.0, max(known)

    def place(count: float, value: float) -> tuple[float, float]:
        return left + (right - left) * count / last, bottom - (bottom - top) * min(max(value, 0.0), 1.0)

    line = " ".join("{:.1f},{:.1f}".format(*place(count, figure.value)) for count, figure in known.items())
    marks = ""
    for count, figure in known.items():
        (x, y), (_, low), (_, high) = (place(count, figure.value + d * figure.spread) for d in (0, -1, 1))
        marks += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/><path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="#05489c"/>'
        marks += f'<text x="{x:.1f}" y="{bottom + 18:.0f}" text-anchor="middle" fill="#1b1b1b">{count}</text>'
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        _, y = place(0, value)
        marks += f'<path d="M{left} {y}H{right}" stroke="#c4c4c4"/><text x="{left - 8}" y="{y + 4}" text-anchor="end" '
        marks += f'fill="#1b1b1b">{value:g}</text>'
    rows = "".join(f'<tr><th scope="row">{count}</th><td>{_text(figure)}</td></tr>' for count, figure in known.items())
    return f"""<figure>
<svg viewBox="0 0 640 330" role="img" aria-labelledby="curve-title" font-size="14" fill="#05489c">
<title id="curve-title">{measure} from {min(known)} to {last} images; the table below has the values</title>
{marks}
<polyline points="{line}" fill="none" stroke="#05489c" stroke-width="2"/>
<text x="{(left + right) / 2}" y="{bottom + 40}" text-anchor="middle" fill="#1b1b1b">annotated images</text>
</svg>
<figcaption>Mean over the classes that two images or more show. A class counts as 0 until the second
image that shows it. The vertical lines are the spread.</figcaption>
</figure>
<table><thead><tr><th scope="col">Images</th><th scope="col">{measure}</th></tr></thead><tbody>{rows}</tbody></table>"""


def _classes(dataset: AnnotatedDataset, found: Estimate, measure: str) -> str:
    """Return the table of the classes; the one that would gain most comes first."""
    rows = ""
    colours = dict(zip(dataset.names, dataset.palette, strict=True))
    for name in sorted(found.gain, key=lambda name: -found.gain[name]):
        swatch = f'<span class="swatch" style="background:rgb{colours[name]}"></span>'
        rows += f'<tr><th scope="row">{swatch}{html.escape(name)}</th><td>{found.shown_in[name]}</td>'
        rows += f"<td>{_text(found.by_class[name])}</td><td>{found.gain[name]:.3f}</td></tr>\n"
    return f"""<p>The gain of one more image assumes that what is missing falls like 1/n with n images that show the
class. A class that fewer than two images show cannot be estimated.</p>
<table><thead><tr><th scope="col">Name</th><th scope="col">Images that show it</th><th scope="col">{measure}</th>
<th scope="col">Gain of one more</th></tr></thead><tbody>
{rows}</tbody></table>"""


def _sheets(dataset: AnnotatedDataset, found: Estimate) -> str:
    sheet = _masks if task_of(dataset.task).has_label_image else _points
    blocks = ""
    for seed, image in dataset.images.items():
        label, predicted = dataset.labels[seed], found.predictions.get(seed)
        figures = "".join(
            f'<figure><img src="{_png(picture)}" alt="{html.escape(f"Seed {seed}: {text}")}">'
            f"<figcaption>{html.escape(text)}</figcaption></figure>\n"
            for text, picture in sheet(dataset, image, label, predicted=predicted).items()
        )
        blocks += f'<h3>Seed {seed}</h3>\n<div class="sheet">\n{figures}</div>\n'
    return blocks


def _masks(dataset: AnnotatedDataset, image: Picture, label: Any, *, predicted: Any | None) -> dict[str, Picture]:
    """Return the pictures of an image with a mask, by their captions."""
    palette = np.zeros((UNDRAWN + 1, 3), np.uint8)
    palette[: len(dataset.palette)] = dataset.palette
    palette[UNDRAWN] = _PALE
    drawn = label != UNDRAWN
    pictures = {"image": image, f"drawn, {drawn.mean():.0%} of the pixels": palette[label]}
    if predicted is not None:
        wrong = drawn & (predicted != label)
        difference = np.full_like(image, _PALE)
        difference[drawn] = _RIGHT
        difference[wrong] = _WRONG
        pictures["predicted from the other images"] = palette[predicted]
        pictures[f"difference, {wrong.sum() / drawn.sum():.1%} of the drawn pixels"] = difference
    return pictures


def _points(dataset: AnnotatedDataset, image: Picture, label: Any, *, predicted: Any | None) -> dict[str, Picture]:
    """Return the pictures of an image with keypoints, by their captions."""
    present = label[:, 2] > 0
    pictures = {"image": image, f"drawn, {present.sum()} keypoints": _marked(dataset, image, label[:, :2], present)}
    if predicted is not None:
        pictures["predicted from the other images"] = _marked(dataset, image, predicted, present)
        lines = Image.fromarray(np.full_like(image, _RIGHT))
        for point in np.flatnonzero(present):
            ends = [tuple(label[point, :2].tolist()), tuple(predicted[point].tolist())]
            ImageDraw.Draw(lines).line(ends, fill=_WRONG, width=max(1, len(image) // 128))
        distance = np.linalg.norm(label[present, :2] - predicted[present], axis=1)
        mean = f"{distance.mean():.1f} pixels on average" if present.any() else "nothing to compare"
        pictures[f"difference, {mean}"] = np.asarray(lines)
    return pictures


def _marked(dataset: AnnotatedDataset, image: Picture, points: Any, present: Any) -> Picture:
    """Return the image with a disc in its colour at each present keypoint, [K,2] in pixels."""
    picture = Image.fromarray(image)
    radius = max(1.0, len(image) / 64)
    for (x, y), colour, shown in zip(points.tolist(), dataset.palette, present, strict=True):
        if shown:
            box = (x - radius, y - radius, x + radius, y + radius)
            ImageDraw.Draw(picture).ellipse(box, fill=colour, outline=(255, 255, 255))
    return np.asarray(picture)


def _png(picture: Picture) -> str:
    """Return a picture as the address of a PNG that is within it."""
    stored = io.BytesIO()
    Image.fromarray(picture).save(stored, "PNG")
    return "data:image/png;base64," + base64.b64encode(stored.getvalue()).decode()
