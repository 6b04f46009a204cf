"""Measures where the time of an image-label pair goes, and which library runs each of its two steps fastest.

Rules of this file:
- The models are the demo as committed, and StyleGAN2 at 512 x 512 with its own channel table, random weights and 10
  classifiers.
- "As served" is a real Triton as `labelmint serve` runs it, with one batch at a time: the interpreter runs in the C
  kernel where that can run. The seconds of a step are those that Triton counts; the rest of the call is the cost of
  the server. Seconds are per sample.
- "By library" is the same weights as ONNX under ONNX Runtime, as TorchScript under torch, and the ONNX file under
  OpenVINO's execution provider. `step_runner.py` runs each in a separate process. CUDA and TensorRT are measured too if
  ONNX Runtime has them. The interpreter's inputs are features from the generator.
- The parts of a round take turns, a figure is the median of the rounds. The floor's rates are measured in each round.
- Agreement is with ONNX Runtime; identity means that a sample has the same bytes alone and as the first of a batch.

Run it as `python benchmarks/pair.py` on an idle machine (half an hour; without `make openvino` before, that library is
left out); it writes benchmarks/results/pair.json and docs/images/pair.png. `--prepare` only exports and compares.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import floor
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import random_models
import resuming
import step_runner
from demo.committed import GENERATOR, INTERPRETER
from direct import PHASES, STEPS, Direct, inputs_of
from resuming import BUILD, ROOT, Figures

from labelmint.export.modules import GeneratorStep, Step, StyleInterpreterStep
from labelmint.export.repository import export_repository
from labelmint.export.torchscript_export import export_torchscript
from labelmint.models.generator import Generator
from labelmint.models.interpreter import StyleInterpreter
from labelmint.models.store import load_generator, load_interpreter
from labelmint.pipeline import serving

RESULTS = ROOT / "benchmarks" / "results" / "pair.json"
PICTURE = ROOT / "docs" / "images" / "pair.png"
OPENVINO = ROOT / ".venv-openvino" / "bin" / "python"
REPEATS = 3  # timed calls of a process
WARMUPS = 3  # untimed first calls of a server: they touch its memory for the first time
STYLE_LAYERS = 1_000_000  # a crossover beyond all layers: no style mixing


@dataclass(frozen=True)
class Subject:
    """A measured model; `batches` are its batch sizes. The largest is also used to compare libraries."""

    name: str
    title: str
    batches: tuple[int, ...]

    def build(self) -> tuple[Generator, StyleInterpreter]:
        if self.name == "faces":
            return load_generator(GENERATOR), load_interpreter(INTERPRETER)
        resolution, classes = (int(part[1:]) for part in self.name.split("_"))
        return random_models.stylegan2(resolution, classes)

    @property
    def repository(self) -> Path:
        return ROOT / "model_repository" if self.name == "faces" else BUILD / "pair" / self.name / "repository"

    def file(self, step: str, library: str) -> Path:
        if library in step_runner.TORCH:
            return BUILD / "pair" / self.name / f"{step}.pt"
        return self.repository / f"{self.name}_{step}" / "1" / "model.onnx"

    def inputs(self, step: str) -> Path:
        return BUILD / "pair" / self.name / f"{step}.npz"


# Triton serves StyleGAN2 at 512 x 512 sample by sample: a batch would exceed the limit for tensors between steps.
SUBJECTS = (
    Subject("faces", "`faces`, 128²", (1, 8)),
    Subject("r512_k20", "StyleGAN2, 512², K = 20", (1,)),
)


@functools.cache
def outputs_of(subject: Subject) -> dict[str, tuple[str, ...]]:
    return {name: tuple(spec.name for spec in step.outputs) for name, step in steps_of(subject).items()}


def steps_of(subject: Subject) -> dict[str, Step]:
    generator, interpreter = subject.build()
    return {"generator": GeneratorStep(generator, interpreter), "style_interpreter": StyleInterpreterStep(interpreter)}


def prepare(subject: Subject) -> None:
    """Export both formats and write the inputs of both steps, unless this code has written them before."""
    directory = BUILD / "pair" / subject.name
    kept = directory / "exported"
    wanted = resuming.digest_of(resuming.exporting_code(), subject.name)
    if kept.exists() and kept.read_text() == wanted:
        return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    generator, interpreter = subject.build()
    if subject.name != "faces":
        export_repository(subject.repository, subject.name, (generator, interpreter))
    for name, step in steps_of(subject).items():
        subject.file(name, "torchscript").write_bytes(export_torchscript(step).data)
    count = max(subject.batches)
    arrays = inputs_of(range(count), generator.spec.z_dim, STYLE_LAYERS)
    np.savez(subject.inputs("generator"), **arrays)
    drawn = step_runner.load(
        "onnxruntime", subject.file("generator", "onnxruntime"), list(outputs_of(subject)["generator"])
    )(arrays)
    np.savez(subject.inputs("style_interpreter"), **{k: x for k, x in drawn.items() if k.startswith("features_")})
    kept.write_text(wanted)


def libraries(openvino: Path) -> dict[str, Path]:
    """Return the available libraries, each with the Python that has it."""
    found = {library: Path(sys.executable) for library in step_runner.available()}
    if openvino.exists():
        command = [str(openvino), step_runner.__file__, "--available"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        if "openvino" in json.loads(done.stdout):
            found["openvino"] = openvino
    if "openvino" not in found:
        print(f"{openvino} has no OpenVINO; run `make openvino` to measure it")
    return found


def run_alone(subject: Subject, step: str, library: str, *, python: Path, repeats: int, save: Path | None) -> Figures:
    """Run `step_runner.py` on one file in a separate process and return its figures."""
    command = [str(python), step_runner.__file__, library, str(subject.file(step, library)), str(subject.inputs(step))]
    command += ["--outputs", *outputs_of(subject)[step], "--batches", *map(str, subject.batches)]
    command += ["--repeats", str(repeats), *(("--save", str(save)) if save else ())]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return dict(json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout))


def compare(subject: Subject, present: dict[str, Path]) -> dict[str, dict[str, Figures]]:
    """Return by step and library: differences to ONNX Runtime by output, and whether a batch changes a sample."""
    found: dict[str, dict[str, Figures]] = {}
    for step in STEPS:
        saved = {library: BUILD / "pair" / subject.name / f"{step}_{library}.npz" for library in present}
        for library, python in present.items():
            run_alone(subject, step, library, python=python, repeats=0, save=saved[library])
        largest = max(subject.batches)
        found[step] = {}
        with np.load(saved["onnxruntime"]) as wanted:
            for library, path in saved.items():
                with np.load(path) as got:
                    found[step][library] = {
                        "difference": {
                            name: difference(wanted[f"{name}@{largest}"], got[f"{name}@{largest}"])
                            for name in outputs_of(subject)[step]
                        },
                        "same_bytes_in_a_batch": all(
                            np.array_equal(got[f"{name}@1"][0], got[f"{name}@{largest}"][0])
                            for name in outputs_of(subject)[step]
                        )
                        if largest > 1
                        else None,
                    }
                if library != "onnxruntime":
                    path.unlink()
        saved["onnxruntime"].unlink()
    return found


def difference(want: np.ndarray, got: np.ndarray) -> float:
    """Return the share of differing values for integers, else the largest difference relative to the largest value."""
    if want.dtype.kind in "ui":
        return float((want != got).mean())
    return float(np.abs(want - got).max() / max(float(np.abs(want).max()), 1e-12))


async def served(subject: Subject) -> Figures:
    """Measure by batch size, per sample: seconds of a call, and of each phase of each step as Triton counts them."""
    async with serving(subject.repository, subject.name) as (client, model):
        direct = Direct(client.url, model)
        calls: Figures = {str(batch): [] for batch in subject.batches}
        for _ in range(WARMUPS + REPEATS):
            for batch in subject.batches:
                before, begun = await direct.statistics(), time.perf_counter()
                await direct.infer(range(batch))
                seconds, after = time.perf_counter() - begun, await direct.statistics()
                steps = {
                    step: {phase: (end[phase] - start[phase]) / batch for phase in PHASES}
                    for step, start, end in zip(STEPS, before, after, strict=True)
                }
                calls[str(batch)].append({"call": seconds / batch, "steps": steps})
        await direct.close()
    return {batch: some[WARMUPS:] for batch, some in calls.items()}


def alone(subject: Subject, present: dict[str, Path]) -> Figures:
    """Measure by step, library and batch size: seconds per sample."""
    found: Figures = {}
    for step in STEPS:
        found[step] = {}
        for library, python in present.items():
            ran = run_alone(subject, step, library, python=python, repeats=REPEATS, save=None)
            found[step][library] = {
                batch: [each / int(batch) for each in seconds] for batch, seconds in ran["seconds"].items()
            }
    return found


def floors(subject: Subject, rates: Figures) -> Figures:
    """Return by step, per sample of a batch of one: operations, bytes and the least seconds."""
    generator, interpreter = subject.build()
    channels = interpreter.spec.channels
    counts = {
        "generator": (
            floor.generator_flops(generator.spec),  # type: ignore[arg-type]
            floor.generator_bytes(generator.spec, channels),  # type: ignore[arg-type]
        ),
        "style_interpreter": (floor.interpreter_flops(interpreter.spec), floor.interpreter_bytes(interpreter.spec)),
    }
    return {
        step: {
            "flops": flops,
            "bytes": moved,
            "seconds": floor.floor_seconds(
                flops, moved, rates["flops_per_second"], bytes_per_second=rates["bytes_per_second"]
            ),
        }
        for step, (flops, moved) in counts.items()
    }


def summary(subjects: list[Subject], rounds: list[dict[str, Figures]], agreement: Figures) -> Figures:
    """Return medians over all rounds and their repetitions."""
    rates = {key: float(np.median([each["machine"][key] for each in rounds])) for key in rounds[0]["machine"]}
    models: Figures = {}
    for subject in subjects:
        parts: Figures = {"served": {}, "alone": {}, "floor": floors(subject, rates), **agreement[subject.name]}
        for batch in map(str, subject.batches):
            calls = [call for each in rounds for call in each[f"{subject.name} served"][batch]]
            parts["served"][batch] = {
                "call": float(np.median([call["call"] for call in calls])),
                "steps": {
                    step: {phase: float(np.median([call["steps"][step][phase] for call in calls])) for phase in PHASES}
                    for step in STEPS
                },
            }
        for step, by_library in rounds[0][f"{subject.name} alone"].items():
            parts["alone"][step] = {}
            for library, by_batch in by_library.items():
                parts["alone"][step][library] = {
                    batch: spread([each[f"{subject.name} alone"][step][library][batch] for each in rounds])
                    for batch in by_batch
                }
        models[subject.name] = {"title": subject.title, **parts}
    return {"rounds": len(rounds), "cores": floor.available_cores(), "machine": rates, "models": models}


def spread(rounds: list[list[float]]) -> Figures:
    """Return the median of a figure over everything, and the least and largest of the rounds' medians."""
    medians = [float(np.median(some)) for some in rounds]
    return {
        "median": float(np.median([x for some in rounds for x in some])),
        "low": min(medians),
        "high": max(medians),
    }


