"""Random interpreters and random features for them."""

import numpy as np
import torch
import torch.nn.functional as F

from labelmint.core.task import TaskName
from labelmint.export.modules import StyleInterpreterStep, example_inputs
from labelmint.models.interpreter import InterpreterSpec, StyleInterpreter
from labelmint.models.tasks import build_interpreter

CHANNELS = {4: 6, 8: 10, 16: 12, 32: 8}


SPEC = InterpreterSpec(
    layout="paper",
    resolution=32,
    channels=CHANNELS,
    num_heads=5,
    hidden=(16, 8),
    class_names=("a", "b", "c", "d"),
    palette=((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)),
)


def interpreter(score_kind: str = "sum", strip_rows: int = 8) -> StyleInterpreter:
    rng = torch.Generator().manual_seed(1)
    built = StyleInterpreter(SPEC, score_kind, strip_rows)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / parameter.shape[-1] ** 0.5)
    return built


def features(batch: int = 2) -> dict[int, torch.Tensor]:
    rng = torch.Generator().manual_seed(2)
    return {r: torch.randn(batch, c, r, r, generator=rng) for r, c in CHANNELS.items()}


def upsampled(maps: dict[int, torch.Tensor]) -> torch.Tensor:
    size = (SPEC.resolution, SPEC.resolution)
    parts = [F.interpolate(x.double(), size=size, mode="bilinear", align_corners=False) for x in maps.values()]
    return torch.cat(parts, dim=1)  # [B,D,R,R]


def random_step(
    channels: dict[int, int],
    heads: int,
    hidden: tuple[int, int],
    *,
    classes: int,
    task: TaskName,
    score_kind: str = "sum",
) -> StyleInterpreterStep:
    """The step of an interpreter of any size."""
    names, palette = tuple(f"c{i}" for i in range(classes)), tuple((i, i, i) for i in range(classes))
    spec = InterpreterSpec("paper", max(channels), channels, heads, hidden, names, palette, task)
    built = build_interpreter(spec, score_kind)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            parameter.normal_(std=2.0 * fan_in**-0.5)
    return StyleInterpreterStep(built).eval()


def features_of(step: StyleInterpreterStep, seed: int) -> list[np.ndarray]:
    """The features of one sample, [C_r,r,r] of each level."""
    return [x[0].numpy() for x in example_inputs(step, 1, seed)]


def in_torch(step: StyleInterpreterStep, features: list[np.ndarray]) -> dict[str, np.ndarray]:
    """What torch computes for one sample."""
    with torch.inference_mode():
        outputs = step(*(torch.from_numpy(array)[None] for array in features))
    return {spec.name: output[0].numpy() for spec, output in zip(step.outputs, outputs, strict=True)}
