"""Compares the served Style Interpreter with the reference, and both with the floor of this machine.

Rules of this file:
- The channel table is StyleGAN2's own, the ensemble has 10 classifiers; weights and features are random.
- The reference (`reference.py`) is torch on all cores in this process. The served step runs in a real Triton, which
  gets its features in shared memory. Its seconds are those that Triton counts for the step, with input and output.
- The two take turns, and while one works the other is idle. A figure is the median of the rounds; a ratio is taken
  within a round.
- A server is measured in its steady state: its first requests touch its memory for the first time, so they are not
  counted. The reference allocates its memory again at every call, so its first call is like the others.
- `onnx` is the shipped format; `native` is `labelmint export --format native`, the kernel in C.
- Memory is what a process needs beyond the memory before the call, which includes the features. Each arm has its own
  process.
- The floor is the time of the necessary operations and bytes (`floor.py`), at rates measured in the same run.

Run it as `python benchmarks/interpreter.py` on an idle machine (an hour; `--rounds 1` adds one round to the stored
ones); it writes benchmarks/results/interpreter.json and docs/images/interpreter.png.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import floor
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
import torch
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as shared_memory
from random_models import stylegan2_interpreter
from reference import ReferenceInterpreter

from labelmint.export.modules import StyleInterpreterStep, example_inputs
from labelmint.export.repository import FORMATS, step_config, write_model
from labelmint.kernel.interpreter import Interpreter
from labelmint.models.annotations import write_json
from labelmint.triton.model_config import model_file
from labelmint.triton.server import TritonServer, wait_until_ready

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "interpreter"
RESULTS = ROOT / "benchmarks" / "results" / "interpreter.json"
PICTURE = ROOT / "docs" / "images" / "interpreter.png"
CASES = ((256, 20), (512, 20), (256, 34))  # resolution, classes
MEMORY_CASES = ((256, 20), (512, 20), (1024, 20))
REFERENCE_FITS = 512  # above it, the reference's feature tensor alone takes 23 GB
ARMS = ("onnx", "native")
WARMUPS, COUNTED = 3, 3  # requests to a server
Figures = dict[str, Any]


def name_of(case: tuple[int, int]) -> str:
    return f"r{case[0]}_k{case[1]}"


def export(case: tuple[int, int], arm: str) -> None:
    """Write the step as a Triton model, unless it exists."""
    repository, model = BUILD / "repository", f"{name_of(case)}_{arm}"
    if not (repository / model).exists():
        step = StyleInterpreterStep(stylegan2_interpreter(*case))
        exported = FORMATS[arm](step)
        repository.mkdir(parents=True, exist_ok=True)
        config = step_config(model, step, arm)
        config.ClearField("model_warmup")  # the requests that are not counted warm it up
        write_model(repository, config, 1, files={model_file(config): exported.data})


def features_of(case: tuple[int, int]) -> dict[str, np.ndarray]:
    step = StyleInterpreterStep(stylegan2_interpreter(*case))
    return {spec.name: x.numpy() for spec, x in zip(step.inputs, example_inputs(step, 1), strict=True)}


class Served:
    """One step in Triton, called with features that stay in shared memory."""

    def __init__(self, url: str, model: str, features: Mapping[str, np.ndarray]) -> None:
        self._client = triton.InferenceServerClient(url)
        self._model = model
        self._inputs = []
        self._regions = []
        for name, array in features.items():
            region = shared_memory.create_shared_memory_region(
                name, f"/labelmint_bench_{os.getpid()}_{name}", array.nbytes
            )
            shared_memory.set_shared_memory_region(region, [array])
            self._client.register_system_shared_memory(name, f"/labelmint_bench_{os.getpid()}_{name}", array.nbytes)
            tensor = triton.InferInput(name, list(array.shape), "FP32")
            tensor.set_shared_memory(name, array.nbytes)
            self._inputs.append(tensor)
            self._regions.append(region)

    def seconds(self) -> tuple[float, np.ndarray]:
        """Return the seconds of one image, as Triton counts them (the median of COUNTED), and its label uint8 [R,R]."""
        seconds = []
        for _ in range(WARMUPS + COUNTED):
            before = self._counted()
            label = self._infer()
            seconds.append(self._counted() - before)
        return float(np.median(seconds[WARMUPS:])), label

    def _infer(self) -> np.ndarray:
        outputs = [triton.InferRequestedOutput(name) for name in ("label", "js_map", "js_score")]
        return self._client.infer(self._model, self._inputs, outputs=outputs).as_numpy("label")[0]

    def close(self) -> None:
        self._client.close()
        for region in self._regions:
            shared_memory.destroy_shared_memory_region(region)

    def _counted(self) -> float:
        (entry,) = self._client.get_inference_statistics(self._model).model_stats
        stats = entry.inference_stats
        return (stats.compute_input.ns + stats.compute_infer.ns + stats.compute_output.ns) / 1e9


async def one_round(case: tuple[int, int]) -> Figures:
    """Measure the seconds of each arm for one image."""
    interpreter = stylegan2_interpreter(*case)
    reference = ReferenceInterpreter(interpreter).eval()
    features = features_of(case)
    maps = {r: torch.from_numpy(features[f"features_{r}"]) for r in interpreter.spec.channels}
    seconds: Figures = {}
    labels: dict[str, np.ndarray] = {}
    for arm in ARMS:
        model = f"{name_of(case)}_{arm}"
        server = TritonServer(BUILD / "repository", [model])
        await server.start()
        try:
            await wait_until_ready(server)
            served = Served(server.grpc_url, model, features)
            seconds[arm], labels[arm] = await asyncio.to_thread(served.seconds)
        finally:
            await server.stop()
        served.close()
    begun = time.perf_counter()
    want = reference(maps)[0][0].numpy()
    seconds["reference"] = time.perf_counter() - begun
    return seconds | {f"{arm}_agreement": float((want == labels[arm]).mean()) for arm in ARMS}


@contextmanager
def _peak(into: multiprocessing.Queue[float]) -> Any:
    """Put the megabytes that the block needs, beyond this process's memory before it, into the queue."""
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = _status("VmRSS")
    yield
    into.put(_status("VmHWM") - before)


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024 / 1e6


