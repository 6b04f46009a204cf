"""Writes checkpoint files as the other projects do: real pickles, with the globals that theirs have."""

import contextlib
import io
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from tests.support.checkpoints import reference
from tests.support.vectors import vectors


class EasyDict(dict):
    """A dictionary of NVlabs' `dnnlib.util`."""


def _reconstruct_persistent_obj(meta: dict) -> None:
    raise AssertionError("an importer called what the file names")


@contextlib.contextmanager
def nvlabs_modules() -> Iterator[None]:
    """`torch_utils.persistence` and `dnnlib.util` exist while a file is written, and at no other time."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    util.EasyDict = EasyDict
    modules = {
        "torch_utils": types.ModuleType("torch_utils"),
        "torch_utils.persistence": persistence,
        "dnnlib": types.ModuleType("dnnlib"),
        "dnnlib.util": util,
    }
    was = _reconstruct_persistent_obj.__module__, EasyDict.__module__
    sys.modules.update(modules)
    _reconstruct_persistent_obj.__module__, EasyDict.__module__ = "torch_utils.persistence", "dnnlib.util"
    try:
        yield
    finally:
        _reconstruct_persistent_obj.__module__, EasyDict.__module__ = was
        for name in modules:
            del sys.modules[name]


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: object) -> object:
        if isinstance(value, nn.Module):
            meta = {
                "type": "class",
                "version": 6,
                "module_src": "raise SystemExit('the source in the file was run')\n" * 40,
                "class_name": type(value).__name__,
                "state": value.__dict__,
            }
            return _reconstruct_persistent_obj, (meta,)
        return NotImplemented


def nvlabs_bytes(networks: dict[str, object], protocol: int = 4) -> bytes:
    """A pickle of `networks` (G_ema, ...) and what lies beside them in a training snapshot."""
    content = {
        "training_set_kwargs": EasyDict(class_name="training.dataset.ImageFolderDataset", max_size=7),
        **networks,
    }
    stream = io.BytesIO()
    with nvlabs_modules():
        _Pickler(stream, protocol).dump(content)
    return stream.getvalue()


def write_nvlabs(path: Path, generator: reference.Generator, protocol: int = 4) -> Path:
    snapshot = {"G": None, "D": None, "G_ema": generator, "augment_pipe": None}
    path.write_bytes(nvlabs_bytes(snapshot, protocol))
    return path


def reference_of_the_vectors() -> reference.Generator:
    """The network of the vectors, in the form in which NVlabs would write it."""
    official = vectors("stylegan2_64")
    channels = {r: len(official[f"param/synthesis.b{r}.conv1.bias"]) for r in (4, 8, 16, 32, 64)}
    network = reference.Generator(64, 0, 64, channels, mapping={"num_layers": 8})
    state = {name.removeprefix("param/"): value for name, value in official.items() if name.startswith("param/")}
    network.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return network
