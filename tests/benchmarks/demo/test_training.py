"""The script that fits the generator, on a small network: all phases, interrupted and resumed."""

import dataclasses
import signal
from pathlib import Path

import pytest
import torch
from demo import faces, train_generator
from demo.train_generator import Phase, Run, export, train

from labelmint.core.errors import UnusableFile
from labelmint.models.resuming import Checkpoint
from labelmint.models.store import load_generator, read_notes

pytestmark = pytest.mark.torch

SPEC = dataclasses.replace(
    train_generator.SPEC, w_dim=16, mapping_layers=2, resolution=32, channels={4: 8, 8: 8, 16: 8, 32: 8}
)
# The discriminator's R1 is computed in the steps 8 and 16; the learning rate falls in each phase.
PHASES = (
    Phase(16, 16, 3e-3, 1e-3, 4),
    Phase(32, 8, 3e-3, 1e-3, 4),
    Phase(32, 44, 1e-3, 1e-4, 4, pull=0.5),
    Phase(32, 8, 1e-3, 1e-4, 4, contrast=1.0),
)
STEPS = sum(phase.images // phase.batch for phase in PHASES)


def trained(path: Path, phases: tuple[Phase, ...] = PHASES) -> Run:
    """Train as `main` does, from the checkpoint at `path` if there is one."""
    run = Run(phases, SPEC, mapping_steps=3)
    checkpoint = Checkpoint(path, run.inputs)
    if (state := checkpoint.load()) is not None:
        run.load(state)
    train(run, checkpoint, compiled=False)
    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("undisturbed") / "checkpoint.pt")


@pytest.mark.parametrize("last", [2, 4, 9])  # within a phase, at its end, and in the middle of the adversarial one
def test_an_interrupted_run_ends_with_the_same_weights(
    tmp_path: Path, undisturbed: Run, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    step = train_generator._step

    def interrupted(run: Run, *arguments: object) -> float:
        if run.step == last - 1:
            signal.raise_signal(signal.SIGINT)  # Python turns it into an exception that a test can catch
        return step(run, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(train_generator, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "checkpoint.pt")
    monkeypatch.undo()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]["step"] == last
    resumed = trained(tmp_path / "checkpoint.pt")
    assert resumed.step == undisturbed.step == STEPS
    export(undisturbed, tmp_path / "undisturbed.safetensors")
    export(resumed, tmp_path / "resumed.safetensors")
    assert (tmp_path / "resumed.safetensors").read_bytes() == (tmp_path / "undisturbed.safetensors").read_bytes()


def test_the_weights_say_how_they_were_made(tmp_path: Path, undisturbed: Run) -> None:
    export(undisturbed, tmp_path / "generator.safetensors")
    notes = read_notes(tmp_path / "generator.safetensors")
    assert notes["steps"] == STEPS and notes["finished_phases"] == len(PHASES)
    assert [Phase(**phase) for phase in notes["phases"]] == list(PHASES)
    generator = load_generator(tmp_path / "generator.safetensors")
    latents = torch.randn(10_000, faces.Z_DIM, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(generator.mapping.w_avg, generator.mapping(latents).mean(dim=0))


def test_a_checkpoint_of_other_phases_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labelmint.models.resuming.CHECKPOINT_SECONDS", 0.0)
    trained(tmp_path / "checkpoint.pt", PHASES[:1])
    with pytest.raises(UnusableFile, match="a run with other phases;"):
        trained(tmp_path / "checkpoint.pt")


def test_the_discriminator_cannot_outweigh_the_regression() -> None:
    """Its gradient at the images has the length that the phase allows, and a new one starts with none."""
    run, phase = Run(PHASES, SPEC), PHASES[2]
    rng = torch.Generator().manual_seed(3)
    image, target, regression = (torch.randn(4, 3, 32, 32, generator=rng) for _ in range(3))
    for images in (0, 2, phase.images // 2):
        run.images = images
        share = min(1.0, images / (0.1 * phase.images))
        pull = train_generator._pull(run, phase, image, target=target, other=1e-3 * regression)
        wanted = share * phase.pull * 1e-3 * regression.norm()
        torch.testing.assert_close(pull.norm(), wanted, rtol=1e-4, atol=1e-9)


def test_the_discriminator_learns_to_tell_blurred_images() -> None:
    """And then its pull makes a blurred image sharper, not smoother."""
    rng = torch.Generator().manual_seed(5)
    sharp = faces.render(torch.randn(8, faces.Z_DIM, generator=rng), resolution=32).image
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(sharp, (1, 1, 1, 1), mode="replicate"), 3, 1)
    run = Run(PHASES, SPEC)
    for step in range(60):
        run.critic.learn(blurred, sharp, step=step)
    against = -run.critic.pull(blurred, sharp)
    assert float((against * (sharp - blurred)).sum()) > 0.0


def test_the_contrast_tells_a_blurred_edge_from_a_moved_one() -> None:
    """Which the regression does not: it prefers the blurred one."""
    rng = torch.Generator().manual_seed(6)
    exact = faces.render(torch.randn(8, faces.Z_DIM, generator=rng)).image
    moved = exact.roll(1, dims=-1)
    blurred = (exact.roll(1, dims=-1) + exact + exact.roll(-1, dims=-1)) / 3.0
    weight = torch.ones(8, 1, 128, 128)
    for loss, prefers_blur in ((train_generator.regression_loss, True), (train_generator.contrast_loss, False)):
        losses = [float(loss(image, exact, weight)) for image in (moved, blurred)]
        assert (losses[1] < losses[0]) == prefers_blur, loss.__name__
    assert float(train_generator.contrast_loss(exact, exact, weight)) == 0.0


def test_the_latents_of_a_step_do_not_depend_on_what_ran_before() -> None:
    run = Run(PHASES, SPEC)
    run.step = 7
    torch.manual_seed(99)
    z, style_z = train_generator._latents(run, 8, mixed=True)
    again, style_again = train_generator._latents(run, 8, mixed=True)
    assert torch.equal(z, again) and torch.equal(style_z, style_again)
    assert torch.equal(z[:4], style_z[:4]) and not torch.equal(z[4:], style_z[4:])
    run.step = 8
    assert not torch.equal(train_generator._latents(run, 8, mixed=True)[0], z)
