"""Tests of the kit that measures a GPU, rehearsed on the CPU: what it measures, and what a disturbed run leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")
from gpu import arms, measure, page, results, service
from gpu.cases import TINY, cases_of
from tritonclient.grpc import model_config_pb2 as pb

from labelmint.triton.model_config import read_config
from tests.conftest import ROOT
from tests.support.bare import missing_modules, without

pytestmark = [pytest.mark.torch, pytest.mark.triton, pytest.mark.minutes]

MEASURE = ROOT / "benchmarks" / "gpu" / "measure.py"
WORKER = (sys.executable, str(ROOT / "tests" / "support" / "gpu_worker.py"))
CASE = TINY[0]
# What a machine for measurements has, beside Python: these packages and what they need.
PRESENT = ("torch", "triton", "numpy", "onnx")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of the whole kit with the tiny model, as a user runs it."""
    out = tmp_path_factory.mktemp("rehearsal") / "results.json"
    command = [sys.executable, str(MEASURE), "--out", str(out), "--device", "cpu", "--tiny"]
    subprocess.run(command, cwd=out.parent, check=True, timeout=500)
    return dict(json.loads(out.read_text()))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of some arms on a machine that has nothing but PRESENT."""
    directory = tmp_path_factory.mktemp("bare")
    missing = missing_modules(PRESENT)
    assert {"tritonclient", "grpc", "onnxruntime"} <= missing and "torch" not in missing
    (directory / "sitecustomize.py").write_text(without(missing))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(directory))
        return measured(directory / "results.json", "few")


def measured(out: Path, mode: str, minutes: float = 8.0) -> dict[str, Any]:
    measure.run(out, device="cpu", tiny=True, minutes=minutes, worker=[*WORKER, mode])
    return dict(json.loads(out.read_text()))


def arms_of(figures: dict[str, Any], part: str) -> dict[str, Any]:
    return dict(figures["cases"][CASE.name]["arms"][part])


def without_times(found: Any) -> Any:
    """The figures that two runs must share."""
    if not isinstance(found, dict):
        return found
    return {
        key: without_times(value)
        for key, value in found.items()
        if "second" not in key and "share" not in key and key not in ("rounds", "commit")
    }


def test_a_run_measures_all_arms_in_all_batches(rehearsal: dict[str, Any]) -> None:
    assert set(page.missing(rehearsal)) == {"soak clocks"}, "there is no nvidia-smi here"
    assert rehearsal["complete"] is True and rehearsal["machine"]["packages"]["torch"]
    for part, names in arms.arms_of().items():
        found = arms_of(rehearsal, part)
        assert tuple(found) == names
        for name, figures in found.items():
            batches = ["1"] if part == "machine" else [str(batch) for batch in CASE.batches]
            assert list(figures["batches"]) == batches, name
            for batch, each in figures["batches"].items():
                seconds = each["seconds"]
                assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"] and seconds["calls"] >= 1
                if part != "machine":
                    assert each["samples_per_second"] == pytest.approx(int(batch) / seconds["median"])
                    flops = CASE.costs(part)[0]
                    assert each["flops_per_second"] == pytest.approx(flops * each["samples_per_second"])
                    assert each["share_of_gemm"] > 0 and each["share_of_copy"] > 0


# The largest difference of the JS map from float32, and the share of labels that must agree.
BOUNDS = {"float32": (1e-5, 1.0), "tf32": (1e-2, 0.99), "float16": (5e-2, 0.99), "bfloat16": (0.3, 0.95)}


def test_every_arm_labels_what_float32_labels(rehearsal: dict[str, Any]) -> None:
    for part in ("interpreter", "pair"):
        for name, figures in arms_of(rehearsal, part).items():
            last = name.rpartition("_")[2].rpartition(" ")[2]
            difference, agreement = BOUNDS.get(last, BOUNDS["float32"])
            assert figures["label_agreement"] >= agreement, name
            assert figures["js_map_difference"] <= difference, name
            assert figures["js_score_difference"] <= difference, name
    for name, figures in arms_of(rehearsal, "generator").items():
        assert figures["features_difference"] <= (1e-2 if name.endswith("float16") else 1e-5), name


def test_an_arm_of_half_precision_has_its_precision(rehearsal: dict[str, Any]) -> None:
    found = arms_of(rehearsal, "interpreter")
    for name in ("kernel_float16", "kernel_bfloat16", "kernel_tf32", "compiled_float16"):
        assert found[name]["js_map_difference"] > 1e-5, f"{name} gives what float32 gives"
    assert found["kernel_bfloat16"]["js_map_difference"] > 2 * found["kernel_float16"]["js_map_difference"]


def test_a_sample_of_the_kernel_has_its_bytes_in_any_batch(rehearsal: dict[str, Any]) -> None:
    for name, figures in arms_of(rehearsal, "interpreter").items():
        if name.startswith("kernel_"):
            assert figures["same_bytes"] == {"after other samples": True, "in a batch of 2": True}, name


def test_on_a_gpu_each_step_of_the_service_gets_it(tmp_path: Path) -> None:
    service.export_repository_of(tmp_path, cases_of(True)[-1].build())
    service.put_on_gpu(tmp_path)
    groups = {path.parent.name: read_config(path).instance_group for path in tmp_path.glob("*/config.pbtxt")}
    asked = {name: [(group.kind, list(group.gpus)) for group in found] for name, found in groups.items() if found}
    on_gpu = [(pb.ModelInstanceGroup.KIND_GPU, [0])]
    assert asked == {f"{service.NAME}_{step}": on_gpu for step in ("generator", "style_interpreter")}


def test_the_soak_and_the_service_are_measured(rehearsal: dict[str, Any]) -> None:
    soak, service = rehearsal["soak"], rehearsal["service"]
    assert soak["same_bytes_at_the_end"] is True and soak["samples_per_second"] > 0
    assert [each["samples_per_second"] > 0 for each in service["callers"].values()] == [True, True]


def test_a_bare_machine_measures_what_it_can(bare: dict[str, Any]) -> None:
    found = arms_of(bare, "interpreter")
    assert found["onnxruntime"] == {"missing": "not installed: onnxruntime"}
    assert bare["service"]["missing"].startswith("not installed: ")
    assert all(found[name]["label_agreement"] == 1.0 for name in ("float32", "torchscript", "reference"))
    assert found["kernel_float16"]["label_agreement"] >= 0.99
    assert arms_of(bare, "pair")["onnxruntime + onnxruntime"]["missing"].startswith("needs generator onnxruntime")


def test_two_runs_differ_only_in_their_times(rehearsal: dict[str, Any], bare: dict[str, Any]) -> None:
    compared = 0
    for part in ("generator", "interpreter", "pair"):
        for name, figures in arms_of(bare, part).items():
            if "missing" not in figures:
                assert without_times(figures) == without_times(arms_of(rehearsal, part)[name]), name
                compared += 1
    assert compared >= 8


def test_an_arm_that_fails_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SHARES_OF_TINY", {CASE.name: 1.0})
    monkeypatch.setattr(measure, "STUCK", 0.02)  # of the time: 5 s
    found = arms_of(measured(tmp_path / "results.json", "faults", minutes=4.0), "interpreter")
    assert found["kernel_float32"] == {"missing": "failed: RuntimeError: planted"}
    assert found["kernel_tf32"]["missing"].startswith("out of memory: CUDA out of memory")
    assert found["kernel_float16"]["missing"].startswith("failed: the process ended with code -11")
    assert found["kernel_bfloat16"] == {"missing": "out of time"}
    assert found["eager_whole_tf32"]["label_agreement"] < 0.9, "labels of other features are seen"
    assert found["float32"]["batches"]["2"]["seconds"]["calls"] >= 1
    assert found["eager_tf32"]["label_agreement"] == 1.0


def test_a_run_without_time_names_what_is_missing(tmp_path: Path) -> None:
    figures = measured(tmp_path / "results.json", "few", minutes=0.05)
    found = page.missing(figures)
    planned = {f"cases {CASE.name} arms {part} {name}" for part, names in arms.arms_of().items() for name in names}
    assert set(found) == planned | {"machine", "soak", "service"}
    assert {found[name] for name in (*planned, "soak", "service")} == {"out of time"}


def test_a_killed_run_leaves_valid_results(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, str(MEASURE), "--out", str(out), "--device", "cpu", "--tiny"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        known = 0
        while known < 3:  # arms with figures
            assert process.poll() is None
            time.sleep(0.05)
            found = json.loads(out.read_text()) if out.exists() else {"cases": {}}
            if found["cases"]:
                known = sum("missing" not in each for each in arms_of(found, "machine").values())
        workers = children(process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = json.loads(out.read_text())
    assert left["complete"] is False
    assert arms_of(left, "machine")["gemm_float32"]["batches"]["1"]["seconds"]["calls"] >= 1
    assert page.missing(left)["soak"] == results.NOT_REACHED
    assert workers
    ends = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < ends, "a worker outlives its run"
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in path.read_text().split()]
    return found


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(MEASURE), "--out", str(tmp_path / "r.json")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "--device cpu --tiny" in done.stderr and not (tmp_path / "r.json").exists()


def test_the_share_inside_kernels_leaves_out_the_time_between_them() -> None:
    batch = {"share_of_gemm": 0.3, "seconds": {"median": 4e-3}}
    assert page.share(batch, {"heads": 1.5e-3, "projection": 0.5e-3}) == "30% (60% inside kernels)"
    assert page.share(batch, None) == "30%"
    assert page.share({}, None) == ""
