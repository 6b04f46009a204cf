"""Fitting: what the heads learn, what the pool holds, and that a run can be repeated."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from labelmint.core.errors import UnusableFile
from labelmint.models import keypoints
from labelmint.models.annotations import (
    UNDRAWN,
    AnnotatedDataset,
    LabelClasses,
    image_path,
    read_masks,
    write_keypoints,
    write_masks,
)
from labelmint.models.draw import draw, synthesize
from labelmint.models.fit import _Heads, _Run, fit, fit_files
from labelmint.models.generator import Generator
from labelmint.models.interpreter import sample_features
from labelmint.models.pixels import FitSettings, Pool, choose_pixels, draw_pool
from labelmint.models.store import load_interpreter, save_generator
from labelmint.models.stylegan2 import StyleGAN2Spec
from tests.support.interpreters import SPEC as INTERPRETER_SPEC
from tests.support.interpreters import upsampled

pytestmark = [pytest.mark.triton, pytest.mark.torch]


SPEC = StyleGAN2Spec(z_dim=8, w_dim=8, mapping_layers=2, resolution=32, channels={4: 8, 8: 8, 16: 8, 32: 8})
SETTINGS = FitSettings(pixels_per_image=512, steps=300, batch=64)
CLASSES = LabelClasses(("dark", "bright"), ((0, 0, 0), (255, 255, 255)))


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(0)
    return Generator(SPEC).eval()


def bright(generator: Generator, seed: int) -> np.ndarray:
    """A label that is written in the image: is it bright?"""
    gray = draw(generator, seed, 1.0, layout="paper")[0][0].mean(dim=0)
    return (gray > 0.0).numpy().astype(np.uint8)


@pytest.fixture(scope="module")
def dataset(generator: Generator) -> AnnotatedDataset:
    masks = {seed: bright(generator, seed) for seed in range(32)}
    return AnnotatedDataset("segmentation", 1.0, CLASSES.names, CLASSES.palette, {}, masks)


def test_learns_what_the_features_say(generator: Generator, dataset: AnnotatedDataset) -> None:
    interpreter, error = fit(generator, dataset, SETTINGS, layout="paper", heads=3)
    assert error < 0.1
    right = []
    for seed in range(100, 110):
        with torch.no_grad():
            label, js_map, _ = interpreter(draw(generator, seed, 1.0, layout="paper")[1])
        right.append((label[0].numpy() == bright(generator, seed)).mean())
        assert float(js_map.max()) <= np.log(2) + 1e-5
    assert np.mean(right) > 0.8  # a random generator's features; guessing gives about a half


def test_can_be_repeated_to_the_bit(generator: Generator, dataset: AnnotatedDataset) -> None:
    settings = FitSettings(pixels_per_image=256, steps=20, batch=32)
    first, _ = fit(generator, dataset, settings, layout="paper", heads=2)
    second, _ = fit(generator, dataset, settings, layout="paper", heads=2)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@torch.no_grad()
def test_folding_changes_nothing() -> None:
    rng = torch.Generator().manual_seed(0)
    network = _Heads(INTERPRETER_SPEC, rng)
    maps = {r: torch.randn(1, c, r, r, generator=rng) for r, c in INTERPRETER_SPEC.channels.items()}
    mean, deviation = torch.randn(36, generator=rng), torch.rand(36, generator=rng) + 0.5
    x = ((upsampled(maps)[0].float().flatten(1).t() - mean) / deviation).expand(5, -1, -1)  # [N,P,D]
    network.train()
    for _ in range(50):
        network(x)  # running statistics
    network.eval()
    logits = network(x)  # [N,P,K]
    interpreter = network.folded(mean, deviation)
    probability, _, votes = interpreter.heads(interpreter.aggregate(maps, range(32)))
    want = F.softmax(logits, dim=2).mean(dim=0).view(32, 32, 4).transpose(1, 2)  # [R,K,R]
    torch.testing.assert_close(probability[0], want, atol=2e-5, rtol=0)
    assert int(votes.sum()) == 5 * 32 * 32


def test_learns_where_a_keypoint_is(tmp_path: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A keypoint that stands in the features: where the generator's first feature at 32x32 is largest."""

    def feature(seed: int) -> torch.Tensor:
        return draw(generator, seed, 1.0, layout="paper")[1][32][0, 0]  # [R,R]

    def peak(seed: int) -> tuple[int, int]:
        flat = int(feature(seed).argmax())
        return flat % 32, flat // 32

    weights, annotations = tmp_path / "generator.safetensors", tmp_path / "annotations"
    save_generator(weights, generator, {})
    synthesize(weights, annotations, range(24), truncation_psi=1.0)
    points = {seed: np.array([[*peak(seed), 1]], np.float32) for seed in range(24)}
    points[3][0] = 0  # absent: nothing to see there
    write_keypoints(annotations, ("peak",), ((255, 0, 0),), keypoints=points | {3: np.zeros((1, 3), np.float32)})
    fit_files(
        weights,
        annotations,
        tmp_path / "out.safetensors",
        layout="paper",
        heads=3,
        task="keypoints",
        annotation_format="csv",
    )
    interpreter = load_interpreter(tmp_path / "out.safetensors")
    assert interpreter.spec.task == "keypoints" and interpreter.spec.class_names == ("peak",)
    above = []
    for seed in range(100, 120):
        with torch.no_grad():
            found, *_ = interpreter(draw(generator, seed, 1.0, layout="paper")[1])
        x, y = found[0, 0].int().tolist()
        above.append(float((feature(seed) > feature(seed)[y, x]).float().mean()))
    # That it is the largest of all no pixel can know; that it is among the large ones each can. Guessing gives a half.
    assert np.median(above) <= 0.15


