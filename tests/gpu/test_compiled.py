"""The kernel for GPUs, compiled without a GPU: registers, memory, tensor cores, and the costs of its tiling."""

import pytest

from labelmint.gpu.costs import ARCHITECTURES, TENSOR_COLUMNS, compiled, costs, resources
from labelmint.gpu.interpreter import PRECISIONS, SHARED_BYTES, Shape, Tile, shared_bytes, tile_of
from labelmint.models.interpreter import hidden_widths

pytestmark = pytest.mark.torch

# StyleGAN2's own channels (config F), as the layout "paper" takes them.
CHANNELS = {4: 512, 8: 1024, 16: 1024, 32: 1024, 64: 1024, 128: 512, 256: 256, 512: 128, 1024: 64}


def shape_of(resolution: int, classes: int, keypoints: bool = False) -> Shape:
    channels = {r: c for r, c in CHANNELS.items() if r <= resolution}
    return Shape(channels, 10, hidden_widths(classes), classes, keypoints)


def check(shape: Shape, precision: str, architecture: int) -> None:
    found = resources(shape, precision, architecture)
    assert found.spilled_bytes == 0, found
    # A kernel that needs more tensor memory than there is compiles to a trap, without an error.
    assert found.tensor_columns <= TENSOR_COLUMNS and found.tensor_core_instructions >= 20, found
    assert found.shared_bytes <= SHARED_BYTES[architecture] and found.programs >= 1, found
    assert found.shared_bytes <= shared_bytes(shape, precision, found.tile) + 1024, "the estimate chooses the tile"


@pytest.mark.parametrize("precision", ["float16", "tf32"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_register_is_spilled_where_it_matters_most(architecture: int, precision: str) -> None:
    check(shape_of(1024, 20), precision, architecture)


@pytest.mark.minutes
@pytest.mark.parametrize("resolution", [256, 512, 1024])
@pytest.mark.parametrize("classes", [20, 34])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_register_is_spilled(architecture: int, precision: str, classes: int, resolution: int) -> None:
    check(shape_of(resolution, classes), precision, architecture)


@pytest.mark.minutes
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_register_is_spilled_for_keypoints(architecture: int) -> None:
    check(shape_of(1024, 20, keypoints=True), "float16", architecture)


def test_every_product_runs_on_tensor_cores() -> None:
    """No precision multiplies matrices with ordinary instructions, which would be thousands."""
    shape, kinds = shape_of(1024, 20), {"float16": ".f16", "bfloat16": ".bf16", "tf32": ".tf32", "float32": ".tf32"}
    for precision, kind in kinds.items():
        ptx = compiled(shape, tile_of(shape, precision, 80), precision, 80).asm["ptx"]
        products = [line for line in ptx.splitlines() if "mma.sync" in line]
        assert products and all(f".f32{kind}{kind}.f32" in line for line in products), precision
        assert sum("fma.rn" in line for line in ptx.splitlines()) < 1000, precision


@pytest.mark.parametrize("classes", [20, 34])
def test_costs_are_those_of_the_tiling(classes: int) -> None:
    """A larger tile reads weights less often and multiplies by no less; half precision reads fewer bytes."""
    shape = shape_of(1024, classes)
    small, large = (costs(shape, Tile(rows, 16, 64, 8, 1, 32), "float16") for rows in (8, 16))
    assert large.bytes_read < 0.8 * small.bytes_read
    assert large.operations == small.operations, "both touch at most 64 points"
    wide = costs(shape, Tile(8, 16, 64, 8, 1, 32), "tf32")
    assert 0.5 * wide.bytes_read < small.bytes_read < 0.9 * wide.bytes_read
    necessary = 2 * 1024**2 * (64 + 128) * shape.heads * shape.hidden[0]
    assert necessary < small.operations < 2.5 * necessary
    assert small.least_bytes < small.bytes_read + small.bytes_written


def test_a_tile_fits_the_gpu_or_the_interpreter_is_refused() -> None:
    shape = shape_of(1024, 20)
    assert tile_of(shape, "float16", 86).pixels < tile_of(shape, "float16", 80).pixels, "it has less shared memory"
    assert tile_of(shape, "float16", 89) == tile_of(shape, "float16", 120) == tile_of(shape, "float16", 86)
    deep = Shape({4: 8, 8: 8, 16: 5000}, 10, (128, 32), 20)
    with pytest.raises(ValueError, match="level 16 has 5000 channels, too many for the shared memory"):
        tile_of(deep, "tf32", 90)
