"""An independent segmenter that judges the generated images: a small U-Net, trained on exact renders only.

Rules of this file:
- It sees no generated image during training. So a part that it finds in a generated image is really visible there.
- Training images are slightly blurred, shifted in colour and noisy, so it learns the parts, not the renderer's edges.
  For the same reason two subsamples in a pixel are enough for them.
- Earrings are too few and too small to be learned from plain cross entropy. So the last third of the steps weights
  pixels by the area of their part (deferred re-weighting, Cao et al. 2019).

Run it as `PYTHONPATH=benchmarks python -m demo.segmenter OUT.pt`.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from demo import faces
from demo.metrics import NUM_CLASSES, confusion, iou, table
from demo.train_generator import part_weights

PLAIN_STEPS = 3_000
WEIGHTED_STEPS = 1_500
AREA_POWER = 0.4
BATCH = 16
WIDTHS = (16, 32, 48, 64)


class Segmenter(nn.Module):
    """A U-Net from images float32 [B,3,R,R] in [-1,1] to logits [B,K,R,R]."""

    def __init__(self) -> None:
        super().__init__()
        before = (3, *WIDTHS[:-1])
        self.down = nn.ModuleList(_double(a, b) for a, b in zip(before, WIDTHS, strict=True))
        self.up = nn.ModuleList(_double(a + b, b) for a, b in zip(WIDTHS[:0:-1], WIDTHS[-2::-1], strict=True))
        self.out = nn.Conv2d(WIDTHS[0], NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for index, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if index else x)
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skips.pop()], dim=1))
        return self.out(x)


def _double(width_in: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(width_out),
        nn.ReLU(inplace=True),
        nn.Conv2d(width_out, width_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(width_out),
        nn.ReLU(inplace=True),
    )


def train() -> Segmenter:
    """Train on new renders in each step; deterministic."""
    torch.manual_seed(0)
    network = Segmenter().to(memory_format=torch.channels_last)
    _steps(network, range(PLAIN_STEPS), rate=3e-3, power=0.0)
    torch.manual_seed(PLAIN_STEPS)  # the degradation of the weighted steps does not depend on the plain ones
    _steps(network, range(PLAIN_STEPS, PLAIN_STEPS + WEIGHTED_STEPS), rate=1.5e-3, power=AREA_POWER)
    return network.eval()


def _steps(network: Segmenter, steps: range, *, rate: float, power: float) -> None:
    """Train for these steps. The weight of a pixel is proportional to (area of its part) ** -power."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(steps))
    render = torch.compile(partial(faces.render, resolution=faces.RESOLUTION, supersampling=2), dynamic=False)
    for step in tqdm(steps, desc="segmenter", unit="step"):
        z = torch.randn(BATCH, faces.Z_DIM, generator=torch.Generator().manual_seed(77_000_000 + step))
        batch = render(z, None)
        image = _degrade(batch.image).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(image)
        errors = F.cross_entropy(logits.float(), batch.label.long(), reduction="none")  # [B,R,R]
        loss = (part_weights(batch.label, power)[:, 0] * errors).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def _degrade(image: Tensor) -> Tensor:
    """Blur about half of the batch with a binomial filter, then shift the colours of all images and add noise."""
    tap = torch.tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(tap, tap).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    pick = (torch.rand(image.shape[0], 1, 1, 1) < 0.5).float()
    shifted = torch.lerp(image, blurred, pick) + 0.1 * torch.randn(image.shape[0], 3, 1, 1)
    return shifted + 0.02 * torch.randn_like(image)


@torch.no_grad()
def segment(network: Segmenter, image: Tensor) -> Tensor:
    """Return the class ids uint8 [B,R,R]."""
    return network(image.clamp(-1.0, 1.0)).argmax(dim=1).to(torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    network = train()
    torch.save(network.state_dict(), arguments.out)
    counts = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.long)
    for z in torch.randn(512, faces.Z_DIM, generator=torch.Generator().manual_seed(5)).split(16):
        batch = faces.render(z)
        counts += confusion(segment(network, batch.image), batch.label)
    print("IoU on 512 unseen exact renders:")
    print(table(iou(counts)))


if __name__ == "__main__":
    main()
