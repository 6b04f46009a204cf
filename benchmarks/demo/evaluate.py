"""Measures the demo against the renderer's exact masks, to get the figures of the model card.

Rules of this file:
- The seeds are not those of training, annotation or calibration, so the figures hold for unseen samples.
- The run that measures a figure prints it and can store it as JSON for the model card.

Run it as `PYTHONPATH=benchmarks python -m demo.evaluate generator|interpreter|keypoints|gate|served|formats ...`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from demo import faces, metrics
from demo.annotate import compiled_renderer, exact_keypoints
from demo.committed import fingerprint
from demo.segmenter import Segmenter, segment
from labelmint.core.calibration import Calibration
from labelmint.models.annotations import write_json
from labelmint.models.draw import draw
from labelmint.models.generator import to_uint8
from labelmint.models.store import load_generator, load_interpreter, read_notes
from labelmint.pipeline import measure, serving
from labelmint.triton.client import Array
from labelmint.triton.model_config import read_config

EVALUATION_SEED = 4_200_000_000
SHEET_COLUMNS = 8


def evaluate_generator(path: Path, segmenter_path: Path, count: int) -> dict[str, object]:
    """Measure PSNR and sharpness against the renderer, and the independent segmenter's IoU on the generated images."""
    generator = load_generator(path)
    judge = Segmenter()
    judge.load_state_dict(torch.load(segmenter_path, weights_only=True))
    judge.eval()
    render = compiled_renderer()
    values, counts = [], torch.zeros(metrics.NUM_CLASSES, metrics.NUM_CLASSES, dtype=torch.long)
    generated, rendered, error, energy = torch.zeros(4, metrics.OCTAVES).double()
    seen, unions = torch.zeros(2, metrics.NUM_CLASSES, dtype=torch.long)  # seeds that have a class; pixels in them
    for seed in tqdm(range(EVALUATION_SEED, EVALUATION_SEED + count), desc="generator", unit="img"):
        exact = render(seed)
        image = draw(generator, seed, 1.0, layout="paper")[0].clamp(-1.0, 1.0)
        values.append(metrics.psnr(image, exact.image))
        found = metrics.confusion(segment(judge, image), exact.label)
        counts += found
        here = found.sum(dim=1) > 0  # [K], the classes of this seed's mask
        seen += here
        unions += metrics.union(found) * here
        generated += metrics.gradient_energy(image)
        rendered += metrics.gradient_energy(exact.image)
        error += metrics.band_energy(image - exact.image)
        energy += metrics.band_energy(exact.image)
    by_class = metrics.iou(counts)
    share = dict(zip(by_class, (seen / count).tolist(), strict=True))
    present = metrics.iou(counts, unions)  # a seed without the class has no hits to leave out
    mean = float(torch.cat(values).mean())
    print(f"PSNR against the renderer on {count} unseen seeds: {mean:.2f} dB")
    sharpness, band_error = metrics.by_octave(generated, rendered), metrics.by_octave(error, energy)
    print("by octave (pixels per side): gradient energy, generated / rendered; squared error / energy of the render")
    print("\n".join(f"  {octave:>3}  {ratio:.3f}  {band_error[octave]:.3f}" for octave, ratio in sharpness.items()))
    print("IoU of an independent segmenter on the generated images:")
    for kind, rare in (("common", False), ("rare", True)):
        chosen = {name: value for name, value in by_class.items() if (name in faces.RARE_PARTS) == rare}
        print(
            f"{kind} classes, which the masks of {_percent(min(share[n] for n in chosen))} to "
            f"{_percent(max(share[n] for n in chosen))} of the seeds have:\n{metrics.table(chosen)}"
        )
    print(f"mean over all classes: {sum(by_class.values()) / len(by_class):.3f}")
    print("rare classes, in the seeds whose masks have them:")
    print(metrics.table({name: present[name] for name in faces.RARE_PARTS}))
    return {
        "seeds": count,
        "psnr_db": mean,
        "sharpness": sharpness,
        "band_error": band_error,
        "segmenter_iou": by_class,
        "segmenter_iou_where_present": {name: present[name] for name in faces.RARE_PARTS},
        "share_of_seeds": share,
    }


def _percent(share: float) -> str:
    return f"{100.0 * share:.1f} %"


