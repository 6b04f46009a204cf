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
# The interpreter takes as long for a small tile as for a large one.
LARGE_TILE = (16, 16, 64, 8, 1, 32)


@cache
def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin)


def label(
    weights: Mapping[str, np.ndarray],
    samples: Sequence[Sequence[np.ndarray]],
    precision: str = "float32",
    *,
    tile: tuple[int, ...] | None = LARGE_TILE,
) -> list[Arrays]:
    """Label samples, given as the features of each level. Without a tile, the committed one is taken."""
    return _pool().submit(_label, dict(weights), [list(sample) for sample in samples], precision, tile).result()


def _begin() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)


def _label(
    weights: Arrays, samples: list[list[np.ndarray]], precision: str, tile: tuple[int, ...] | None
) -> list[Arrays]:
    import torch

    from labelmint.gpu.interpreter import GpuInterpreter, Tile

    kernel = GpuInterpreter(weights, precision=precision, device="cpu", tile=Tile(*tile) if tile else None)
    answers = (kernel.run([torch.from_numpy(array) for array in sample]) for sample in samples)
    return [{name: tensor.numpy() for name, tensor in answer.items()} for answer in answers]
