"""Writes the demo's model card from the figures that `demo.evaluate` stored.

Rules of this file:
- Every measured figure comes from figures.json, so the card cannot differ from the measurements.

Run it as `PYTHONPATH=benchmarks python -m demo.model_card FIGURES OUT`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from demo import faces
from demo.annotate import CLASSES
from demo.train_generator import CROSSOVER, MIXED_FROM, PHASES, SPEC


def model_card(figures: dict[str, Any]) -> str:
    generator, interpreter, random, gate = (figures[name] for name in ("generator", "interpreter", "random", "gate"))
    keypoints = figures["keypoints"]
    errors = "\n".join(f"| {name} | {pixels:.2f} |" for name, pixels in keypoints["error_px"].items())
    columns = (generator["segmenter_iou"], interpreter["label_iou"], random["label_iou"])
    rows = "\n".join(
        f"| {name} | {generator['share_of_seeds'][name]:.0%} | " + " | ".join(f"{c[name]:.3f}" for c in columns) + " |"
        for name in CLASSES.names
    )
    means = " | ".join(f"**{sum(values.values()) / len(values):.3f}**" for values in columns)
    channels = ", ".join(f"{r}: {c}" for r, c in SPEC.channels.items())
    phases = ", ".join(f"{phase.resolution}²" for phase in PHASES if not phase.pull and not phase.contrast)
    sharpness = ", ".join(f"{ratio:.2f} at {side}²" for side, ratio in generator["sharpness"].items())
    errors_of_bands = ", ".join(f"{ratio:.2f} at {side}²" for side, ratio in generator["band_error"].items())
    rare = ", ".join(f"{value:.3f} ({name})" for name, value in generator["segmenter_iou_where_present"].items())
    return f"""# Model card: `faces` and `faces_keypoints`

The demo models of labelmint are one generator and two Style Interpreters. Their quality can be measured exactly: a
procedural renderer (`demo.faces`) defines the faces, and it knows the exact part mask and keypoints of every
seed. The faces are drawings. No person and no photograph was used for the models, and they do not work on photographs.

## Generator

A StyleGAN2 at {SPEC.resolution}×{SPEC.resolution} (z {SPEC.z_dim}, w {SPEC.w_dim}, channels {channels}), fitted to the
renderer by regression from z, progressively over {phases}.
A small discriminator then sharpens the images, and the last phase compares the contrast of small windows
(`python -m demo.train_generator`). From {MIXED_FROM}² on, half of each batch mixes two latents at layer {CROSSOVER}, so
the earlier layers control geometry and the later layers control appearance.

The mean PSNR against the renderer over {generator["seeds"]} unseen seeds is **{generator["psnr_db"]:.2f} dB**.
The gradient energy of the generated images in bands of a Laplacian pyramid, divided by that of the renders, is
{sharpness}.
Energy tells how strong details are, and not whether they are right. The squared error of the same bands, divided by the
energy of the renders' bands, is {errors_of_bands}.
The generator does not draw the stripes of the wall, smooths curls, and leaves light halos around some outlines.
The second column of the table below is the IoU of an independent segmenter on the *generated* images. The segmenter was
trained on exact renders only. The first column is the share of seeds whose masks have the class. In those seeds alone,
the segmenter's IoU of the rare classes is {rare}.

![Three blocks of eight seeds that nothing was fitted to: renders, generated images, labels](images/renders.png)

## Style Interpreter of parts: `faces`

The interpreter has {interpreter["num_heads"]} classifiers on the `{interpreter["layout"]}` layout. They were trained on
{interpreter["annotated_images"]} images of the generator, with masks from the renderer instead of an annotator
(`labelmint synth`, `labelmint fit`). The images were chosen as a person would choose them: rare parts in some, and as
different as possible (`python -m demo.choose`). The third column is the IoU of its labels against the exact masks of
{interpreter["seeds"]} unseen seeds. The last column is the same for an interpreter of {random["annotated_images"]}
images that nobody chose, the first ones of `labelmint synth`.

| Class | Seeds | IoU, segmenter on generated images | IoU, labels | IoU, labels, 16 images by chance |
| --- | --- | --- | --- | --- |
{rows}
| **mean** | | {means} |

The gate is calibrated on {gate["calibration_seeds"]} seeds at quantile {gate["threshold_quantile"]} of the JS score.
Of {gate["seeds"]} other seeds, it accepts **{gate["acceptance"]:.1%}**.
In accepted samples, {gate["label_error_accepted"]:.2%} of the pixels have a wrong label; in rejected samples,
{gate["label_error_rejected"]:.2%}.

Classes: {", ".join(f"{index} {name}" for index, name in enumerate(faces.CLASS_NAMES))}.

## Style Interpreter of keypoints: `faces_keypoints`

The interpreter has {keypoints["num_heads"]} heads that regress heat maps. They were trained on the renderer's keypoints
of {keypoints["annotated_images"]} images (`labelmint fit --task keypoints`). On {keypoints["seeds"]} unseen seeds, the
distance to the exact keypoints in pixels of {SPEC.resolution}×{SPEC.resolution} has the mean
**{keypoints["mean_error_px"]:.2f}** and the 95th percentile {keypoints["percentile_95_px"]:.2f}.

| Keypoint | Mean distance |
| --- | --- |
{errors}

Left and right are those of the image, not of the person; `labelmint pull --format coco` writes those of the person.

The uncertainty of keypoints is our extension of the paper. It is the JS divergence of the heads' heat maps, taken as
Bernoulli probabilities and summed over the keypoints.

`make -f benchmarks/demo/Makefile` fits both interpreters to the generator again and writes this card.
The licence is Apache-2.0, as for the code.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    aside = arguments.out.with_suffix(".part")
    aside.write_text(model_card(json.loads(arguments.figures.read_text())), encoding="utf-8")
    os.replace(aside, arguments.out)


if __name__ == "__main__":
    main()
