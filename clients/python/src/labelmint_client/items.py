"""The default items of the PyTorch datasets: an image and its training target, as tensors.

Rules of this file:
- An image is not copied: its tensor is a view of the received bytes, which only this sample has. A batch's collation
  makes the one copy, and puts the channels first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from labelmint_client.messages import Sample, SampleOptions
from labelmint_client.tasks import target_of


def image_and_label(sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Return image uint8 [3,H,W], and label int64 [H,W] as cross_entropy needs it, or keypoints float32 [K,3]."""
    assert sample.image is not None
    image = torch.from_numpy(_writable(sample.image)).permute(2, 0, 1)  # [3,H,W]
    target = target_of(sample)
    return image, torch.from_numpy(target.astype(np.int64) if target.dtype == np.uint8 else target)


def check_parts(transform: object, options: SampleOptions) -> None:
    """Raise ValueError if the default transform needs a part of the sample that the options leave out."""
    if transform is image_and_label and (options.omit_image or options.omit_label):
        raise ValueError("options leave out the image or the label: give a transform that does not need it")


class _Writable:
    """Declares an array writable. Torch has no tensors that are only read, and warns of arrays that are."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array  # keeps the memory
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def _writable(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.asarray(_Writable(array))
