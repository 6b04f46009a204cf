"""Generates the images and features of seeds, one at a time, as the served model does.

Rules of this file:
- The latent of a seed comes from the gateway's policy, so an annotated image is the image that is served for the seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from labelmint.core.policy import check_seed, latent_of
from labelmint.models.annotations import check_new, sha256_of, write_dataset
from labelmint.models.generator import Generator, to_uint8
from labelmint.models.store import load_generator


@torch.no_grad()
def draw(generator: Generator, seed: int, truncation_psi: float, *, layout: str) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the image float32 [1,3,R,R] and the features {r: [1,C_r,r,r]} of a seed."""
    latent = torch.from_numpy(latent_of(check_seed(seed), generator.spec.z_dim))
    crossover = torch.tensor([[generator.spec.num_ws]], dtype=torch.int32)
    image, features = generator(latent, latent, crossover, torch.tensor([[truncation_psi]]), layout)
    return image, features


def drawn_images(
    generator: Generator, seeds: Iterable[int], truncation_psi: float
) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Yield (seed, image uint8 [R,R,3]) in the order of the seeds."""
    for seed in seeds:
        yield seed, to_uint8(draw(generator, seed, truncation_psi, layout="paper")[0])[0].numpy()


def synthesize(generator_path: Path, out: Path, seeds: Sequence[int], *, truncation_psi: float) -> None:
    """`labelmint synth`: write the images that a person will annotate."""
    check_new(out)
    generator = load_generator(generator_path)
    images = dict(tqdm(drawn_images(generator, seeds, truncation_psi), total=len(seeds), desc="synth", unit="img"))
    write_dataset(out, sha256_of(generator_path), truncation_psi, images=images)
    named = f"{seeds[0]} to {seeds[-1]}" if isinstance(seeds, range) else ", ".join(map(str, seeds))
    print(f"{out}: {len(seeds)} images of seeds {named}, ready to be annotated")
