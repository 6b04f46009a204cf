"""labelmint's Python-based backends without Triton: what they do where an instance group asks for a GPU.

Triton itself refuses such a group on a machine without a GPU, so its module for models is replaced by the names that
the backends use.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import labelmint.triton

pytestmark = pytest.mark.torch

BACKENDS = Path(labelmint.triton.__file__).parent / "backends"


@pytest.fixture
def model_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Any]:
    utils = ModuleType("triton_python_backend_utils")
    utils.TritonModelException = RuntimeError  # type: ignore[attr-defined]
    utils.get_model_dir = lambda: str(tmp_path)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    monkeypatch.syspath_prepend(str(BACKENDS / "python"))
    monkeypatch.delitem(sys.modules, "labelmint_backend", raising=False)

    def build(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"backend_{name}", BACKENDS / name / "model.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.TritonPythonModel()

    yield build
    sys.modules.pop("labelmint_backend", None)


def arguments(kind: str) -> dict[str, str]:
    config = {"max_batch_size": 8, "input": [{"name": "x"}], "output": [{"name": "y"}]}
    return {"model_config": json.dumps(config), "model_instance_kind": kind, "model_instance_device_id": "1"}


class _Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@pytest.mark.parametrize(("kind", "device"), [("CPU", "cpu"), ("GPU", "cuda:1")])
def test_the_module_is_loaded_onto_the_device_of_its_instance_group(
    model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, kind: str, device: str
) -> None:
    asked: list[object] = []

    def load(path: str, map_location: object) -> torch.nn.Module:
        asked.append(map_location)
        return torch.jit.script(_Double())

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.jit, "load", load)
    model_of("pytorch").initialize(arguments(kind))
    assert asked == [device]


def test_without_a_gpu_the_pytorch_backend_says_what_to_install(
    model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="asks for cuda:1, but torch .* finds no GPU; install a torch"):
        model_of("pytorch").initialize(arguments("GPU"))


@pytest.mark.parametrize("name", ["onnxruntime", "labelmint"])
def test_the_other_backends_run_on_the_cpu_only(
    model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "labelmint":
        monkeypatch.setitem(sys.modules, "labelmint_kernel", ModuleType("labelmint_kernel"))
        import labelmint.kernel.interpreter as kernel

        monkeypatch.setitem(sys.modules, "labelmint_kernel.interpreter", kernel)
    with pytest.raises(RuntimeError, match="runs on the CPU only; for GPUs use NVIDIA's"):
        model_of(name).initialize(arguments("GPU"))