def test_pixels_near_a_keypoint_are_all_drawn() -> None:
    region = keypoints.regions(np.array([[8, 8, 1], [0, 0, 0]], "f4"), 32)
    near = region == 1
    assert 5 <= int(near.sum()) <= 25 and int(region.max()) == 1  # three deviations of half a pixel; none of the absent
    chosen = choose_pixels(region, 64, 0.0, rng=torch.Generator().manual_seed(0))
    assert int(near[chosen].sum()) == int(near.sum())


def test_every_class_of_an_image_is_drawn() -> None:
    label = torch.zeros(64 * 64, dtype=torch.long)
    label[100] = 1  # a region of one pixel
    label[200:240] = 2
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        chosen = choose_pixels(label, 16, 0.5, rng=rng)
        assert len(chosen.unique()) == 16
        assert set(label[chosen].tolist()) == {0, 1, 2}


def sparse(mask: np.ndarray, share: float = 0.1) -> np.ndarray:
    """A mask of which only a share of the pixels is drawn, and at least one of each class."""
    rng = np.random.default_rng(0)
    keep = rng.random(mask.shape) < share
    for number in np.unique(mask):
        keep[tuple(rng.choice(np.argwhere(mask == number)))] = True
    return np.where(keep, mask, UNDRAWN).astype(np.uint8)


def pool_of(generator: Generator, masks: dict[int, np.ndarray], settings: FitSettings = SETTINGS) -> Pool:
    dataset = AnnotatedDataset("segmentation", 1.0, CLASSES.names, CLASSES.palette, {}, masks)
    return draw_pool(generator, dataset, settings, layout="paper", rng=torch.Generator().manual_seed(0))[0]


def test_only_drawn_pixels_are_sampled_and_every_class_of_each_image(generator: Generator) -> None:
    """One image drawn whole, one in part, one with a pixel of each class: each gives the pixels that it has."""
    full, part, two = (bright(generator, seed) for seed in range(3))
    masks = {0: full, 1: sparse(part), 2: sparse(two, 0.0)}
    drawn = int((masks[1] != UNDRAWN).sum())
    pool = pool_of(generator, masks)
    assert 50 < drawn < 200 and len(pool.features) == len(pool.targets) == 512 + drawn + 2
    assert set(pool.targets.tolist()) == {0, 1} and sorted(pool.targets[-2:].tolist()) == [0, 1]
    rows, columns = (torch.from_numpy(index) for index in np.nonzero(masks[1] != UNDRAWN))
    maps = {r: x[0] for r, x in draw(generator, 1, 1.0, layout="paper")[1].items()}
    want = sample_features(maps, rows, columns, resolution=32)
    assert torch.equal(pool.features[512:-2], want)
    assert pool.targets[512:-2].tolist() == masks[1][masks[1] != UNDRAWN].tolist()


