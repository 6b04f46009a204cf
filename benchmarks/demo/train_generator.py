"""Fits the demo generator to the procedural renderer by regression from z, progressively, with two phases that sharpen.

Rules of this file:
- Every batch is new. Its latents come from a random generator that is seeded with the step number, so a resumed run
  uses the same latents as an uninterrupted run, and both end with the same weights.
- The weight of a pixel is proportional to (area of its part) ** -0.6. With a plain L1 loss, eyes and brows vanish.
- The mapping network first learns the parameters of the scene (`demo.scene_mapping`).
- From 64 x 64 on, half of each batch mixes two latents at `CROSSOVER`. The target has the geometry of the first and the
  colours of the second. So the early layers learn shape, and the late layers learn appearance. Lower resolutions have
  no late layers, so nothing is mixed there.
- The learning rates are high because the layers are equalised: a weight of unit variance, multiplied by a small gain,
  moves little with a step of 0.002. With 0.06 a tenth of the steps gives a smaller error.
- The loss has the error itself and its Laplacian pyramid. The fine bands are small in the error, so a loss without them
  leaves edges blurred.
- A discriminator sharpens the images in a short phase. At the images, its gradient is half as long as the regression's,
  so the regression decides where parts are.
- The last phase also compares how much contrast a fine band has in each small window. The regression alone prefers a
  blurred edge, the mean of all its possible positions. The contrast of a window does not depend on the position.
- A phase renders its own resolution only, with 2 x 2 subsamples in a pixel; that with the discriminator has 4 x 4.
- The checkpoint has everything that a resumed run needs, on the CPU, so a run may change its device.

Run it as `PYTHONPATH=benchmarks python -m demo.train_generator OUT`; the same command continues an interrupted run.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from demo import faces
from demo.discriminator import Critic
from demo.metrics import octaves
from demo.scene_mapping import fit_mapping
from labelmint.models.generator import Generator
from labelmint.models.resuming import Checkpoint
from labelmint.models.store import save_generator
from labelmint.models.stylegan2 import StyleGAN2Spec

SPEC = StyleGAN2Spec(
    z_dim=faces.Z_DIM,
    w_dim=256,
    mapping_layers=3,
    mapping_width=512,
    mapping_lr_multiplier=1.0,  # regression needs an exact mapping; 0.01 would almost freeze it
    resolution=faces.RESOLUTION,
    channels={4: 128, 8: 128, 16: 128, 32: 128, 64: 64, 128: 32},
)
MAPPING_STEPS = 4_000
MAPPING_RATE = 0.02  # of the learning rate: the mapping network begins fitted
CROSSOVER = 7  # the first layer of the 64x64 block: earlier layers learn shape, later ones appearance
MIXED_FROM = 64  # the resolution from which on a batch mixes latents
AREA_POWER = 0.6
BAND_WEIGHT = 1.0
CONTRAST_BANDS = 3  # the finest ones
CONTRAST_WINDOW = 8  # pixels of a band, along each side
WARM_UP = 2_000  # images, in each phase
EMA_HALF_LIFE = 5_000  # images


@dataclass(frozen=True)
class Phase:
    """One stage of the training. The learning rate falls from `learning_rate` to `last_rate` along a cosine.

    `pull` is the length of the discriminator's gradient at the images, relative to that of the other losses. `contrast`
    is the weight of the contrast's error.
    """

    resolution: int
    images: int
    learning_rate: float
    last_rate: float
    batch: int
    supersampling: int = 2
    pull: float = 0.0
    contrast: float = 0.0


PHASES = (
    Phase(16, 240_000, 6e-2, 6e-2, 32),
    Phase(32, 120_000, 6e-2, 6e-2, 16),
    Phase(64, 60_000, 6e-2, 3e-2, 16),
    Phase(128, 60_000, 3e-2, 2e-3, 16),
    Phase(128, 16_000, 4e-3, 2e-4, 16, supersampling=4, pull=0.5),
    Phase(128, 60_000, 2e-2, 5e-4, 16, contrast=1.0),
)


def part_weights(label: Tensor, power: float = AREA_POWER) -> Tensor:
    """Return pixel weights of mean 1, float32 [B,1,R,R], from exact masks uint8 [B,R,R]: (area of part) ** -power."""
    counts = torch.bincount(label.flatten().long(), minlength=len(faces.CLASS_NAMES)).clamp(min=1)  # [K]
    weight = (counts.float() / label.numel()).pow(-power)  # [K]
    per_pixel = weight[label.long()]  # [B,R,R]
    return (per_pixel / per_pixel.mean()).unsqueeze(1)


def regression_loss(image: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted L1 and squared error, plus the weighted L1 error of each band of the Laplacian pyramid."""
    error = image - target  # [B,3,r,r]
    loss = (weight * (error.abs() + error.square())).mean()
    for band in octaves(error):  # the pyramid is linear: that of the error is the difference of the pyramids
        loss = loss + BAND_WEIGHT * (weight * band.abs()).mean()
        weight = F.avg_pool2d(weight, 2)
    return loss


