"""`model.py` of the GPU format without Triton and without a GPU: what the real Triton of the suite cannot provoke.

Rules of this file:
- Triton's module for models is replaced by the few names that `model.py` uses, and the kernel by one that does nothing.
- The device is torch's `meta`, which has no memory, or a `cuda` on which nothing runs.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import labelmint.gpu

pytestmark = pytest.mark.torch

MODEL = Path(labelmint.gpu.__file__).parent / "model.py"


class Request:
    def __init__(self, cancelled: bool = False) -> None:
        self.cancelled = cancelled

    def is_cancelled(self) -> bool:
        return self.cancelled

    def requested_output_names(self) -> list[str]:
        return ["js_score"]


class Input:
    def to_dlpack(self) -> Any:
        return torch.zeros(1, 2, 4, 4).__dlpack__()


class TritonError:
    CANCELLED = "cancelled"

    def __init__(self, said: str, code: str = "") -> None:
        self.said, self.code = said, code


@pytest.fixture
def happened() -> list[str]:
    """What the model did, in order."""
    return []


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, happened: list[str]) -> Any:
    backend, kernel = ModuleType("triton_python_backend_utils"), ModuleType("interpreter")

    def run(features: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        happened.append(f"run on {features[0].device}")
        return {"js_score": features[0].new_zeros(1)}

    def response(output_tensors: Any = None, error: Any = None) -> SimpleNamespace:
        happened.append("respond")
        return SimpleNamespace(tensors=output_tensors, error=error)

    backend.InferenceResponse, backend.TritonError = response, TritonError  # type: ignore[attr-defined]
    backend.Tensor = SimpleNamespace(from_dlpack=lambda name, tensor: (name, tensor))  # type: ignore[attr-defined]
    backend.Logger = SimpleNamespace(log_warn=lambda said: happened.append(f"warn: {said}"))  # type: ignore[attr-defined]
    backend.get_input_tensor_by_name = lambda request, name: Input()  # type: ignore[attr-defined]
    backend.TritonModelException = RuntimeError  # type: ignore[attr-defined]
    kernel.GpuInterpreter = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    monkeypatch.setitem(sys.modules, "interpreter", kernel)
    spec = importlib.util.spec_from_file_location("labelmint_gpu_model", MODEL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.TritonPythonModel()
    found._interpreter = SimpleNamespace(run=run, outputs=("js_score",))
    found._device, found._inputs, found._batched, found._told = torch.device("meta"), ["features_4"], True, False
    return found


def test_a_cancelled_request_is_not_run(model: Any, happened: list[str]) -> None:
    cancelled, answered = model.execute([Request(cancelled=True), Request()])
    assert cancelled.error.code == TritonError.CANCELLED and answered.error is None
    assert sum(each.startswith("run") for each in happened) == 1


def test_features_from_host_memory_are_said_once_and_moved(model: Any, happened: list[str]) -> None:
    model.execute([Request(), Request()])
    warnings = [each for each in happened if each.startswith("warn")]
    assert len(warnings) == 1 and "--cuda-memory-pool-byte-size" in warnings[0] and "triton.env" in warnings[0]
    assert [each for each in happened if each.startswith("run")] == ["run on meta"] * 2


def test_features_on_the_device_are_not_copied(model: Any, happened: list[str]) -> None:
    model._device = torch.device("cpu")
    (answer,) = model.execute([Request()])
    assert answer.error is None and happened == ["run on cpu", "respond"]


def test_results_are_complete_before_the_response(
    model: Any, happened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = SimpleNamespace(synchronize=lambda: happened.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(model, "_features", lambda request: [torch.zeros(1, 2, 4, 4)])
    model._device = torch.device("cuda", 0)
    model.execute([Request(), Request()])
    assert happened == ["run on cpu", "wait", "respond"] * 2


def test_an_error_that_shows_when_the_kernels_end_is_of_that_request(
    model: Any, happened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = iter([None, RuntimeError("misaligned address"), None])

    def wait() -> None:
        if (error := next(outcomes)) is not None:
            raise error

    monkeypatch.setattr(model, "_wait", wait)
    first, second, third = model.execute([Request(), Request(), Request()])
    assert first.error is None and third.error is None and second.error.said == "gpu: misaligned address"


@pytest.mark.parametrize(("kind", "said"), [("GPU", "finds none"), ("CPU", "runs on GPUs only")])
def test_a_device_that_is_not_there_is_refused(
    model: Any, kind: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    of = type(model).initialize.__globals__["_device"]
    with pytest.raises(RuntimeError, match=said):
        of(kind, "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert of("GPU", "1") == torch.device("cuda", 1)


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_a_missing_package_is_named(tmp_path: Path, package: str) -> None:
    (tmp_path / "triton_python_backend_utils.py").touch()
    shutil.copy2(MODEL, tmp_path)
    script = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "try:\n    import model\n"
        "except ModuleNotFoundError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert f"{package} is missing: build the image of k8s/components/gpu-kernel" in done.stdout, done.stderr