def _extra_of_reference(case: tuple[int, int], into: multiprocessing.Queue[float]) -> None:
    interpreter = stylegan2_interpreter(*case)
    reference = ReferenceInterpreter(interpreter).eval()
    maps = dict(zip(interpreter.spec.channels, example_inputs(StyleInterpreterStep(interpreter), 1), strict=True))
    with _peak(into):
        reference(maps)


def _extra_of_onnx(case: tuple[int, int], into: multiprocessing.Queue[float]) -> None:
    options = onnxruntime.SessionOptions()
    options.enable_mem_pattern = False  # as in the step's configuration
    path = BUILD / "repository" / f"{name_of(case)}_onnx" / "1" / "model.onnx"
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    features = features_of(case)
    with _peak(into):
        session.run(None, features)


def extra_megabytes(
    work: Callable[[tuple[int, int], multiprocessing.Queue[float]], None], case: tuple[int, int]
) -> float:
    context = multiprocessing.get_context("spawn")
    into: multiprocessing.Queue[float] = context.Queue()
    process = context.Process(target=work, args=(case, into))
    process.start()
    found = into.get()
    process.join()
    return found


def _extra_of_native(case: tuple[int, int], into: multiprocessing.Queue[float]) -> None:
    features = [x[0] for x in features_of(case).values()]
    path = BUILD / "repository" / f"{name_of(case)}_native" / "1" / "interpreter.npz"
    with _peak(into):  # the constructor allocates its working memory and the weights
        Interpreter(path).run(features)


EXTRA = {"reference": _extra_of_reference, "onnx": _extra_of_onnx, "native": _extra_of_native}


