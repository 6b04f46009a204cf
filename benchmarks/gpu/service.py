"""Measures the whole service where the wheel of Triton is installed, with labelmint's `pytorch` backend.

Rules of this file:
- The repository is what `labelmint export --format torchscript` writes. On a GPU its steps get KIND_GPU; that backend
  takes tensors through the host's memory, which the native one of NVIDIA's container does not.
- Requests go to Triton directly, in a closed loop, for a fixed time; seconds of a step are those that Triton counts.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gpu import arms, machine
from gpu.cases import cases_of

CALLERS = (1, 4)
SECONDS = {True: 0.5, False: 8.0}  # of each loop, by tiny
NAME = "measured"


def serve(device: torch.device, *, tiny: bool, seconds: float) -> dict[str, Any]:
    """Raises Unavailable without the wheel, and ModuleNotFoundError without what serves with it."""
    if machine.version_of("nvidia-pytriton") is None:
        raise arms.Unavailable("not installed: nvidia-pytriton")
    case = cases_of(tiny)[-1]
    with tempfile.TemporaryDirectory() as directory:
        export_repository_of(Path(directory), case.build())
        if device.type == "cuda":
            put_on_gpu(Path(directory))
        return {
            "case": case.name,
            "format": "torchscript",
            "device": device.type,
            "callers": asyncio.run(loops(Path(directory), min(SECONDS[tiny], seconds / 8))),
        }


def export_repository_of(repository: Path, weights: Any) -> None:
    from labelmint.export.repository import export_repository

    export_repository(repository, NAME, weights, file_format="torchscript", staged=False)


def put_on_gpu(repository: Path) -> None:
    """Give each step of the `pytorch` backend to the first GPU."""
    from labelmint.export.gpu_export import place_on_first_gpu
    from labelmint.triton.model_config import read_config, write_config

    for path in repository.glob("*/config.pbtxt"):
        config = read_config(path)
        if config.backend == "pytorch":
            place_on_first_gpu(config)
            write_config(path, config)


async def loops(repository: Path, seconds: float) -> dict[str, Any]:
    from direct import STEPS, Direct

    from labelmint.pipeline import serving

    found: dict[str, Any] = {}
    async with serving(repository, NAME) as (client, model):
        direct = Direct(client.url, model)
        await direct.infer([0])
        for callers in CALLERS:
            before, started = await direct.step_seconds(), time.monotonic()
            counts = await asyncio.gather(*(loop(direct, started + seconds, caller) for caller in range(callers)))
            spent, after = time.monotonic() - started, await direct.step_seconds()
            found[str(callers)] = {
                "samples_per_second": sum(counts) / spent,
                "step_seconds": {
                    step: (end - begin) / sum(counts) for step, begin, end in zip(STEPS, before, after, strict=True)
                },
            }
        await direct.close()
    return found


async def loop(direct: Any, ends: float, caller: int) -> int:
    count = 0
    while time.monotonic() < ends or count == 0:
        await direct.infer([1000 * caller + count])
        count += 1
    return count
