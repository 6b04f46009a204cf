"""The reference interpreter: the paper's method, written directly in torch, which labelmint's is compared with.

Rules of this file:
- Every feature map is upsampled to R x R and all are concatenated (S*, D x R x R). The N classifiers run one after the
  other over all pixels, one image after the other, as the released code of DatasetGAN does.
- The weights are those of a `StyleInterpreter`, so that the labels are the same. Its BatchNorms are already folded,
  which saves the reference work.
- The comparison must be fair, so of equivalent ways to write a step in plain torch, this file uses the faster one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labelmint.models.interpreter import StyleInterpreter


class ReferenceInterpreter(nn.Module):
    """The N classifiers of `interpreter` as N networks over the upsampled feature tensor."""

    def __init__(self, interpreter: StyleInterpreter) -> None:
        super().__init__()
        spec = interpreter.spec
        self.spec = spec
        self.maps, self.score = interpreter.maps, interpreter.score
        first = torch.cat([interpreter.projection[str(r)] for r in spec.channels], dim=1)  # [N*h1,D]
        weights = (first.unflatten(0, (spec.num_heads, -1)), interpreter.weight2, interpreter.weight3)  # [N,out,in]
        biases = (interpreter.bias1.unflatten(0, (spec.num_heads, -1)), interpreter.bias2, interpreter.bias3)  # [N,out]
        self.classifiers = nn.ModuleList(
            _classifier([(w[n], b[n]) for w, b in zip(weights, biases, strict=True)]) for n in range(spec.num_heads)
        )

    @torch.no_grad()
    def forward(self, features: Mapping[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Label images.

        Args:
            features: {r: float32 [B,C_r,r,r]} of the spec's layout.

        Returns:
            label uint8 [B,R,R], js_map float32 [B,R,R] in nats, js_score float32 [B,1].
        """
        batch = features[self.spec.resolution].shape[0]
        images = [self._one({r: x[i : i + 1] for r, x in features.items()}) for i in range(batch)]
        label, js_map, mean_entropy = (torch.stack(each) for each in zip(*images, strict=True))  # [B,R,R]
        return label, js_map, self.score(*self.maps(js_map, mean_entropy))

    def _one(self, features: Mapping[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Label one image: features [1,C_r,r,r] to label uint8 [R,R], JS and mean entropy float32 [R,R]."""
        size, k = self.spec.resolution, self.spec.num_classes
        upsampled = [self._upsampled(features[r]) for r in self.spec.channels]
        pixels = torch.cat(upsampled, dim=2).flatten(0, 1)  # [R*R,D]
        logits = torch.stack([classifier(pixels) for classifier in self.classifiers])  # [N,R*R,K]
        log_probability = logits.log_softmax(dim=2)
        probability = log_probability.exp()
        entropy = -(probability * log_probability).sum(dim=2).mean(dim=0)  # [R*R]
        mean = probability.mean(dim=0)  # [R*R,K]
        js = (torch.special.entr(mean).sum(dim=1) - entropy).clamp(min=0.0)  # [R*R]
        votes = F.one_hot(logits.argmax(dim=2), k).sum(dim=0)  # [R*R,K]
        label = votes.argmax(dim=1).to(torch.uint8)  # [R*R]; the smallest id of a tie
        return label.view(size, size), js.view(size, size), entropy.view(size, size)

    def _upsampled(self, level: Tensor) -> Tensor:
        """[1,C,r,r] to [R,R,C]: channels last, because the classifiers are faster on contiguous pixels."""
        size = (self.spec.resolution, self.spec.resolution)
        last = level.contiguous(memory_format=torch.channels_last)
        return F.interpolate(last, size=size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)


def _classifier(layers: list[tuple[Tensor, Tensor]]) -> nn.Sequential:
    """Return linear layers with ReLU between them, each from a weight [out,in] and a bias [out]."""
    modules: list[nn.Module] = []
    for weight, bias in layers:
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1]).eval()
