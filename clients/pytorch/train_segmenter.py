"""Trains a small segmentation network on samples that the service generates during the training.

Rules of this file:
- It needs only torch and labelmint-client, nothing from the service. So you can copy it and insert your own network.
- Each sample is fetched once and kept in memory. The first epoch is live; later ones read from memory in random order.
  10,000 samples of 128x128 take 0.65 GB.
- For one seed on one machine, the training is deterministic.

Run `python clients/pytorch/train_segmenter.py --samples 2000 OUT.pt` while `make serve` is running. With
`--evaluation FILE.npz` (`image` uint8 [N,R,R,3], `label` uint8 [N,R,R]) it also prints the IoU of each class there.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from labelmint_client import Client
from labelmint_client.torch import LabeledSampleDataset

BATCH = 16
STEPS = 625
LEARNING_RATE = 1e-2
WIDTHS = (24, 32, 48, 64)
IGNORE = 255


class Segmenter(nn.Module):
    """U-Net, at half resolution inside: image float32 [B,3,R,R] in [-1,1] to logits [B,K,R,R]; 16 must divide R."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem = _convolution(12, WIDTHS[0])
        self.down = nn.ModuleList(
            nn.Sequential(_convolution(a, b, stride=2), _convolution(b, b)) for a, b in pairwise(WIDTHS)
        )
        self.up = nn.ModuleList(_convolution(a + b, b) for a, b in zip(WIDTHS[:0:-1], WIDTHS[-2::-1], strict=True))
        self.out = nn.Conv2d(WIDTHS[0], 4 * num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(F.pixel_unshuffle(image, 2))  # [B,24,R/2,R/2]
        skips = []
        for block in self.down:
            skips.append(x)
            x = block(x)
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], dim=1))
        return F.pixel_shuffle(self.out(x), 2)  # [B,K,R,R]


def _convolution(width_in: int, width_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(width_out),
        nn.ReLU(inplace=True),
    )


def train(
    batches: Iterator[tuple[Tensor, Tensor]],
    samples: int,
    num_classes: int,
    *,
    steps: int = STEPS,
    augmented: bool = True,
    seed: int = 0,
) -> Segmenter:
    """Train on the first `samples` pairs of `batches`.

    Args:
        batches: pairs of image uint8 [B,3,R,R] and label [B,R,R] (class ids; 255 is ignored), read as far as needed.
        samples: how many different pairs to train on.
        num_classes: K.
        steps: optimizer steps of 16 pairs each. It does not depend on `samples`, so data sets of all sizes get the same
            amount of training.
        augmented: whether pairs are randomly moved, mirrored, recoloured, blurred and made grainy.
        seed: seed of the initial weights, the order of the pairs and the augmentation.
    """
    torch.manual_seed(seed)
    network = Segmenter(num_classes).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    memory: tuple[Tensor, Tensor] | None = None
    held = 0
    for _ in tqdm(range(steps), desc="train", unit="step"):
        if held < samples:
            fresh = next(batches)
            if memory is None:
                memory = tuple(torch.empty((samples, *part.shape[1:]), dtype=torch.uint8) for part in fresh)
            end = min(held + len(fresh[0]), samples)
            for kept, part in zip(memory, fresh, strict=True):
                kept[held:end] = part[: end - held]
            pick, held = torch.arange(held, end), end
        else:
            pick = torch.randint(samples, (BATCH,))
        image, label = memory[0][pick].float() / 127.5 - 1.0, memory[1][pick].long()  # [B,3,R,R], [B,R,R]
        if augmented:
            image, label = augment(image, label)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(image.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), label, ignore_index=IGNORE)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def augment(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return another view of each pair: image float [B,3,R,R] in [-1,1], label int64 [B,R,R] with 255 outside."""
    batch = len(image)
    angle = math.radians(15.0) * _uniform(batch)
    scale = torch.exp(0.2 * _uniform(batch))
    mirror = torch.where(torch.rand(batch) < 0.5, -1.0, 1.0)
    row_x = torch.stack([mirror * scale * angle.cos(), -scale * angle.sin(), 0.15 * _uniform(batch)], dim=1)  # [B,3]
    row_y = torch.stack([mirror * scale * angle.sin(), scale * angle.cos(), 0.15 * _uniform(batch)], dim=1)  # [B,3]
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), list(image.shape), align_corners=False)  # [B,R,R,2]
    moved = F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)
    # grid_sample fills the outside with 0. The ids are shifted by IGNORE, so that the outside becomes IGNORE.
    ids = F.grid_sample((label[:, None] - IGNORE).float(), grid, mode="nearest", align_corners=False)[:, 0]
    gain = 1.0 + 0.2 * _uniform(batch, 3, 1, 1)
    moved = moved * gain + 0.2 * _uniform(batch, 3, 1, 1)
    tap = torch.tensor([0.25, 0.5, 0.25])
    blurred = F.conv2d(moved, torch.outer(tap, tap).expand(3, 1, 3, 3), padding=1, groups=3)
    moved = torch.where(torch.rand(batch, 1, 1, 1) < 0.3, blurred, moved)
    grain = 0.06 * torch.rand(batch, 1, 1, 1) * torch.randn_like(moved)
    return moved + grain, ids.long() + IGNORE


def _uniform(*shape: int) -> Tensor:
    return 2.0 * torch.rand(shape) - 1.0


@torch.no_grad()
def evaluate(network: Segmenter, image: Tensor, label: Tensor) -> list[float]:
    """Return the IoU of each class over all pairs: image uint8 [N,3,R,R], label [N,R,R]; NaN for absent classes."""
    classes = network.num_classes
    counts = torch.zeros(classes * classes, dtype=torch.long)
    for images, labels in zip(image.split(64), label.split(64), strict=True):
        scaled = (images.float() / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            found = network(scaled).argmax(dim=1)  # [B,R,R]
        judged = labels != IGNORE
        pairs = labels[judged].long() * classes + found[judged]
        counts += torch.bincount(pairs, minlength=classes * classes)
    table = counts.view(classes, classes).double()  # row exact, column found
    hit = table.diagonal()
    return (hit / (table.sum(0) + table.sum(1) - hit)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="file for the weights")
    parser.add_argument("--endpoint", default="localhost:50051", help="gRPC address of the gateway")
    parser.add_argument("--model", default="faces")
    parser.add_argument("--samples", type=int, default=10_000, help="how many different samples to train on")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order and augmentation")
    parser.add_argument("--evaluation", type=Path, help="npz file with exact masks to evaluate on")
    arguments = parser.parse_args()

    with Client(arguments.endpoint) as client:
        names = client.get_model(arguments.model).class_names
    dataset = LabeledSampleDataset(arguments.endpoint, arguments.model)
    # One worker fetches the next batch while the network trains on the current one.
    batches = iter(DataLoader(dataset, batch_size=BATCH, num_workers=1))
    network = train(batches, arguments.samples, len(names), steps=arguments.steps, seed=arguments.seed)
    torch.save(network.state_dict(), arguments.out)
    if arguments.evaluation is not None:
        with np.load(arguments.evaluation) as arrays:
            image, label = torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2), torch.from_numpy(arrays["label"])
        by_class = evaluate(network, image, label)
        for name, value in zip(names, by_class, strict=True):
            print(f"{name:<12}{value:.3f}")
        print(f"{'mean':<12}{np.nanmean(by_class):.3f}")


if __name__ == "__main__":
    main()