def test_every_class_is_sampled_of_an_image_with_more_pixels_than_are_wanted(generator: Generator) -> None:
    mask = np.full((32, 32), UNDRAWN, np.uint8)
    mask[8:24] = 0
    mask[16, 16] = 1
    pool = pool_of(generator, {0: mask}, FitSettings(pixels_per_image=16))
    assert sorted(pool.targets.tolist()) == [0] * 15 + [1]


def test_full_masks_are_sampled_as_they_were_before_masks_could_be_sparse(generator: Generator) -> None:
    masks = {seed: bright(generator, seed) for seed in range(3)}
    rng, features, targets = torch.Generator().manual_seed(0), [], []
    for seed, mask in masks.items():
        label = torch.from_numpy(mask.astype(np.int64)).flatten()
        chosen = choose_pixels(label, 512, 0.5, rng=rng)
        maps = {r: x[0] for r, x in draw(generator, seed, 1.0, layout="paper")[1].items()}
        features.append(sample_features(maps, chosen // 32, chosen % 32, resolution=32))
        targets.append(label[chosen])
    pool = pool_of(generator, masks)
    assert torch.equal(pool.features, torch.cat(features)) and torch.equal(pool.targets, torch.cat(targets))


def test_learns_from_a_tenth_of_the_pixels(generator: Generator, dataset: AnnotatedDataset) -> None:
    """Sparse and full masks together; a pixel that nobody drew teaches nothing, not even a class of its own."""
    masks = {seed: sparse(mask) if seed % 4 else mask for seed, mask in dataset.labels.items()}
    interpreter, error = fit(generator, replace(dataset, labels=masks), SETTINGS, layout="paper", heads=3)
    assert interpreter.spec.num_classes == 2 and error < 0.1
    right = []
    for seed in range(100, 110):
        with torch.no_grad():
            label = interpreter(draw(generator, seed, 1.0, layout="paper")[1])[0]
        right.append((label[0].numpy() == bright(generator, seed)).mean())
    assert np.mean(right) > 0.8


def test_masks_of_another_generator_are_refused(tmp_path: Path, generator: Generator) -> None:
    weights, annotations = tmp_path / "generator.safetensors", tmp_path / "annotations"
    save_generator(weights, generator, {})
    synthesize(weights, annotations, range(2), truncation_psi=1.0)
    write_masks(annotations, CLASSES, {seed: bright(generator, seed) for seed in range(2)})
    assert list(read_masks(annotations).images) == [0, 1]
    image_path(annotations, 1).write_bytes(image_path(annotations, 0).read_bytes())
    with pytest.raises(UnusableFile, match=r"0000000001.png is not the image that .* makes for seed 1"):
        fit_files(weights, annotations, tmp_path / "out.safetensors", layout="paper", heads=2)
    assert not (tmp_path / "out.safetensors").exists()


def test_named_seeds_are_those_that_are_drawn(
    tmp_path: Path, generator: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "generator.safetensors"
    save_generator(weights, generator, {})
    synthesize(weights, tmp_path / "named", [19, 7], truncation_psi=1.0)
    assert "2 images of seeds 19, 7, ready" in capsys.readouterr().out
    synthesize(weights, tmp_path / "range", range(7, 20), truncation_psi=1.0)
    assert sorted(int(path.stem) for path in (tmp_path / "named" / "images").iterdir()) == [7, 19]
    for seed in (7, 19):
        assert image_path(tmp_path / "named", seed).read_bytes() == image_path(tmp_path / "range", seed).read_bytes()


@pytest.fixture
def files(tmp_path: Path, generator: Generator) -> tuple[Path, Path]:
    """A generator's weights and four annotated images of it."""
    weights, annotations = tmp_path / "generator.safetensors", tmp_path / "annotations"
    save_generator(weights, generator, {})
    synthesize(weights, annotations, range(4), truncation_psi=1.0)
    write_masks(annotations, CLASSES, {seed: bright(generator, seed) for seed in range(4)})
    return weights, annotations


def test_from_files_to_file(tmp_path: Path, files: tuple[Path, Path]) -> None:
    fit_files(*files, tmp_path / "out.safetensors", layout="paper", heads=2, steps=20)
    loaded = load_interpreter(tmp_path / "out.safetensors")
    assert loaded.spec.class_names == CLASSES.names and loaded.spec.num_heads == 2


# Runs `labelmint fit` with a checkpoint after each step; a signal comes as the third one is about to be renamed.
KILLED_AT_THE_THIRD = """
import os, signal, sys
from labelmint import cli
from labelmint.models import resuming

resuming.CHECKPOINT_SECONDS = 0.0
replace, checkpoints, number = os.replace, [], getattr(signal, sys.argv.pop())

def replaced(aside, path):
    if path.name.endswith(".checkpoint"):
        checkpoints.append(path)
        if len(checkpoints) == 3:
            os.kill(os.getpid(), number)
    replace(aside, path)

os.replace = replaced
cli.main()
"""


def test_a_run_that_was_killed_ends_in_the_same_bytes(
    tmp_path: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a write, terminated, interrupted, and run again: as if nothing had happened."""
    weights, annotations = files
    advance = _Run.advance
    undisturbed, out = tmp_path / "undisturbed.safetensors", tmp_path / "out.safetensors"
    fit_files(weights, annotations, undisturbed, layout="paper", heads=2, steps=12)
    options = ["fit", "--generator", weights, "--annotations", annotations, "--heads", "2", "--steps", "12", out]
    checkpoint, steps = out.with_name("out.safetensors.checkpoint"), []
    # Another number of threads adds in another order, and other tests may have changed this process's.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for name, status in (("SIGKILL", -9), ("SIGTERM", -15)):
        command = [sys.executable, "-c", KILLED_AT_THE_THIRD, *options, name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
        assert ("the same command goes on" in done.stderr) == (name == "SIGTERM"), done.stderr
        steps.append(torch.load(checkpoint, weights_only=True)["state"]["step"])
    monkeypatch.setattr(_Run, "advance", lambda run, pool: signal.raise_signal(signal.SIGINT) or advance(run, pool))
    with pytest.raises(KeyboardInterrupt):
        fit_files(weights, annotations, out, layout="paper", heads=2, steps=12)
    monkeypatch.setattr(_Run, "advance", advance)
    steps.append(torch.load(checkpoint, weights_only=True)["state"]["step"])
    assert steps == [2, 5, 6] and not out.exists()  # a signal that may wait does so until a whole step is kept
    fit_files(weights, annotations, out, layout="paper", heads=2, steps=12)
    assert out.read_bytes() == undisturbed.read_bytes()
    assert not checkpoint.exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, files: tuple[Path, Path], generator: Generator) -> None:
    weights, annotations = files
    out = tmp_path / "out.safetensors"
    checkpoint = out.with_name("out.safetensors.checkpoint")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("labelmint.models.resuming.CHECKPOINT_SECONDS", 0.0)
        patch.setattr("labelmint.models.fit.save_interpreter", full)
        with pytest.raises(OSError):
            fit_files(weights, annotations, out, layout="paper", heads=2, steps=3)
    kept = checkpoint.read_bytes()
    with pytest.raises(UnusableFile, match="is from a run with other options; repeat that run, or remove it"):
        fit_files(weights, annotations, out, layout="paper", heads=2, steps=4)
    write_masks(annotations, CLASSES, {seed: 1 - bright(generator, seed) for seed in range(4)})
    with pytest.raises(UnusableFile, match="a run with other annotations;"):
        fit_files(weights, annotations, out, layout="paper", heads=2, steps=3)
    with pytest.raises(UnusableFile, match="a run with other annotations and other options;"):
        fit_files(weights, annotations, out, layout="paper", heads=3, steps=3)
    assert checkpoint.read_bytes() == kept
    checkpoint.write_bytes(kept[:100])
    with pytest.raises(UnusableFile, match="is not a complete checkpoint; remove it to start again"):
        fit_files(weights, annotations, out, layout="paper", heads=2, steps=3)