def plot(figures: Figures, path: Path) -> None:
    models = figures["models"]
    figure, panels = plt.subplots(1, 1 + len(models), figsize=(4 + 2.9 * len(models), 3.6))
    names = {"compute_input": "input", "compute_infer": "compute", "compute_output": "output"}
    bars = [
        (f"{model['title']}".replace("`", ""), model, batch) for model in models.values() for batch in model["served"]
    ]
    for row, (_, model, batch) in enumerate(bars):
        call = model["served"][batch]
        left = 0.0
        pieces = [
            (f"{step}: {names[p]}", call["steps"][step][p], (i, p)) for i, step in enumerate(STEPS) for p in names
        ]
        pieces.append(("queue, server and client", call["call"] - sum(piece[1] for piece in pieces), (2, "")))
        for label, seconds, (hue, phase) in pieces:
            share = seconds / call["call"]
            colour = plt.cm.tab20c(
                4 * hue + {"compute_infer": 0, "compute_input": 2, "compute_output": 3, "": 3}[phase]
            )
            panels[0].barh(row, share, left=left, color=colour, label=label if row == 0 else None)
            left += share
    panels[0].set_yticks(
        range(len(bars)), [f"{title}\nbatch {batch}: {m['served'][batch]['call']:.3g} s" for title, m, batch in bars]
    )
    panels[0].tick_params(axis="y", labelsize=7)
    panels[0].invert_yaxis()
    panels[0].set_xlim(0, 1)
    panels[0].set_title("share of a call's time, as served", fontsize=9)
    panels[0].legend(fontsize=6, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.08), ncol=2)
    for panel, model in zip(panels[1:], models.values(), strict=True):
        batch = next(iter(model["served"]))
        present = list(model["alone"][STEPS[0]])
        for index, step in enumerate(STEPS):
            for place, library in enumerate(present):
                one = model["alone"][step][library][batch]
                error = [[one["median"] - one["low"]], [one["high"] - one["median"]]]
                panel.bar(
                    index + 0.24 * place,
                    one["median"],
                    0.22,
                    yerr=error,
                    color=f"C{place}",
                    label=library if not index else None,
                )
            least = model["floor"][step]["seconds"]
            label = "floor" if not index else None
            panel.hlines(least, index - 0.15, index + 0.24 * len(present) - 0.1, "black", "dashed", label=label)
        panel.set_xticks([index + 0.12 * (len(present) - 1) for index in range(2)], STEPS, fontsize=8)
        panel.set_title(f"{model['title']}, batch {batch}: s".replace("`", ""), fontsize=8)
        panel.set_ylim(0)
        panel.grid(axis="y", alpha=0.3)
    panels[1].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    resuming.add_arguments(parser)
    parser.add_argument("--models", nargs="+", default=[each.name for each in SUBJECTS], help="such as r512_k20")
    parser.add_argument("--openvino", type=Path, default=OPENVINO, help="Python that has onnxruntime-openvino")
    parser.add_argument("--prepare", action="store_true", help="only export and compare: nothing is timed")
    arguments = parser.parse_args()
    subjects = [each for each in SUBJECTS if each.name in arguments.models]
    present = libraries(arguments.openvino)
    agreement: Figures = {}
    files = [Path(step_runner.__file__)]
    for subject in subjects:
        prepare(subject)
        files += [subject.file(step, library) for step in STEPS for library in ("onnxruntime", "torchscript")]
        kept = BUILD / "pair" / subject.name / "agreement.json"
        if not kept.exists() or set(json.loads(kept.read_text())["agreement"][STEPS[0]]) != set(present):
            resuming.write(kept, {"agreement": compare(subject, present)})
        agreement[subject.name] = json.loads(kept.read_text())
    if arguments.prepare:
        return
    parts = {"machine": floor.rates}
    for subject in subjects:
        parts[f"{subject.name} served"] = lambda subject=subject: asyncio.run(served(subject))
        parts[f"{subject.name} alone"] = lambda subject=subject: alone(subject, present)
    fingerprint = resuming.digest_of(files, sorted(present))
    rounds = resuming.measured("pair", fingerprint, parts, rounds=arguments.rounds, budget=arguments.budget)
    figures = summary(subjects, rounds, agreement)
    resuming.write(RESULTS, figures)
    plot(figures, PICTURE)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
