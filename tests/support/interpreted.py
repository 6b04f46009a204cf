"""Runs the GPU's kernel on the CPU, in Triton's interpreter, in a process of its own.

The environment must say so before triton is imported, and other tests compile the kernel in this process.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import numpy as np

Arrays = dict[str, np.ndarray]


@cache
def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin)


def label(
    weights: Mapping[str, np.ndarray],
    samples: Sequence[Sequence[np.ndarray]],
    precision: str = "float32",
    *,
    tile: tuple[int, ...] = (),
) -> list[Arrays]:
    """Label samples, given as the features of each level. `tile` replaces the committed tile."""
    return _pool().submit(_label, dict(weights), [list(sample) for sample in samples], precision, tile).result()


def _begin() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    torch.set_num_threads(1)
    multiply = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        # The interpreter keeps bfloat16 as uint16, and multiplies these integers.
        return multiply(self, *(_widened(x, tl) for x in (a, b)), *rest)

    InterpreterBuilder.create_dot = create_dot


def _widened(handle, tl):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return type(handle)((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _label(
    weights: Arrays, samples: list[list[np.ndarray]], precision: str, tile: tuple[int, ...]
) -> list[Arrays]:
    import torch

    from labelmint.gpu.interpreter import GpuInterpreter, Tile

    kernel = GpuInterpreter(weights, precision=precision, device="cpu", tile=Tile(*tile) if tile else None)
    answers = (kernel.run([torch.from_numpy(array) for array in sample]) for sample in samples)
    return [{name: tensor.numpy() for name, tensor in answer.items()} for answer in answers]
