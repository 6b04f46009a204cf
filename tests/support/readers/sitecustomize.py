"""Python runs this file at its start in the environment of the foreign readers (`make readers`): torchvision can be
imported there whatever torch it meets.

PyPI builds torchvision for the torch that it has, with CUDA. With a torch for CPUs its compiled operators cannot be
loaded, and the import fails, because it describes two of them. No reader uses them, so a declaration is enough.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

found = find_spec("torchvision")
if found is not None and found.origin is not None:
    try:
        torch.ops.load_library(Path(found.origin).with_name("_C.so"))
    except (OSError, RuntimeError):
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
