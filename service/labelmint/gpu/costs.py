"""What the kernels for GPUs cost: operations and bytes from their own tiling, registers and memory from the compiler.

Rules of this file:
- Nothing here needs a GPU. The compiler of the Triton language writes code for one that is not there.
- Operations are those of the matrix products as the tensor cores run them: with the padding of channels, points and
  classes. A multiplication and an addition are two operations.
- Bytes are those that the programs of a kernel ask for. The second-level cache serves what several tiles ask for, so
  that the memory moves less: `Costs.least_bytes` counts every tensor once.
- Python must not run Triton's interpreter (TRITON_INTERPRET) when it compiles.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from labelmint.gpu.interpreter import (
    PRECISIONS,
    PROJECT_CHANNELS,
    SHARED_BYTES,
    Shape,
    Tile,
    _interpret,
    constants,
    points_of,
    projection_tile,
    sliced,
    tile_of,
)

ARCHITECTURES = {80: "A100", 90: "H100, H200", 100: "B200"}
# Of one multiprocessor, from the CUDA C++ programming guide, "Compute Capabilities": 32-bit registers, threads, and
# columns of tensor memory. CUDA itself takes 1 KiB of shared memory for each program.
REGISTERS, THREADS, TENSOR_COLUMNS = 65_536, 2048, 512
RESERVED_BYTES = 1 << 10
_BYTES = {"float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2}
_POINTERS = {"float32": "*fp32", "tf32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
_OPERANDS = ("points", "weight_full", "weight_half", "weight2", "weight3")
_OTHER_POINTERS = {"label": "*u8", "peak_pixel": "*i32"}  # the rest are float32
_TENSOR_CORES = re.compile(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma")


@dataclass(frozen=True)
class Costs:
    """The costs of one sample, over all kernels."""

    operations: int
    bytes_read: int
    bytes_written: int
    least_bytes: int
    launches: int


@dataclass(frozen=True)
class Resources:
    """What the compiler gave `_interpret`. `occupancy` is the share of a multiprocessor's threads that can run."""

    architecture: int
    precision: str
    shape: Shape
    tile: Tile
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_columns: int
    tensor_core_instructions: int

    @property
    def programs(self) -> int:
        """How many programs one multiprocessor runs at a time."""
        registers = -(-32 * self.registers // 256) * 256 * self.tile.warps  # warps get them in blocks of 256
        room = SHARED_BYTES[self.architecture] + RESERVED_BYTES
        limits = [REGISTERS // registers, room // (self.shared_bytes + RESERVED_BYTES)]
        limits.append(THREADS // (32 * self.tile.warps))
        if self.tensor_columns:
            limits.append(TENSOR_COLUMNS // self.tensor_columns)
        return min(limits)

    @property
    def occupancy(self) -> float:
        return self.programs * 32 * self.tile.warps / THREADS


def costs(shape: Shape, tile: Tile, precision: str) -> Costs:
    """Count the costs of one sample with this tile."""
    c, item = constants(shape, precision, tile), _BYTES[precision]
    pixels, units, base = shape.resolution**2, c["N"] * c["H1"], shape.base
    deep = c["C_PADDED"] + (c["C_HALF_PADDED"] if c["HALF"] else 0)
    layers = c["N"] * (c["H2"] * c["H1"] + c["K_PADDED"] * c["H2"])
    operations = 2 * pixels * ((deep + c["POINTS"]) * units + layers)

    tiles = pixels // tile.pixels
    halo = (tile.rows // 2 + 2) * (tile.columns // 2 + 2) * c["C_HALF"] if c["HALF"] else 0
    features = 4 * (tile.pixels * c["C"] + halo)
    weights = item * (deep * units + layers) + 4 * c["N"] * (c["H2"] + c["K_PADDED"])
    of_tile = features + weights + item * sum(points_of(shape, tile)) * units
    given = 4 * sum(channels * r * r for r, channels in shape.channels.items())
    points = item * ((base + 1) ** 2 + base**2) * units
    results = pixels * (8 if shape.keypoints else 9)  # two maps of uncertainty, and the label

    levels = [r for r in shape.channels if r <= base]
    below = [r for r in levels if r < base]
    projected = sum(4 * r * r * units for r in below)
    widened = sum(4 * (2 * r + 1) ** 2 * units for r in below if 2 * r < base)
    read = tiles * of_tile
    for r in levels:
        deep = sliced(shape.channels[r], PROJECT_CHANNELS)
        operations += 2 * r * r * deep * units
        block_pixels, block_units, *_ = projection_tile(r, precision)
        read += -(-units // block_units) * 4 * r * r * shape.channels[r]
        read += -(-(r * r) // block_pixels) * item * deep * units
    read += sum(8 * 4 * (2 * r + 1) ** 2 * units for r in below)  # four edges and four pixels for each new edge
    return Costs(
        operations=operations,
        bytes_read=read,
        bytes_written=projected + widened + points + results,
        least_bytes=given + 2 * (projected + widened + points) + weights + results,
        launches=len(levels) + len(below) + 1,
    )


def compiled(shape: Shape, tile: Tile, precision: str, architecture: int) -> Any:
    """Compile `_interpret` for an architecture (80, 90, 100), as it is compiled when it runs there."""
    given = constants(shape, precision, tile)
    names = list(_interpret.arg_names)
    signature = {
        name: "constexpr"
        if name in given
        else _POINTERS[precision]
        if name in _OPERANDS
        else _OTHER_POINTERS.get(name, "*fp32")
        for name in names
    }
    # torch aligns tensors to more than 16 bytes, which the compiler learns when the kernel runs.
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name not in given}
    source = ASTSource(_interpret, signature, {(names.index(name),): value for name, value in given.items()}, aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(shape: Shape, precision: str, architecture: int, tile: Tile | None = None) -> Resources:
    """Compile the kernel and read its resources from the machine code; by default with the committed tile."""
    tile = tile or tile_of(shape, precision, architecture)
    kernel = compiled(shape, tile, precision, architecture)
    registers, stack, local = _usage(kernel.asm["cubin"])
    return Resources(
        architecture=architecture,
        precision=precision,
        shape=shape,
        tile=tile,
        registers=registers,
        spilled_bytes=stack + local,
        shared_bytes=int(kernel.metadata.shared),
        tensor_columns=int(getattr(kernel.metadata, "tmem_size", 0) or 0),
        tensor_core_instructions=len(_TENSOR_CORES.findall(kernel.asm["ptx"])),
    )


def all_resources(shapes: Iterable[Shape]) -> list[Resources]:
    """Return the resources of every committed tile for these shapes."""
    return [
        resources(shape, precision, architecture)
        for architecture in ARCHITECTURES
        for precision in PRECISIONS
        for shape in shapes
    ]


def _usage(cubin: bytes) -> tuple[int, int, int]:
    """Return the registers of a thread, and the bytes of its stack and local memory, where registers are spilled."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing about registers: {said[-200:]}")
    return int(found[1]), int(found[2]), int(found[3])
