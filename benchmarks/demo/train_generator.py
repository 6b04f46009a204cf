"""Fits the demo generator to the procedural renderer by regression from z, progressively 16 -> 32 -> 64 -> 128.

Rules of this file:
- Every batch is new. Its latents come from a random generator that is seeded with the step number, so a resumed run
  uses the same latents as an uninterrupted run.
- The weight of a pixel is proportional to (area of its part) ** -0.6. With a plain L1 loss, eyes and brows vanish.
- Half of each batch mixes two latents at `CROSSOVER`. The target has the geometry of the first and the colours of the
  second. So the early layers learn shape, and the late layers learn appearance.
- The checkpoint has everything that a resumed run needs. It is written to a temporary file that is then renamed, so an
  interrupted run leaves no incomplete checkpoint.

Run it as `PYTHONPATH=benchmarks python -m demo.train_generator OUT`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from demo import faces
from labelmint.models.generator import Generator
from labelmint.models.resuming import load_state, save_state
from labelmint.models.store import save_generator
from labelmint.models.stylegan2 import StyleGAN2Spec

SPEC = StyleGAN2Spec(
    z_dim=faces.Z_DIM,
    w_dim=128,
    mapping_layers=4,
    mapping_lr_multiplier=1.0,  # regression needs an exact mapping; 0.01 would almost freeze it
    resolution=faces.RESOLUTION,
    channels={4: 128, 8: 128, 16: 128, 32: 96, 64: 48, 128: 32},
)
CROSSOVER = 7  # the first layer of the 64x64 block: earlier layers learn shape, later ones appearance
AREA_POWER = 0.6


@dataclass(frozen=True)
class Phase:
    resolution: int
    images: int
    learning_rate: float
    batch: int


PHASES = (
    Phase(16, 120_000, 3e-3, 64),
    Phase(32, 80_000, 3e-3, 16),
    Phase(64, 80_000, 2.5e-3, 16),
    Phase(128, 105_000, 2e-3, 16),
)
EMA_HALF_LIFE = 5_000  # images


def part_weights(label: Tensor) -> Tensor:
    """Compute pixel weights of mean 1, float32 [B,1,R,R], from exact masks uint8 [B,R,R]."""
    counts = torch.bincount(label.flatten().long(), minlength=len(faces.CLASS_NAMES)).clamp(min=1)  # [K]
    weight = (counts.float() / label.numel()).pow(-AREA_POWER)  # [K]
    per_pixel = weight[label.long()]  # [B,R,R]
    return (per_pixel / per_pixel.mean()).unsqueeze(1)


def loss_of(image: Tensor, target: Tensor, weight: Tensor, *, resolution: int) -> Tensor:
    """Weighted L1 and squared error, plus half the weighted L1 of neighbour differences, which keeps edges in place."""
    factor = target.shape[-1] // resolution
    if factor > 1:
        target = F.avg_pool2d(target, factor)
        weight = F.avg_pool2d(weight, factor)
    error = image - target  # [B,3,r,r]
    loss = (weight * (error.abs() + error.square())).mean()
    dx = (error[..., 1:] - error[..., :-1]).abs() * weight[..., 1:]
    dy = (error[..., 1:, :] - error[..., :-1, :]).abs() * weight[..., 1:, :]
    return loss + 0.5 * (dx.mean() + dy.mean())


class Run:
    """The state of a training run, which can be saved to a checkpoint and loaded from it."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.generator = Generator(SPEC).to(memory_format=torch.channels_last)
        self.ema = {k: v.detach().clone() for k, v in self.generator.state_dict().items()}
        mapping = list(self.generator.mapping.parameters())
        synthesis = list(self.generator.synthesis.parameters())
        self.optimizer = torch.optim.Adam([{"params": mapping}, {"params": synthesis}], betas=(0.9, 0.99))
        self.step = 0
        self.phase = 0
        self.images = 0  # in this phase

    def save(self, path: Path) -> None:
        state = {
            "generator": self.generator.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "phase": self.phase,
            "images": self.images,
        }
        save_state(path, state)

    def load(self, path: Path) -> None:
        state = load_state(path)
        self.generator.load_state_dict(state["generator"])
        self.ema = state["ema"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.phase, self.images = state["step"], state["phase"], state["images"]

    def update_ema(self, batch: int) -> None:
        # The half-life is short at first, so the average soon forgets the initial weights.
        decay = 0.5 ** (batch / min(EMA_HALF_LIFE, max(self.step * batch * 0.1, 1.0)))
        with torch.no_grad():
            for name, value in self.generator.state_dict().items():
                self.ema[name].lerp_(value, 1.0 - decay)


def train(run: Run, checkpoint: Path) -> None:
    """Train to the end of the last phase; save a checkpoint every two minutes and after each phase."""
    saved = time.monotonic()
    render = torch.compile(faces.render)
    while run.phase < len(PHASES):
        phase = PHASES[run.phase]
        synthesis = _compiled_synthesis(run.generator, phase.resolution)
        bar = tqdm(total=phase.images, initial=run.images, unit="img", desc=f"{phase.resolution}x{phase.resolution}")
        while run.images < phase.images:
            loss = _step(run, phase, render, synthesis=synthesis)
            bar.update(phase.batch)
            if run.step % 50 == 0:
                bar.set_postfix(loss=f"{loss:.4f}")
            if time.monotonic() - saved > 120:
                run.save(checkpoint)
                saved = time.monotonic()
        bar.close()
        run.phase += 1
        run.images = 0
        run.save(checkpoint)


def _learning_rate(run: Run, phase: Phase) -> float:
    """Warm-up, then constant. In the last phase, a cosine decays to 1/100 over the last three fifths."""
    warm = min(1.0, (run.images + phase.batch) / 2_000)
    if phase is not PHASES[-1]:
        return phase.learning_rate * warm
    position = max(run.images / phase.images - 0.4, 0.0) / 0.6
    return phase.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * position)))


