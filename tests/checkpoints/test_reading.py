"""Honest files: what torch, NumPy and pickle write is read to the same numbers."""

import argparse
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from labelmint.checkpoints.container import open_checkpoint
from labelmint.checkpoints.known_globals import Namespace, NumpyArray, PersistentObject
from labelmint.checkpoints.torch_file import Tensor
from labelmint.core.errors import UnusableFile
from tests.support.checkpoints import reference
from tests.support.checkpoints.writers import nvlabs_bytes

pytestmark = pytest.mark.torch


DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def read_back(path: Path, value: object, new_format: bool) -> Any:
    torch.save(value, path, _use_new_zipfile_serialization=new_format)
    return open_checkpoint(path).value


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def new_format(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_every_type_of_number(tmp_path: Path, new_format: bool) -> None:
    value = {str(dtype): (torch.arange(12).reshape(3, 4) - 3).to(dtype) for dtype in DTYPES}
    read = read_back(tmp_path / "x.pt", value, new_format)
    for name, want in value.items():
        got = read[name].array()
        np.testing.assert_array_equal(got, want.float().numpy() if want.dtype == torch.bfloat16 else want.numpy())
        assert read[name].is_floating == want.dtype.is_floating_point


def test_views_share_their_storage(tmp_path: Path, new_format: bool) -> None:
    base = torch.randn(6, 5, 4)
    value = {"base": base, "turned": base.permute(2, 0, 1), "part": base[1:4, ::2, 1], "number": base[2, 3, 1]}
    value |= {"empty": base[:0], "last": base.to(memory_format=torch.contiguous_format)[5]}
    read = read_back(tmp_path / "x.pt", value, new_format)
    for name, want in value.items():
        np.testing.assert_array_equal(read[name].array(), want.numpy())
    assert len({id(tensor.storage) for tensor in read.values()}) == 1
    assert not read["base"].array().flags.writeable


def test_channels_last_and_parameters(tmp_path: Path, new_format: bool) -> None:
    weight = torch.randn(3, 4, 3, 3).to(memory_format=torch.channels_last)
    read = read_back(tmp_path / "x.pt", {"weight": torch.nn.Parameter(weight)}, new_format)
    np.testing.assert_array_equal(read["weight"].array(), weight.numpy())


def test_what_lies_beside_the_tensors(tmp_path: Path, new_format: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    value = {
        "state": module.state_dict(),
        "args": argparse.Namespace(size=64, name="a", betas=[0.0, 0.99], nothing=None, flag=True),
        "size": module[0].weight.shape,
        "number": np.float32(2.5),
        "ordered": OrderedDict(a=1),
        "long": 2**200,
        "negative": -(2**40),
        1: {"names": {"x", "y"}},
    }
    read = read_back(tmp_path / "x.pt", value, new_format)
    assert list(read["state"]) == list(value["state"])
    assert read["state"]["1.num_batches_tracked"].array() == 0
    assert isinstance(read["args"], Namespace) and read["args"].options == vars(value["args"])
    for name in ("number", "ordered", "long", "negative", 1):
        assert read[name] == value[name]
    assert read["size"] == (3, 2)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numpy_values_in_a_plain_pickle(tmp_path: Path, protocol: int) -> None:
    value = {
        "double": np.float64(0.1),
        "half": np.float16(0.5),
        "true": np.bool_(True),
        "long": np.int64(-7),
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, protocol))
    read: Any = open_checkpoint(tmp_path / "x.pkl").value
    for name in ("double", "half", "true", "long"):
        assert read[name] == value[name] and type(read[name]) is type(value[name].item())
    for name in ("array", "columns"):
        assert isinstance(read[name], NumpyArray)
        np.testing.assert_array_equal(read[name].value, value[name])


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_modules_of_nvlabs(tmp_path: Path, protocol: int) -> None:
    network = reference.Generator()
    (tmp_path / "x.pkl").write_bytes(nvlabs_bytes({"G_ema": network, "D": reference.Generator()}, protocol))
    read: Any = open_checkpoint(tmp_path / "x.pkl").value
    assert read["training_set_kwargs"]["max_size"] == 7
    generator = read["G_ema"]
    assert isinstance(generator, PersistentObject) and generator.class_name == "Generator"
    layer = generator.state["_modules"]["mapping"].state["_modules"]["fc0"].state
    assert layer["weight_gain"] == network.mapping.fc0.weight_gain
    assert isinstance(layer["_parameters"]["weight"], Tensor)
    np.testing.assert_array_equal(layer["_parameters"]["weight"].array(), network.mapping.fc0.weight.detach().numpy())


def test_tensors_written_as_text_are_refused(tmp_path: Path) -> None:
    """Protocol 2 has no bytes. NVlabs' files have 3 or 4, the default of their Python."""
    (tmp_path / "x.pkl").write_bytes(nvlabs_bytes({"G_ema": reference.Generator()}, 2))
    with pytest.raises(UnusableFile, match="written as text; save it with pickle protocol 3 or later"):
        open_checkpoint(tmp_path / "x.pkl")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UnusableFile, match="does not exist"):
        open_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(UnusableFile, match="is not a file"):
        open_checkpoint(tmp_path)
