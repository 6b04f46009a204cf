"""Writes the demo's model card from the figures that the measuring runs have kept.

Rules of this file:
- No number is written by hand: every figure comes from figures.json.

Run it as `python -m labelmint.demo.model_card FIGURES OUT`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from labelmint.demo import faces
from labelmint.demo.annotate import CLASSES
from labelmint.demo.train_generator import CROSSOVER, PHASES, SPEC


def model_card(figures: dict[str, Any]) -> str:
    generator, interpreter, gate = figures["generator"], figures["interpreter"], figures["gate"]
    keypoints = figures["keypoints"]
    errors = "\n".join(f"| {name} | {pixels:.2f} |" for name, pixels in keypoints["error_px"].items())
    rows = "\n".join(
        f"| {name} | {generator['segmenter_iou'][name]:.3f} | {interpreter['label_iou'][name]:.3f} |"
        for name in CLASSES.names
    )
    means = [sum(values.values()) / len(values) for values in (generator["segmenter_iou"], interpreter["label_iou"])]
    channels = ", ".join(f"{r}: {c}" for r, c in SPEC.channels.items())
    phases = ", ".join(f"{phase.resolution}²" for phase in PHASES)
    return f"""# Model card: `faces` and `faces_keypoints`

The demo models of labelmint: one generator, two Style Interpreters. They are made to be measured: every face comes from
a procedural renderer (`labelmint.demo.faces`) that knows the exact part mask and keypoints of every seed. The faces are
drawings; no person and no photograph went into the models. They are of no use for real photographs.

## Generator

A StyleGAN2 at {SPEC.resolution}×{SPEC.resolution} (z {SPEC.z_dim}, w {SPEC.w_dim}, channels {channels}), fitted to the
renderer by regression from z, progressively over {phases}
(`python -m labelmint.demo.train_generator`). Half of each batch mixes two latents at layer {CROSSOVER}, so earlier
layers carry geometry and later ones appearance.

PSNR against the renderer, mean over {generator["seeds"]} unseen seeds: **{generator["psnr_db"]:.2f} dB**.
The first column below is what an independent segmenter, trained on exact renders only, finds in the *generated*
images.

![Renders (odd rows) and generated images (even rows)](images/renders.png)

## Style Interpreter of parts: `faces`

{interpreter["num_heads"]} classifiers on the `{interpreter["layout"]}` layout, trained on
{interpreter["annotated_images"]} images of the generator with the renderer's masks in place of an annotator
(`labelmint synth`, `labelmint fit`). The second column is the IoU of its labels against exact masks on
{interpreter["seeds"]} unseen seeds.

| Class | IoU, segmenter on generated images | IoU, labels |
| --- | --- | --- |
{rows}
| **mean** | **{means[0]:.3f}** | **{means[1]:.3f}** |

The gate is calibrated on {gate["calibration_seeds"]} seeds at quantile {gate["threshold_quantile"]} of the JS score.
On {gate["seeds"]} other seeds it accepts **{gate["acceptance"]:.1%}**;
{gate["label_error_accepted"]:.2%} of the pixels of accepted samples are labelled wrongly,
{gate["label_error_rejected"]:.2%} of the rejected ones.

Classes: {", ".join(f"{index} {name}" for index, name in enumerate(faces.CLASS_NAMES))}.

## Style Interpreter of keypoints: `faces_keypoints`

{keypoints["num_heads"]} heads that regress heat maps, trained on the renderer's keypoints of
{keypoints["annotated_images"]} images (`labelmint fit --task keypoints`). Distance to the exact keypoints on
{keypoints["seeds"]} unseen seeds, in pixels of {SPEC.resolution}×{SPEC.resolution}: mean
**{keypoints["mean_error_px"]:.2f}**, 95th percentile {keypoints["percentile_95_px"]:.2f}.

| Keypoint | Mean distance |
| --- | --- |
{errors}

Left and right are the image's, not the person's; `labelmint pull --format coco` writes the person's.

The uncertainty of keypoints is our extension of the paper: the JS divergence of the heads' heat, read as Bernoulli
probabilities, summed over keypoints.

Made again with `make -f service/labelmint/demo/Makefile`; licence Apache-2.0, as the code.
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