def _step(
    run: Run, phase: Phase, render: Callable[..., faces.Faces], *, synthesis: Callable[[Tensor], Tensor]
) -> float:
    rate = _learning_rate(run, phase)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    rng = torch.Generator().manual_seed(1_000_000_007 + run.step)
    z = torch.randn(phase.batch, SPEC.z_dim, generator=rng)
    style_z = torch.randn(phase.batch, SPEC.z_dim, generator=rng)
    half = phase.batch // 2
    style_z[:half] = z[:half]
    with torch.no_grad():
        target = render(z, style_z)
        weight = part_weights(target.label)
    with torch.autocast("cpu", torch.bfloat16):
        w = run.generator.mapping(z)  # [B,w_dim]
        style_w = run.generator.mapping(style_z)
        late = torch.arange(SPEC.num_ws)[None, :, None] >= CROSSOVER
        ws = torch.where(late, style_w[:, None], w[:, None])  # [B,num_ws,w_dim]
        image = synthesis(ws)
    loss = loss_of(image.float(), target.image, weight, resolution=phase.resolution)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    run.optimizer.step()
    run.step += 1
    run.images += phase.batch
    run.update_ema(phase.batch)
    return float(loss.detach())


def _compiled_synthesis(generator: Generator, resolution: int) -> Callable[[Tensor], Tensor]:
    def synthesize(ws: Tensor) -> Tensor:
        return generator.synthesis(ws, None, resolution)[0]

    return torch.compile(synthesize)


def finished_generator(run: Run) -> Generator:
    """Return the averaged generator, with w_avg measured over 10,000 latents."""
    generator = Generator(SPEC)
    generator.load_state_dict(run.ema)
    generator.eval()
    with torch.no_grad():
        z = torch.randn(10_000, SPEC.z_dim, generator=torch.Generator().manual_seed(1))
        generator.mapping.w_avg.copy_(generator.mapping(z).mean(dim=0))
    return generator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory for checkpoint.pt and, after training, the weights")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.out / "checkpoint.pt"
    run = Run()
    if checkpoint.exists():
        run.load(checkpoint)
    train(run, checkpoint)
    notes = {
        "made_by": "python -m demo.train_generator",
        "steps": run.step,
        "phases": [asdict(phase) for phase in PHASES],
    }
    save_generator(arguments.out / "generator.safetensors", finished_generator(run), notes)


if __name__ == "__main__":
    main()