def contrast_loss(image: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted L1 error of the contrast in windows of the finest bands: the root of the mean squared band."""
    loss = image.new_zeros(())
    for ours, exact in list(zip(octaves(image), octaves(target), strict=True))[:CONTRAST_BANDS]:
        error = (_contrast(ours) - _contrast(exact)).abs()  # [B,1,w,w]
        loss = loss + (_windows(weight) * error).mean()
        weight = F.avg_pool2d(weight, 2)
    return loss


def _contrast(band: Tensor) -> Tensor:
    return (_windows(band.square().sum(dim=1, keepdim=True)) + 1e-5).sqrt()  # [B,1,w,w]; the root is steep at zero


def _windows(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, CONTRAST_WINDOW, CONTRAST_WINDOW // 2)


class Run:
    """The state of a training run, which can be saved to a checkpoint and loaded from it."""

    def __init__(
        self,
        phases: Sequence[Phase] = PHASES,
        spec: StyleGAN2Spec = SPEC,
        *,
        mapping_steps: int = MAPPING_STEPS,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.phases = tuple(phases)
        self.mapping_steps = mapping_steps
        self.device = torch.device(device)
        self.generator = Generator(spec).to(self.device, memory_format=torch.channels_last)
        self.critic = Critic(self.device)
        self.ema = {k: v.detach().clone() for k, v in self.generator.state_dict().items()}
        groups = ({"params": list(part.parameters())} for part in (self.generator.mapping, self.generator.synthesis))
        self.optimizer = torch.optim.Adam(list(groups), betas=(0.9, 0.99))
        self.step = 0
        self.phase = 0
        self.images = 0  # in this phase

    @property
    def inputs(self) -> dict[str, str]:
        """What a checkpoint must have been made with."""
        phases = [asdict(phase) for phase in self.phases]
        steps = str(self.mapping_steps)
        return {
            "phases": json.dumps(phases),
            "mapping steps": steps,
            "network": json.dumps(self.generator.spec.to_json()),
        }

    def start(self) -> None:
        """Fit the mapping network alone."""
        fit_mapping(self.generator.mapping, steps=self.mapping_steps)
        self.ema = {k: v.detach().clone() for k, v in self.generator.state_dict().items()}

    def state(self) -> dict[str, Any]:
        tensors = {
            "generator": self.generator.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "critic": self.critic.state(),
        }
        return {**_on_cpu(tensors), "step": self.step, "phase": self.phase, "images": self.images}

    def load(self, state: Mapping[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        self.ema = {name: value.to(self.device) for name, value in state["ema"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.critic.load(state["critic"])
        self.step, self.phase, self.images = state["step"], state["phase"], state["images"]

    @torch.no_grad()
    def update_ema(self, batch: int) -> None:
        # The half-life is short at first, so the average soon forgets the initial weights.
        decay = 0.5 ** (batch / min(EMA_HALF_LIFE, max(self.step * batch * 0.1, 1.0)))
        values = self.generator.state_dict()
        torch._foreach_lerp_([self.ema[name] for name in values], list(values.values()), 1.0 - decay)


def _on_cpu(tree: Any) -> Any:
    """Move all tensors of nested dictionaries and lists to the CPU."""
    if isinstance(tree, Tensor):
        return tree.detach().cpu()
    if isinstance(tree, Mapping):
        return {key: _on_cpu(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_on_cpu(value) for value in tree]
    return tree


Render = Callable[[Tensor, Tensor], faces.Faces]
Synthesis = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Functions:
    """What each step of a phase calls, compiled for its shapes."""

    render: Render
    synthesis: Synthesis

    @classmethod
    def of(cls, run: Run, phase: Phase, *, compiled: bool) -> Functions:
        # Compiling for any shape would need a compiler for each, so a phase compiles for its own shapes only.
        compile_ = partial(torch.compile, dynamic=False) if compiled else lambda function: function
        synthesis = run.generator.synthesis
        return cls(
            compile_(partial(faces.render, resolution=phase.resolution, supersampling=phase.supersampling)),
            compile_(lambda ws: synthesis(ws, None, phase.resolution)[0]),
        )


def train(run: Run, checkpoint: Checkpoint, *, compiled: bool = True) -> None:
    """Train to the end of the last phase. A signal ends it after a step, with everything saved."""
    if run.step == 0:
        run.start()  # outside: there is nothing to save yet
    with checkpoint.interruptible():
        while run.phase < len(run.phases):
            phase = run.phases[run.phase]
            functions = Functions.of(run, phase, compiled=compiled)
            title = f"phase {run.phase + 1}, {phase.resolution}x{phase.resolution}"
            with tqdm(total=phase.images, initial=run.images, unit="img", desc=title, mininterval=20) as bar:
                while run.images < phase.images:
                    loss = _step(run, phase, functions)
                    bar.update(phase.batch)
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                    checkpoint.keep(run.state)
            run.phase += 1
            run.images = 0


def _learning_rate(run: Run, phase: Phase) -> float:
    warm = min(1.0, (run.images + phase.batch) / WARM_UP)
    cosine = 0.5 * (1.0 + math.cos(math.pi * run.images / phase.images))
    return warm * (phase.last_rate + (phase.learning_rate - phase.last_rate) * cosine)


def _latents(run: Run, batch: int, *, mixed: bool) -> tuple[Tensor, Tensor]:
    """Return z and style_z [B,z_dim] of this step; the first half of a mixed batch is not mixed."""
    rng = torch.Generator().manual_seed(1_000_000_007 + run.step)
    z = torch.randn(batch, run.generator.spec.z_dim, generator=rng)
    style_z = torch.randn(batch, run.generator.spec.z_dim, generator=rng)
    own = batch // 2 if mixed else batch
    style_z[:own] = z[:own]
    return z.to(run.device), style_z.to(run.device)


def _step(run: Run, phase: Phase, functions: Functions) -> float:
    for group, factor in zip(run.optimizer.param_groups, (MAPPING_RATE, 1.0), strict=True):
        group["lr"] = factor * _learning_rate(run, phase)
    z, style_z = _latents(run, phase.batch, mixed=phase.resolution >= MIXED_FROM)
    with torch.no_grad():
        target = functions.render(z, style_z)
        weight = part_weights(target.label)
    with torch.autocast(run.device.type, torch.bfloat16):
        w, style_w = run.generator.mapping(torch.cat([z, style_z])).chunk(2)  # [B,w_dim] each
        late = torch.arange(run.generator.spec.num_ws, device=run.device)[None, :, None] >= CROSSOVER
        image = functions.synthesis(torch.where(late, style_w[:, None], w[:, None]))
    image = image.float()  # [B,3,r,r]
    seen = image.detach().requires_grad_()
    loss = regression_loss(seen, target.image, weight)
    if phase.contrast:
        loss = loss + phase.contrast * contrast_loss(seen, target.image, weight)
    (gradient,) = torch.autograd.grad(loss, seen)
    if phase.pull:
        gradient = gradient + _pull(run, phase, seen.detach(), target=target.image, other=gradient)
    run.optimizer.zero_grad(set_to_none=True)
    image.backward(gradient)
    run.optimizer.step()
    run.step += 1
    run.images += phase.batch
    run.update_ema(phase.batch)
    return float(loss.detach())


def _pull(run: Run, phase: Phase, image: Tensor, *, target: Tensor, other: Tensor) -> Tensor:
    """Teach the discriminator, and return its gradient at the images in the bounded length."""
    run.critic.learn(image, target, step=run.step)
    gradient = run.critic.pull(image, target)
    ramp = min(1.0, run.images / (0.1 * phase.images))  # a new discriminator knows nothing
    return gradient * (ramp * phase.pull * other.norm() / gradient.norm().clamp(min=1e-12))


def finished_generator(run: Run) -> Generator:
    """Return the averaged generator, with w_avg measured over 10,000 latents."""
    generator = Generator(run.generator.spec)
    generator.load_state_dict(_on_cpu(run.ema))
    generator.eval()
    with torch.no_grad():
        z = torch.randn(10_000, generator.spec.z_dim, generator=torch.Generator().manual_seed(1))
        generator.mapping.w_avg.copy_(generator.mapping(z).mean(dim=0))
    return generator


def export(run: Run, path: Path) -> None:
    """Write the averaged generator; its notes say how far the run came."""
    notes = {
        "made_by": "python -m demo.train_generator",
        "mapping_steps": run.mapping_steps,
        "steps": run.step,
        "finished_phases": run.phase,
        "phases": [asdict(phase) for phase in run.phases],
    }
    save_generator(path, finished_generator(run), notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory for checkpoint.pt and, after training, the weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    run = Run(device=arguments.device)
    checkpoint = Checkpoint(arguments.out / "checkpoint.pt", run.inputs)
    if (state := checkpoint.load()) is not None:
        run.load(state)
    train(run, checkpoint)
    export(run, arguments.out / "generator.safetensors")


if __name__ == "__main__":
    main()