def evaluate_interpreter(generator_path: Path, path: Path, count: int, *, sheet: Path | None) -> dict[str, object]:
    """Measure the IoU of the ensemble's labels against the renderer's masks."""
    generator, interpreter = load_generator(generator_path), load_interpreter(path)
    counts = torch.zeros(metrics.NUM_CLASSES, metrics.NUM_CLASSES, dtype=torch.long)
    render, columns = compiled_renderer(), list[Tensor]()
    for seed in tqdm(range(EVALUATION_SEED, EVALUATION_SEED + count), desc="interpreter", unit="img"):
        image, features = draw(generator, seed, 1.0, layout=interpreter.spec.layout)
        with torch.no_grad():
            label, _, _ = interpreter(features)
        exact = render(seed)
        counts += metrics.confusion(label, exact.label)
        if len(columns) < 3 * SHEET_COLUMNS:
            coloured = torch.tensor(faces.PALETTE, dtype=torch.uint8)[label[0].long()]  # [R,R,3]
            columns.append(torch.cat([to_uint8(exact.image)[0], to_uint8(image)[0], coloured]))  # [3*R,R,3]
    if sheet is not None:
        write_sheet(sheet, columns)
    by_class = metrics.iou(counts)
    print(f"IoU of the labels against exact masks on {count} unseen seeds:\n{metrics.table(by_class)}")
    return {
        "seeds": count,
        "label_iou": by_class,
        "num_heads": interpreter.spec.num_heads,
        "layout": interpreter.spec.layout,
        "annotated_images": len(read_notes(path)["seeds"]),
    }


def evaluate_keypoints(generator_path: Path, path: Path, count: int) -> dict[str, object]:
    """Measure the distance in pixels between the ensemble's keypoints and the renderer's, inside the image only."""
    generator, interpreter = load_generator(generator_path), load_interpreter(path)
    errors, present, confidences = [], [], []
    for seed in tqdm(range(EVALUATION_SEED, EVALUATION_SEED + count), desc="keypoints", unit="img"):
        _, features = draw(generator, seed, 1.0, layout=interpreter.spec.layout)
        with torch.no_grad():
            keypoints, confidence, *_ = interpreter(features)
        exact = exact_keypoints([seed])[seed]  # [K,3]
        errors.append(np.linalg.norm(keypoints[0].numpy() - exact[:, :2], axis=1))
        present.append(exact[:, 2] > 0)
        confidences.append(confidence[0].numpy())
    error, here = np.array(errors), np.array(present)  # [S,K] each
    by_name = {name: float(error[here[:, k], k].mean()) for k, name in enumerate(interpreter.spec.class_names)}
    figures: dict[str, object] = {
        "seeds": count,
        "mean_error_px": float(error[here].mean()),
        "percentile_95_px": float(np.percentile(error[here], 95)),
        "error_px": by_name,
        "mean_confidence": float(np.array(confidences)[here].mean()),
        "annotated_images": len(read_notes(path)["seeds"]),
        "num_heads": interpreter.spec.num_heads,
    }
    print(f"distance to exact keypoints on {count} unseen seeds, in pixels of {interpreter.spec.resolution}:")
    print("\n".join(f"  {name:<19}{value:.2f}" for name, value in by_name.items()))
    print(f"  {'mean':<19}{figures['mean_error_px']:.2f}   (95th percentile {figures['percentile_95_px']:.2f})")
    return figures


async def evaluate_gate(repository: Path, count: int) -> dict[str, object]:
    """Measure, with the real Triton, how many unseen seeds the calibrated gate accepts, and the label errors."""
    first, render = EVALUATION_SEED + 100_000, compiled_renderer()

    def judged(seed: int, arrays: dict[str, Array]) -> tuple[float, float]:
        wrong = arrays["label"] != render(seed).label[0].numpy()
        return float(arrays["js_score"][0]), float(wrong.mean())

    async with serving(repository, "faces") as (client, model):
        parameters = read_config(repository / model.triton_name / "config.pbtxt").parameters
        assert model.executor.calibration in parameters, "run `labelmint calibrate` first"
        calibration = Calibration.from_json(parameters[model.executor.calibration].string_value)
        psi = calibration.truncation_psi
        pairs = await measure(
            client,
            model,
            range(first, first + count),
            truncation_psi=psi,
            outputs=("label", "js_score"),
            reduce=judged,
            title="gate",
        )
    scores, errors = (np.array(column) for column in zip(*pairs, strict=True))
    accepted = scores <= calibration.threshold
    figures: dict[str, object] = {
        "seeds": count,
        "acceptance": float(accepted.mean()),
        "label_error_accepted": float(errors[accepted].mean()),
        "label_error_rejected": float(errors[~accepted].mean()),
        "calibration_seeds": calibration.seed_count,
        "threshold_quantile": calibration.threshold_quantile,
    }
    print(f"acceptance on {count} unseen seeds: {figures['acceptance']:.3f}")
    print(f"pixels labelled wrongly: {figures['label_error_accepted']:.4f} of the accepted samples,")
    print(f"                         {figures['label_error_rejected']:.4f} of the rejected ones")
    return figures


