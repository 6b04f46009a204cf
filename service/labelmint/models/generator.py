"""The common part of every StyleGAN generator: mapping, truncation, style mixing, and the conversion to uint8 images.

Rules of this file:
- A generator has a spec (`StyleGAN2Spec`, `StyleGAN1Spec`), the mapping below, and the synthesis network that the spec
  builds.
- Parameters are stored in the equalised form (Karras et al. 2018): they are multiplied by their gain on use.
- A conditional generator draws one class per sample: the mapping reads the embedding of the class beside the latent
  (Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", and NVlabs' code). Both latents of
  a mixed sample have the same class, and one average latent serves the truncation of all classes, as in that code.
- A sample never depends on the other samples of its batch, and the batch dimension stays symbolic in an export.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping as MappingType
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labelmint.core.generator_classes import check_class_names
from labelmint.models.layout import Tap

SQRT2 = math.sqrt(2.0)
LEAK = 0.2
MAX_MAPPING_LAYERS = 64  # published networks have 2 to 18

S = TypeVar("S", bound="GeneratorSpec")


@dataclass(frozen=True)
class GeneratorSpec:
    """The dimensions of a network, which are stored with its weights.

    `channels` maps a resolution (4, 8, ... R) to its number of feature channels. `mapping_width` is the width between
    the mapping's layers (None: `w_dim`). Truncation acts on the layers before `truncation_cutoff` (None: on all).
    A conditional generator draws the `generator_classes`, by their index; `embedding_width` is the width of a class's
    embedding (without classes 0).
    Raises ValueError that names the wrong field.
    """

    z_dim: int
    w_dim: int
    mapping_layers: int
    resolution: int
    channels: MappingType[int, int]
    image_channels: int = 3
    mapping_lr_multiplier: float = 0.01
    mapping_width: int | None = None
    truncation_cutoff: int | None = None
    generator_classes: tuple[str, ...] = ()
    embedding_width: int = 0

    def __post_init__(self) -> None:
        if self.resolution < 8 or self.resolution & (self.resolution - 1):
            raise ValueError(f"resolution must be a power of two of at least 8, not {self.resolution}")
        if sorted(self.channels) != self.resolutions:
            raise ValueError(
                f"channels must be given for the resolutions {self.resolutions}, not {sorted(self.channels)}"
            )
        if not 1 <= self.mapping_layers <= MAX_MAPPING_LAYERS:
            raise ValueError(f"a mapping has 1 to {MAX_MAPPING_LAYERS} layers, not {self.mapping_layers}")
        if self.image_channels not in (1, 3):
            raise ValueError(f"images have 1 (gray) or 3 (RGB) channels, not {self.image_channels}")
        check_class_names(self.generator_classes)
        if bool(self.generator_classes) != (self.embedding_width > 0):
            raise ValueError(
                f"{len(self.generator_classes)} generator classes do not go with an embedding_width of "
                f"{self.embedding_width}; it is positive with classes, and 0 without"
            )

    @property
    def resolutions(self) -> list[int]:
        return [2**i for i in range(2, int(math.log2(self.resolution)) + 1)]

    @property
    def num_ws(self) -> int:
        """The number of w's that the synthesis takes: two per resolution."""
        return 2 * len(self.resolutions)

    @property
    def taps(self) -> dict[Tap, int]:
        """The tensors that a feature layout may read, and their channels, in the order of computation."""
        raise NotImplementedError

    def build_synthesis(self) -> nn.Module:
        """Build the synthesis network: (ws [B,num_ws,w_dim], layout) to image and features."""
        raise NotImplementedError

    def to_json(self) -> dict[str, object]:
        data = asdict(self) | {"channels": {str(r): c for r, c in self.channels.items()}}
        if not self.generator_classes:  # a file without classes keeps the bytes that it had before there were any
            del data["generator_classes"], data["embedding_width"]
        return data

    @classmethod
    def from_json(cls: type[S], data: MappingType[str, Any]) -> S:
        channels = {int(r): int(c) for r, c in data["channels"].items()}
        return cls(**{**data, "channels": channels, "generator_classes": tuple(data.get("generator_classes", ()))})


