"""A random interpreter and random features for it."""

import torch
import torch.nn.functional as F

from labelmint.models.interpreter import InterpreterSpec, StyleInterpreter

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
