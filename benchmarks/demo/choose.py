"""Chooses the images to annotate as a person would who looks at many: each rare part a few times, then variety.

Rules of this file:
- It reads the renderer's masks and scene parameters, in place of a person who looks at the images.
- Of the images that have the wanted part, it takes the one that differs most from those chosen before.

Run it as `PYTHONPATH=benchmarks python -m demo.choose`; it prints the seeds for `labelmint synth --seeds`.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from demo import faces, metrics
from demo.scene_mapping import scene_parameters
from labelmint.core.policy import ANNOTATION_SEED, latent_of

CANDIDATES = 200
COUNT = 16
OF_EACH_RARE_PART = 3
VISIBLE = 12  # pixels: fewer can be overlooked


def choose(latents: Tensor, count: int = COUNT) -> list[int]:
    """Return the indices of the chosen rows of latents z float32 [N,z_dim], in ascending order."""
    visible = torch.stack([metrics.areas(faces.render(z).label) >= VISIBLE for z in latents.split(1)])  # [N,K]
    parameters = scene_parameters(latents)  # [N,P]
    scaled = (parameters - parameters.mean(dim=0)) / parameters.std(dim=0).clamp(min=1e-6)  # [N,P]
    share = visible.float().mean(dim=0)  # [K]
    rare = [k for k in share.argsort().tolist() if faces.CLASS_NAMES[k] in faces.RARE_PARTS]
    chosen: list[int] = []
    for part in rare:
        wanted = visible[:, part]
        while int(wanted[chosen].sum()) < OF_EACH_RARE_PART and len(chosen) < count:
            free = wanted.clone()
            free[chosen] = False
            if not bool(free.any()):
                break
            chosen.append(_most_different(scaled, chosen, free))
    while len(chosen) < count:
        free = torch.ones(len(latents), dtype=torch.bool)
        free[chosen] = False
        chosen.append(_most_different(scaled, chosen, free))
    return sorted(chosen)


def _most_different(scaled: Tensor, chosen: list[int], free: Tensor) -> int:
    """Return the index of the free row of `scaled` [N,P] that is farthest from its nearest chosen one."""
    others = scaled[chosen] if chosen else scaled.mean(dim=0, keepdim=True)  # [C,P]
    distance = torch.cdist(scaled, others).amin(dim=1)  # [N]
    return int(distance.masked_fill(~free, -1.0).argmax())


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    seeds = range(ANNOTATION_SEED, ANNOTATION_SEED + CANDIDATES)
    latents = torch.stack([torch.from_numpy(latent_of(seed, faces.Z_DIM))[0] for seed in seeds])  # [N,z_dim]
    print(",".join(str(seeds[index]) for index in choose(latents)))


if __name__ == "__main__":
    main()
