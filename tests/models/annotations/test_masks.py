"""The directory of `synth` and its masks as PNG: what is missing or wrong is named."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from labelmint.core.errors import UnusableFile
from labelmint.models.annotations import (
    UNDRAWN,
    LabelClasses,
    image_path,
    mask_path,
    read_masks,
    write_dataset,
    write_masks,
)
from tests.torture.files import png

pytestmark = pytest.mark.torch


CLASSES = LabelClasses(("background", "thing"), ((0, 0, 0), (255, 255, 255)))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    images = {seed: rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for seed in (3, 12)}
    write_dataset(tmp_path, "0" * 64, 0.7, images=images)
    write_masks(tmp_path, CLASSES, {seed: (image[..., 0] > 128).astype(np.uint8) for seed, image in images.items()})
    return tmp_path


def test_round_trip(directory: Path) -> None:
    dataset = read_masks(directory)
    assert dataset.truncation_psi == 0.7 and (dataset.names, dataset.palette) == (CLASSES.names, CLASSES.palette)
    assert list(dataset.images) == [3, 12]
    np.testing.assert_array_equal(dataset.labels[3], (dataset.images[3][..., 0] > 128).astype(np.uint8))


def test_a_mask_of_gray_values_is_read_as_ids(directory: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.uint8)).save(mask_path(directory, 3))
    assert read_masks(directory).labels[3].tolist() == np.ones((8, 8)).tolist()


def test_images_are_never_written_beside_old_masks(directory: Path) -> None:
    with pytest.raises(UnusableFile, match="exists and is not empty"):
        write_dataset(directory, "0" * 64, 1.0, images={})


def test_missing_mask_is_named(directory: Path) -> None:
    mask_path(directory, 12).unlink()
    with pytest.raises(UnusableFile, match=r"masks/0000000012.png does not exist"):
        read_masks(directory)


def test_mask_of_another_size_is_named(directory: Path) -> None:
    Image.fromarray(np.zeros((4, 8), np.uint8)).save(mask_path(directory, 3))
    with pytest.raises(UnusableFile, match=r"0000000003.png is 8x4 pixels, but its image has 8x8"):
        read_masks(directory)


def test_mask_with_an_unknown_class_is_named(directory: Path) -> None:
    Image.fromarray(np.full((8, 8), 2, np.uint8)).save(mask_path(directory, 3))
    with pytest.raises(UnusableFile, match="has class id 2; classes.json names 2 classes"):
        read_masks(directory)


def test_colour_mask_is_refused(directory: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(mask_path(directory, 3))
    with pytest.raises(UnusableFile, match="is a RGB image; a mask has one channel"):
        read_masks(directory)


def test_truncated_image_is_named(directory: Path) -> None:
    path = image_path(directory, 3)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UnusableFile, match=r"images/0000000003.png is not a whole image"):
        read_masks(directory)


def test_a_mask_without_an_image_is_named(directory: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(mask_path(directory, 4))
    with pytest.raises(UnusableFile, match=r"masks/0000000004.png belongs to no image of dataset.json"):
        read_masks(directory)


def test_missing_image_is_named(directory: Path) -> None:
    image_path(directory, 3).unlink()
    with pytest.raises(UnusableFile, match=r"images/0000000003.png does not exist; dataset.json lists it"):
        read_masks(directory)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "Invalid JSON: EOF"),
        ("[" * 100_000, "Invalid JSON: recursion limit"),
        ("[]", "Input should be an object"),
        ('{"truncation_psi": 1.0, "seeds": []}', "seeds: List should have at least 1 item"),
        ('{"truncation_psi": 1.0, "seeds": ["1"]}', "seeds.0: Input should be a valid integer"),
        ('{"truncation_psi": 1.0, "seeds": [4294967296]}', "seeds.0: Input should be less than 4294967296"),
        ('{"truncation_psi": NaN, "seeds": [1]}', "truncation_psi: Input should be a finite number"),
        ('{"seeds": [1]}', "truncation_psi: Field required"),
    ],
)
def test_bad_dataset_file_is_named(directory: Path, content: str, problem: str) -> None:
    (directory / "dataset.json").write_text(content)
    with pytest.raises(UnusableFile, match=f"dataset.json cannot be read: {problem}.*; write .* `labelmint synth`"):
        read_masks(directory)


def test_missing_classes_say_what_to_write(directory: Path) -> None:
    (directory / "classes.json").unlink()
    with pytest.raises(UnusableFile, match='list the classes as .*"name": "background"'):
        read_masks(directory)


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([{"name": "a"}], "0.rgb: Field required"),
        ([{"name": "a", "rgb": [0, 0, 256]}], "0.rgb.2: Input should be less than or equal to 255"),
        ([{"name": "a", "rgb": [0, 0, 0]}] * 2, "names 'a' twice"),
    ],
)
def test_bad_classes_are_named(directory: Path, entries: object, problem: str) -> None:
    (directory / "classes.json").write_text(json.dumps(entries))
    with pytest.raises(UnusableFile, match=f"classes.json .*{problem}"):
        read_masks(directory)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "JPEG", "BMP"])
def test_only_png_is_read_whatever_the_name_says(directory: Path, kind: str) -> None:
    """Pillow would start another program for some of the formats that it knows."""
    path = next((directory / "masks").glob("*.png"))
    Image.open(path).convert("L").save(path, kind)
    with pytest.raises(UnusableFile, match="is not a whole image"):
        read_masks(directory)


def test_declared_pixels_are_bounded(directory: Path) -> None:
    path = next((directory / "masks").glob("*.png"))
    path.write_bytes(png(13000, 13000))
    with pytest.raises(UnusableFile, match="declares 13000x13000 pixels"):
        read_masks(directory)


def gray_png(values: np.ndarray, depth: int) -> bytes:
    """A gray PNG whose pixels [8,8] have that many bits."""
    if depth == 16:
        rows = values.astype(">u2").tobytes()
    else:
        bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., -depth:]  # [8,8,depth]
        rows = np.packbits(bits.reshape(8, -1), axis=1).tobytes()
    length = len(rows) // 8
    lines = b"".join(b"\0" + rows[at : at + length] for at in range(0, len(rows), length))
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    ):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_gray_values_of_any_depth_are_class_ids(directory: Path, depth: int) -> None:
    """Pillow spreads values of 2 and 4 bits over 0 to 255: 1 and 2 of 4 bits would be 17 and 34, which exist here."""
    names = [{"name": f"class {number}", "rgb": [0, 0, number]} for number in range(40)]
    (directory / "classes.json").write_text(json.dumps(names))
    values = np.arange(64).reshape(8, 8) % min(2**depth, 40)
    mask_path(directory, 3).write_bytes(gray_png(values, depth))
    assert read_masks(directory).labels[3].tolist() == values.tolist()


def test_an_id_beyond_a_byte_is_no_smaller_one(directory: Path) -> None:
    mask_path(directory, 3).write_bytes(gray_png(np.full((8, 8), 256), 16))
    with pytest.raises(UnusableFile, match="has class id 256; classes.json names 2 classes"):
        read_masks(directory)


def test_pixels_that_nobody_drew_come_back(directory: Path) -> None:
    """Also with a palette of few colours, which Pillow would store in few bits."""
    sparse = np.full((8, 8), UNDRAWN, np.uint8)
    sparse[2, 1:3] = 0, 1
    full = read_masks(directory).labels[12]
    write_masks(directory, CLASSES, {3: sparse})
    labels = read_masks(directory).labels
    assert labels[3].tolist() == sparse.tolist()
    assert labels[12].tolist() == full.tolist(), "a full mask stays one beside a sparse one"


def test_an_image_without_a_drawn_pixel_is_named(directory: Path) -> None:
    write_masks(directory, CLASSES, {3: np.full((8, 8), UNDRAWN, np.uint8)})
    with pytest.raises(UnusableFile, match=r"0000000003.png has no drawn pixel, only 255; draw a part of its image"):
        read_masks(directory)


def test_a_class_that_nobody_drew_is_named(directory: Path) -> None:
    """White and black instead of 1 and 0 says the same: that no pixel is drawn as 1."""
    for seed in (3, 12):
        Image.fromarray(np.tile(np.array([0, 255], np.uint8), (8, 4))).save(mask_path(directory, seed))
    with pytest.raises(UnusableFile, match="classes.json names 'thing', which is drawn in no image; draw it in one"):
        read_masks(directory)


def test_who_drew_everything_saw_that_no_image_has_a_class(directory: Path) -> None:
    write_masks(directory, CLASSES, {seed: np.zeros((8, 8), np.uint8) for seed in (3, 12)})
    assert not any(label.any() for label in read_masks(directory).labels.values())


def test_an_id_between_the_classes_and_the_undrawn_is_refused(directory: Path) -> None:
    mask = np.full((8, 8), UNDRAWN, np.uint8)
    mask[0, 0] = 254
    Image.fromarray(mask).save(mask_path(directory, 3))
    with pytest.raises(UnusableFile, match="has class id 254; classes.json names 2 classes"):
        read_masks(directory)


@pytest.mark.parametrize("count", [255, 256])
def test_255_is_no_class(directory: Path, count: int) -> None:
    entries = [{"name": str(number), "rgb": [0, 0, number]} for number in range(count)]
    (directory / "classes.json").write_text(json.dumps(entries))
    if count == 255:
        assert len(read_masks(directory).names) == 255
    else:
        with pytest.raises(UnusableFile, match="classes.json cannot be read: List should have at most 255 items"):
            read_masks(directory)


@pytest.mark.parametrize("name", ["dataset.json", "classes.json"])
def test_a_byte_order_mark_is_no_content(directory: Path, name: str) -> None:
    path = directory / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_masks(directory).names == CLASSES.names


@pytest.mark.parametrize("renamed", ["cb0618f6-0000000003.png", "0000000003_png.rf.0f12ab9913e0d4c65a7b.png"])
def test_masks_that_a_tool_renamed_are_matched_by_their_seed(directory: Path, renamed: str) -> None:
    plain = mask_path(directory, 3)
    want = read_masks(directory).labels[3]
    plain.rename(plain.with_name(renamed))
    np.testing.assert_array_equal(read_masks(directory).labels[3], want)
    plain.write_bytes(plain.with_name(renamed).read_bytes())
    with pytest.raises(UnusableFile, match=f"(?=.*{renamed})(?=.*0000000003.png).* are both of seed 3; remove one"):
        read_masks(directory)


@pytest.mark.parametrize("name", ["3.png", "mask-1.png", "0000000003-0000000012.png", "a0000000003.png"])
def test_a_name_that_could_be_of_any_seed_says_which_is_needed(directory: Path, name: str) -> None:
    mask_path(directory, 3).rename(directory / "masks" / name)
    with pytest.raises(UnusableFile, match=f"{name} belongs to no image of dataset.json; .* name it SEED.png"):
        read_masks(directory)
