"""Exports the steps of a case as TorchScript and ONNX, as `labelmint export` does.

Rules of this file:
- It runs beside the measurement's preparation, so that a slow export delays no arm but its own.
- A file appears complete, by a rename. If an export fails, a file beside it says why.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from gpu.cases import case_named
from labelmint.export.modules import GeneratorStep, Step, StyleInterpreterStep


def torchscript(step: Step) -> bytes:
    from labelmint.export.torchscript_export import trace

    return trace(step)


def onnx(step: Step) -> bytes:
    from labelmint.export.onnx_export import export_onnx

    return export_onnx(step).data


KINDS: Mapping[str, Callable[[Step], bytes]] = {"pt": torchscript, "onnx": onnx}


def main() -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # the other half launches kernels
    case, directory = case_named(sys.argv[1]), Path(sys.argv[2])
    generator, interpreter = case.build()
    steps = {"interpreter": StyleInterpreterStep(interpreter), "generator": GeneratorStep(generator, interpreter)}
    for kind, export in KINDS.items():
        for part, step in steps.items():
            path = directory / f"{part}.{kind}"
            aside = path.with_name(path.name + ".part")
            try:
                aside.write_bytes(export(step))
                os.replace(aside, path)
            except ModuleNotFoundError as error:
                write_failure(path, f"not installed: {error.name}")
            except Exception as error:
                write_failure(path, f"failed: {type(error).__name__}: {str(error).splitlines()[:1]}")


def write_failure(path: Path, why: str) -> None:
    aside = path.with_name(path.name + ".why")
    aside.write_text(why)
    os.replace(aside, path.with_name(path.name + ".failed"))


if __name__ == "__main__":
    main()
