"""The sections of docs/benchmarks.md about annotating, each from the results of one benchmark."""

from __future__ import annotations

from typing import Any

Figures = dict[str, Any]


def simulate(figures: Figures) -> str:
    arms, last = figures["arms"], "16"

    def row(arm: str, each: Figures) -> str:
        strokes = f"{each['strokes'][last]:.0f}" if "strokes" in each else ""
        minutes = f"{each['seconds'][last] / 60:.0f}" if "seconds" in each else ""
        share = f"{100 * each['share_drawn']:.1f} %" if "share_drawn" in each else ""
        cells = [share, strokes, minutes]
        cells += [f"{each['miou'][count]:.3f}" if count in each["miou"] else "" for count in ("4", "8", "12", last)]
        cells += [f"{each['served_miou']:.3f}" if "served_miou" in each else ""]
        return f"| {arm} | {' | '.join(cells)} |"

    errors = {
        arm: ", ".join(f"{100 * error:+.1f}" for error in each["estimate_errors"])
        for arm, each in arms.items()
        if "estimate_errors" in each
    }
    reached, stated = figures["images_of_suggested"], figures["stated_seconds"]
    return f"""## What does drawing teach?

`PYTHONPATH=benchmarks python -m annotate.simulate`

A simulated person draws on the demo, with a hand's inaccuracy, where the page's prediction is wrong
(`benchmarks/annotate/person.py`). The minutes are stated, not measured: {stated["stroke"]:g} s for a stroke, a second
for {stated["pixels_a_second"]:g} pixels, {stated["zoom"]:g} s to zoom in; looking and thinking are not counted.

mIoU on {figures["unseen_images"]} unseen images, against the renderer's exact masks; means of {figures["runs"]} runs,
each on other seeds. The curves are fits of 3 heads and 1,000 steps. The last column is the fit that is served. Strokes
are fitted with `--unlabelled extend`, except in the last row.

![mIoU over images, strokes and minutes](images/annotate_simulate.png)

| Annotations | Drawn | Strokes | Minutes | 4 images | 8 | 12 | 16 | 16, served |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(row(arm, each) for arm, each in arms.items())}

- Strokes reach {100 * figures["strokes_to_full"]:.1f} % of the mIoU of full masks of the same images (target: 95 %,
  with at most 10 % of the pixels drawn).
- Suggested images reach the mIoU of 16 random ones with {reached or "more than 16"} images (target: 12).
- The leave-one-out estimate of 16 images minus the served mIoU of the classes that it covers, in points, run by run
  (target: within 5):
  {errors["strokes, random images"]} with random images; {errors["strokes, suggested images"]} with suggested ones.
"""


def latency(figures: Figures) -> str:
    rows = [
        f"| {side}² | {figures['bars'][side]:g} | {each['median_seconds']:.2f} "
        f"| {each['least_seconds']:.2f} to {each['most_seconds']:.2f} | {each['first_seconds']:.1f} |"
        for side, each in figures["by_side"].items()
    ]
    return f"""## How long does a stroke take?

`PYTHONPATH=benchmarks python -m annotate.latency`

From a stroke on the annotation page to the labels of this image and six others, over the page's socket, on
{figures["threads"]} cores; {figures["strokes"]} strokes. The first prediction also computes the features of the images.
The target is for the median.

| Images | Target, s | Median, s | Least to most, s | First, s |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}
"""


def quick(figures: Figures) -> str:
    def cells(each: Figures, name: str) -> str:
        return f"{each['quick'][name]:.3f} | {each['random_subspaces'][name]:.3f}"

    rows = [
        f"| {count} | {cells(each, 'miou')} | {cells(each, 'auroc_of_wrong_pixels')} |"
        for count, each in figures["by_images"].items()
    ]
    return f"""## Which quick interpreter?

`PYTHONPATH=benchmarks python -m annotate.quick`

One linear head on all features, whose uncertainty is its entropy, or four on random halves, whose uncertainty is their
JS divergence. Strokes on {100 * figures["share_drawn"]:.1f} % of the demo's pixels; {figures["unseen_images"]} unseen
images.

| Images | mIoU: one head | four | AUROC of wrong pixels: one head | four |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}
"""