class Generator(nn.Module):
    """Maps latents to an image and the feature maps that the Style Interpreter reads."""

    def __init__(self, spec: GeneratorSpec) -> None:
        super().__init__()
        self.spec = spec
        self.mapping = Mapping(spec)
        self.synthesis = spec.build_synthesis()

    def forward(
        self,
        latent: Tensor,
        style_latent: Tensor,
        crossover: Tensor,
        truncation_psi: Tensor,
        layout: str,
        class_index: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Generate images; layers from `crossover` on take their style from `style_latent`.

        Args:
            latent, style_latent: float32 [B,z_dim].
            crossover: int32 [B,1] in 0..num_ws.
            truncation_psi: float32 [B,1].
            layout: name of a feature layout (`labelmint.models.layout`).
            class_index: int32 [B,1], for a conditional generator; None for any other. An index that is no class gives
                NaN, so that its sample cannot pass for one of a class.

        Returns:
            image float32 [B,C,R,R], nominally in [-1,1], and per resolution r the features [B,C_r,r,r].
        """
        w, truncated_w = self._w(latent, truncation_psi, class_index)  # [B,w_dim] each
        style_w, truncated_style_w = self._w(style_latent, truncation_psi, class_index)  # [B,w_dim] each
        layer = torch.arange(self.spec.num_ws, device=w.device, dtype=torch.int32)  # [num_ws]
        takes_style = (layer[None, :] >= crossover)[:, :, None]  # [B,num_ws,1]
        ws = torch.where(takes_style, truncated_style_w[:, None, :], truncated_w[:, None, :])  # [B,num_ws,w_dim]
        if self.spec.truncation_cutoff is not None:
            whole = torch.where(takes_style, style_w[:, None, :], w[:, None, :])  # [B,num_ws,w_dim]
            ws = torch.where((layer < self.spec.truncation_cutoff)[None, :, None], ws, whole)
        return self.synthesis(ws, layout)

    def _w(self, latent: Tensor, truncation_psi: Tensor, class_index: Tensor | None) -> tuple[Tensor, Tensor]:
        w = self.mapping(latent, class_index)
        return w, self.mapping.truncate(w, truncation_psi)


class Mapping(nn.Module):
    """Maps z to w: normalises z, then applies equalised linear layers with leaky ReLU of gain sqrt 2.

    A conditional one appends the normalised embedding of the class to the normalised z.
    """

    def __init__(self, spec: GeneratorSpec) -> None:
        super().__init__()
        width = spec.mapping_width or spec.w_dim
        widths = [spec.z_dim + spec.embedding_width, *[width] * (spec.mapping_layers - 1), spec.w_dim]
        self.layers = nn.ModuleList(
            EqualizedLinear(a, b, spec.mapping_lr_multiplier) for a, b in itertools.pairwise(widths)
        )
        classes = len(spec.generator_classes)
        self.embed = ClassEmbedding(classes, spec.embedding_width) if classes else None
        self.register_buffer("w_avg", torch.zeros(spec.w_dim))

    def forward(self, z: Tensor, class_index: Tensor | None = None) -> Tensor:
        """Map z float32 [B,z_dim] to w [B,w_dim], not truncated; a conditional one needs class_index int32 [B,1]."""
        x = normalized(z)
        if self.embed is not None:
            if class_index is None:
                raise ValueError("a conditional generator needs a class_index")
            x = torch.cat([x, normalized(self.embed(class_index))], dim=1)  # [B,z_dim+E]
        for layer in self.layers:
            x = leaky_relu(layer(x))  # [B,w_dim]
        return x

    def truncate(self, w: Tensor, psi: Tensor | float) -> Tensor:
        """Return w_avg + psi (w - w_avg); psi is a float or [B,1]."""
        return self.w_avg + psi * (w - self.w_avg)


class ClassEmbedding(nn.Module):
    """An equalised linear layer for one-hot vectors of classes; a one-hot vector selects a column of the weight."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, classes))
        self.bias = nn.Parameter(torch.zeros(width))
        self.weight_gain = 1.0 / math.sqrt(classes)

    def forward(self, class_index: Tensor) -> Tensor:
        """Map int32 [B,1] to [B,E]; an index that is no class to NaN."""
        classes = self.weight.shape[1]
        is_class = (class_index >= 0) & (class_index < classes)  # [B,1]
        column = torch.where(is_class, class_index, 0)[:, 0]  # [B]
        embedded = self.weight.index_select(1, column).t() * self.weight_gain + self.bias  # [B,E]
        return torch.where(is_class, embedded, math.nan)


class EqualizedLinear(nn.Module):
    def __init__(
        self, in_features: int, out_features: int, lr_multiplier: float = 1.0, *, bias_init: float = 0.0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init))
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)


def normalized(x: Tensor) -> Tensor:
    """Scale each row of [B,n] so that the mean of its squares is 1."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


def leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, LEAK) * SQRT2


def to_uint8(image: Tensor) -> Tensor:
    """Convert [-1,1] float [B,C,R,R] to uint8 [B,R,R,3] as the official scripts do: scale, clamp, truncate.

    A gray image becomes three equal channels.
    """
    pixels = (image * 127.5 + 128.0).clamp(0.0, 255.0).to(torch.uint8).permute(0, 2, 3, 1)  # [B,R,R,C]
    return pixels if image.shape[1] == 3 else pixels.expand(-1, -1, -1, 3)