async def evaluate_served(repository: Path, generator_path: Path, path: Path, *, count: int) -> dict[str, object]:
    """Compare torch with the answers of the real Triton seed by seed, and return the largest differences."""
    generator, interpreter = load_generator(generator_path), load_interpreter(path)
    outputs = ("image", "label", "js_map", "js_score")

    def compared(seed: int, arrays: dict[str, Array]) -> tuple[float, float, float, float]:
        image, features = draw(generator, seed, 1.0, layout=interpreter.spec.layout)
        with torch.no_grad():
            label, js_map, js_score = interpreter(features)
        levels = np.abs(to_uint8(image)[0].numpy().astype(int) - arrays["image"]).max()
        return (
            float(levels),
            float((label[0].numpy() != arrays["label"]).mean()),
            float(np.abs(js_map[0].numpy() - arrays["js_map"]).max()),
            float(np.abs(js_score[0].numpy() / arrays["js_score"] - 1.0).max()),
        )

    async with serving(repository, "faces") as (client, model):
        seeds = range(EVALUATION_SEED, EVALUATION_SEED + count)
        rows = np.array(
            await measure(client, model, seeds, truncation_psi=1.0, outputs=outputs, reduce=compared, title="served")
        )
    figures: dict[str, object] = {
        "seeds": count,
        "image_levels": float(rows[:, 0].max()),
        "label_agreement": 1.0 - float(rows[:, 1].mean()),
        "js_map_nats": float(rows[:, 2].max()),
        "js_score_relative": float(rows[:, 3].max()),
    }
    print(f"torch against served, largest over {count} seeds: {figures}")
    return figures


async def evaluate_formats(repository: Path, other: Path, count: int) -> dict[str, object]:
    """Compare two exports of the same weights, both with the real Triton, and measure the time of each."""
    seeds = range(EVALUATION_SEED, EVALUATION_SEED + count)
    outputs = ("image", "label", "js_map", "js_score")
    answers, milliseconds = [], []
    for path in (repository, other):
        async with serving(path, "faces") as (client, model):
            started = time.perf_counter()
            answers.append(
                await measure(
                    client,
                    model,
                    seeds,
                    truncation_psi=1.0,
                    outputs=outputs,
                    reduce=lambda _, arrays: arrays,
                    title=path.name,
                )
            )
            milliseconds.append((time.perf_counter() - started) / count * 1e3)
    one, two = ({name: np.stack([arrays[name] for arrays in answer]) for name in outputs} for answer in answers)
    figures: dict[str, object] = {
        "seeds": count,
        "label_agreement": float((one["label"] == two["label"]).mean()),
        "image_levels": int(np.abs(one["image"].astype(int) - two["image"]).max()),
        "js_map_nats": float(np.abs(one["js_map"] - two["js_map"]).max()),
        "js_score_relative": float(np.abs(one["js_score"] / two["js_score"] - 1.0).max()),
        "milliseconds_per_pair": milliseconds,
    }
    print(f"{repository} against {other}, over {count} seeds: {figures}")
    return figures


def write_sheet(path: Path, columns: list[Tensor]) -> None:
    """Write pictures uint8 [H,R,3] next to each other, SHEET_COLUMNS in a row."""
    rows = [torch.cat(columns[first : first + SHEET_COLUMNS], 1) for first in range(0, len(columns), SHEET_COLUMNS)]
    Image.fromarray(torch.cat(rows).numpy()).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, *files: str, count: int) -> argparse.ArgumentParser:
        added = commands.add_parser(name)
        for file in files:
            added.add_argument(file, type=Path)
        added.add_argument("--count", type=int, default=count, help="number of seeds")
        added.add_argument("--json", type=Path, help="file to store the figures in")
        added.add_argument("--name", default=name, help="name of the figures in that file")
        return added

    command("generator", "generator", "segmenter", count=1024)
    command("interpreter", "generator", "interpreter", count=500).add_argument("--sheet", type=Path)
    command("keypoints", "generator", "interpreter", count=500)
    command("gate", "repository", count=1000)
    command("served", "repository", "generator", "interpreter", count=64)
    command("formats", "repository", "other", count=64)
    given = parser.parse_args()
    figures: dict[str, object]
    if given.command == "generator":
        figures = evaluate_generator(given.generator, given.segmenter, given.count)
    elif given.command == "interpreter":
        figures = evaluate_interpreter(given.generator, given.interpreter, given.count, sheet=given.sheet)
    elif given.command == "keypoints":
        figures = evaluate_keypoints(given.generator, given.interpreter, given.count)
    elif given.command == "gate":
        figures = asyncio.run(evaluate_gate(given.repository, given.count))
    elif given.command == "served":
        figures = asyncio.run(evaluate_served(given.repository, given.generator, given.interpreter, count=given.count))
    else:
        figures = asyncio.run(evaluate_formats(given.repository, given.other, given.count))
    if given.json is not None:
        known = json.loads(given.json.read_text()) if given.json.exists() else {}
        write_json(given.json, known | {given.name: figures | {"fingerprint": fingerprint()}})


if __name__ == "__main__":
    main()
