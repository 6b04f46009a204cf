"""The discriminator of the generator's adversarial phase: it judges the sharpness of small patches, not the face.

Rules of this file:
- It sees images only, no target beside them, and each of its outputs sees 38 x 38 pixels. So it can tell a blurred edge
  from a sharp one, but not whether the edge is in its place: the regression loss alone decides that.
- It compares the render and the generated image of the same latents (relativistic pairing, Jolicoeur-Martineau 2018),
  so a rare part counts on both sides equally.
- R1 (Mescheder et al. 2018) is computed in every R1_INTERVAL-th step and multiplied by the interval (lazily).
- The generator gets a gradient at its images and no loss value, so that it can bound its length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (32, 64, 96)
LEARNING_RATE = 1e-3
R1_GAMMA = 1.0
R1_INTERVAL = 8


class Discriminator(nn.Module):
    """Maps images float32 [B,3,R,R] to one logit for each patch, [B,1,R/8,R/8]; large means rendered."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in WIDTHS:
            layers += [nn.Conv2d(before, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            before = width
        layers += [nn.Conv2d(before, before, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(before, 1, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


class Critic:
    """A discriminator with its optimizer."""

    def __init__(self, device: torch.device) -> None:
        self._network = Discriminator().to(device, memory_format=torch.channels_last)
        self._optimizer = torch.optim.Adam(self._network.parameters(), LEARNING_RATE, betas=(0.0, 0.99))
        self._device = device

    def state(self) -> dict[str, Any]:
        return {"network": self._network.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        self._network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])

    def learn(self, generated: Tensor, rendered: Tensor, *, step: int) -> None:
        """Make one step of the discriminator; the images are float32 [B,3,R,R], row by row of the same latents."""
        loss = F.softplus(self._logits(generated) - self._logits(rendered)).mean()
        if step % R1_INTERVAL == 0:
            loss = loss + R1_INTERVAL * 0.5 * R1_GAMMA * self._roughness(rendered)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()

    def pull(self, generated: Tensor, rendered: Tensor) -> Tensor:
        """Return the gradient of the generator's adversarial loss at the generated images, [B,3,R,R]."""
        image = generated.detach().requires_grad_()
        with torch.no_grad():
            truth = self._logits(rendered)
        loss = F.softplus(truth - self._logits(image)).mean()
        (gradient,) = torch.autograd.grad(loss, image)
        return gradient

    def _logits(self, image: Tensor) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16):
            logits = self._network(image.contiguous(memory_format=torch.channels_last))
        return logits.float()

    def _roughness(self, rendered: Tensor) -> Tensor:
        """Return the mean squared gradient of a logit at the renders, in float32: it is differentiated again."""
        image = rendered.detach().requires_grad_()
        logits = self._network(image)
        per_image = logits.flatten(1)  # [B,P]
        (gradient,) = torch.autograd.grad(per_image.sum() / per_image.shape[1] ** 0.5, image, create_graph=True)
        return gradient.square().sum(dim=(1, 2, 3)).mean()