def summary(found: Figures) -> Figures:
    """Return the medians of the rounds, the ratios within them, and the share of the floor."""
    rates = {key: float(np.median([rates[key] for rates in found["rates"]])) for key in found["rates"][0]}
    cases = []
    for case in CASES:
        rounds = found["rounds"].get(name_of(case), [])
        if not rounds:
            continue
        spec = stylegan2_interpreter(*case).spec
        least = floor.floor_seconds(
            floor.interpreter_flops(spec),
            floor.interpreter_bytes(spec),
            rates["flops"],
            bytes_per_second=rates["bytes"],
        )
        row: Figures = {"resolution": case[0], "classes": case[1], "rounds": len(rounds), "floor_seconds": least}
        row["reference_seconds"] = float(np.median([each["reference"] for each in rounds]))
        for arm in ARMS:
            seconds = float(np.median([each[arm] for each in rounds]))
            row[arm] = {
                "seconds": seconds,
                "times_faster": float(np.median([each["reference"] / each[arm] for each in rounds])),
                "share_of_floor": least / seconds,
                "label_agreement": min(each[f"{arm}_agreement"] for each in rounds),
            }
        cases.append(row)
    return {"rates": rates, "cases": cases, "extra_megabytes": found["extra_megabytes"]}


def plot(figures: Figures) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.4))
    arms = ("reference", *ARMS, "floor")
    for index, arm in enumerate(arms):
        heights = [
            row["floor_seconds"]
            if arm == "floor"
            else row["reference_seconds"]
            if arm == "reference"
            else row[arm]["seconds"]
            for row in figures["cases"]
        ]
        panels[0].bar([i + 0.2 * index for i in range(len(heights))], heights, 0.18, label=arm)
    panels[0].set_xticks(
        [i + 0.1 * (len(arms) - 1) for i in range(len(figures["cases"]))],
        [f"{row['resolution']}², K = {row['classes']}" for row in figures["cases"]],
    )
    panels[0].set_yscale("log")
    panels[0].set_title("seconds an image", fontsize=10)
    for arm, by_case in figures["extra_megabytes"].items():
        panels[1].plot([int(r) for r in by_case], list(by_case.values()), "o-", label=arm)
    panels[1].set_xscale("log", base=2)
    panels[1].set_yscale("log")
    panels[1].set_xticks([256, 512, 1024], ["256²", "512²", "1024²"])
    panels[1].set_title("memory above the features, MB (K = 20)", fontsize=10)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds to add to the stored ones")
    parser.add_argument("--cases", nargs="*", default=[name_of(case) for case in CASES], help="such as r256_k20")
    parser.add_argument("--memory", action="store_true", help="only measure memory")
    arguments = parser.parse_args()
    kept = BUILD / "rounds.json"
    empty: Figures = {"rates": [], "rounds": {}, "extra_megabytes": {arm: {} for arm in EXTRA}}
    found: Figures = json.loads(kept.read_text()) if kept.exists() else empty
    for case in {*CASES, *MEMORY_CASES}:
        for arm in ARMS:
            export(case, arm)
    for _ in range(0 if arguments.memory else arguments.rounds):
        found["rates"].append({"flops": floor.gemm_rate(), "bytes": floor.bandwidth()})
        for case in CASES:
            if name_of(case) in arguments.cases:
                seconds = asyncio.run(one_round(case))
                print(name_of(case), json.dumps(seconds))
                found["rounds"].setdefault(name_of(case), []).append(seconds)
                write_json(kept, found)
    for case in MEMORY_CASES:
        for arm, work in EXTRA.items():
            missing = str(case[0]) not in found["extra_megabytes"][arm]
            if missing and (arm != "reference" or case[0] <= REFERENCE_FITS):
                found["extra_megabytes"][arm][str(case[0])] = extra_megabytes(work, case)
                write_json(kept, found)
    if not found["rates"]:
        print(json.dumps(found["extra_megabytes"], indent=1))  # only the memory is measured so far
        return
    figures = summary(found)
    write_json(RESULTS, figures)
    plot(figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
