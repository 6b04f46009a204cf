"""Generates the images and features of seeds, one at a time, as the served model does.

Rules of this file:
- The latent of a seed comes from the gateway's policy, so an annotated image is the image that is served for the seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from labelmint.core.errors import InvalidRequest
from labelmint.core.generator_classes import CLASS_INDEX
from labelmint.core.policy import check_seed, latent_of
from labelmint.models.annotations import AnnotatedDataset, check_new, sha256_of, write_dataset
from labelmint.models.annotations.files import Bytes
from labelmint.models.generator import Generator, to_uint8
from labelmint.models.store import load_generator

# Gives the features {r: float32 [1,C_r,r,r]} of a seed.
Features = Callable[[int], Mapping[int, Tensor]]
# Is called with each seed and its generated image uint8 [R,R,3], and may raise.
Check = Callable[[int, Bytes], None]


def unchecked(seed: int, image: Bytes) -> None:
    """Accept every image."""


def check_class_index(class_index: int | None, count: int) -> int | None:
    """Return the class_index if a generator with `count` classes can draw it; raises InvalidRequest.

    None is right only for a generator without classes, whose `count` is 0.
    """
    if count == 0 and class_index is not None:
        raise InvalidRequest(CLASS_INDEX, "this generator has no classes; omit class_index")
    if count and (class_index is None or not 0 <= class_index < count):
        asked = "none was given" if class_index is None else f"not {class_index}"
        raise InvalidRequest(CLASS_INDEX, f"this generator draws classes; give one from 0 to {count - 1}, {asked}")
    return class_index


@torch.no_grad()
def draw(
    generator: Generator, seed: int, truncation_psi: float, *, layout: str, class_index: int | None = None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the image float32 [1,3,R,R] and the features {r: [1,C_r,r,r]} of a seed.

    Raises InvalidRequest unless the generator has the class; None is for a generator without classes.
    """
    check_class_index(class_index, len(generator.spec.generator_classes))
    drawn = None if class_index is None else torch.tensor([[class_index]], dtype=torch.int32)
    latent = torch.from_numpy(latent_of(check_seed(seed), generator.spec.z_dim))
    crossover = torch.tensor([[generator.spec.num_ws]], dtype=torch.int32)
    image, features = generator(latent, latent, crossover, torch.tensor([[truncation_psi]]), layout, drawn)
    return image, features


def features_of(generator: Generator, dataset: AnnotatedDataset, layout: str, check: Check = unchecked) -> Features:
    """Return what generates the annotated images, and checks them."""

    @torch.no_grad()
    def features(seed: int) -> Mapping[int, Tensor]:
        class_index = dataset.class_indices.get(seed)
        image, maps = draw(generator, seed, dataset.truncation_psi, layout=layout, class_index=class_index)
        check(seed, to_uint8(image)[0].numpy())
        return maps

    return features


@contextmanager
def counted(features: Features, images: int, title: str) -> Iterator[Features]:
    """Show on the terminal how many of so many images are generated.

    Only commands do. The annotation page computes silently: nobody may read its terminal, and where that is a file, a
    full disk must not stop the page.
    """
    with tqdm(total=images, desc=title, unit="img") as bar:

        def drawn(seed: int) -> Mapping[int, Tensor]:
            maps = features(seed)
            bar.update()
            return maps

        yield drawn


def drawn_images(
    generator: Generator, seeds: Iterable[int], truncation_psi: float, class_indices: Mapping[int, int] | None = None
) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Yield (seed, image uint8 [R,R,3]) in the order of the seeds; `class_indices` by seed, if there are classes."""
    for seed in seeds:
        class_index = class_indices[seed] if class_indices else None
        image, _ = draw(generator, seed, truncation_psi, layout="paper", class_index=class_index)
        yield seed, to_uint8(image)[0].numpy()


def synthesize(
    generator_path: Path,
    out: Path,
    seeds: Sequence[int],
    *,
    truncation_psi: float,
    class_indices: Sequence[int] | None = None,
) -> None:
    """`labelmint synth`: write the images that a person will annotate.

    A conditional generator needs `class_indices`, which the images have in turn. Raises InvalidRequest for a class that
    the generator does not have.
    """
    check_new(out)
    generator = load_generator(generator_path)
    asked: Sequence[int | None] = class_indices or (None,)
    for class_index in asked:
        check_class_index(class_index, len(generator.spec.generator_classes))
    if len(asked) > len(seeds):
        raise InvalidRequest(
            "class_index", f"{len(asked)} classes need more than {len(seeds)} images; raise the count, or name fewer"
        )
    classes = dict(zip(seeds, itertools.cycle(class_indices), strict=False)) if class_indices else None
    drawn = drawn_images(generator, seeds, truncation_psi, classes)
    images = dict(tqdm(drawn, total=len(seeds), desc="synth", unit="img"))
    write_dataset(out, sha256_of(generator_path), truncation_psi, images=images, class_indices=classes)
    named = f"{seeds[0]} to {seeds[-1]}" if isinstance(seeds, range) else ", ".join(map(str, seeds))
    each = f" of class {', '.join(map(str, class_indices))} in turn" if class_indices else ""
    print(f"{out}: {len(seeds)} images of seeds {named}{each}, ready to be annotated")
