"""Our own Triton loads what `labelmint export` writes, and nothing that would run code, reach out or take memory."""

import ast
import asyncio
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import onnx
import pytest
from onnx import helper

from labelmint.core.errors import UnusableFile
from labelmint.export.modules import StyleInterpreterStep
from labelmint.export.native_export import weights_file
from labelmint.export.repository import STEPS, step_config, write_model
from labelmint.export.torchscript_export import export_torchscript
from labelmint.triton.artifacts import check_models
from labelmint.triton.model_config import ensembles
from labelmint.triton.onnx_file import check_onnx
from labelmint.triton.stored_zip import check_native
from labelmint.triton.torchscript_file import check_torchscript
from labelmint.untrusted.content import Malformed, RegularFile
from tests.conftest import REPOSITORY, ROOT, start_service
from tests.support.models import tiny_weights
from tests.support.processes import refused_start, triton_pid
from tests.support.waiting import wait_for
from tests.torture.repositories import (
    ATTACKS,
    MAX_SECONDS,
    NATIVE,
    ONNX,
    SCRIPT,
    SINGING,
    STEP,
    build,
    judged,
    library,
    load_unchecked,
    parameter,
    problems,
    put,
    varint,
)

pytestmark = [pytest.mark.triton, pytest.mark.torch]


CHECKS: dict[str, tuple[str, Callable[[RegularFile], None]]] = {
    "onnx": (ONNX, check_onnx),
    "torchscript": (SCRIPT, check_torchscript),
    "native": (NATIVE, check_native),
}
CUTS, FLIPS = 150, 300


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tiny_repository: Path) -> dict[str, Path]:
    """The tiny model in all formats: its fused steps, which are what is served."""
    generator, interpreter = tiny_weights()
    directory = tmp_path_factory.mktemp("formats")
    found = {"onnx": tiny_repository}
    for file_format in ("torchscript", "native"):
        found[file_format] = Path(shutil.copytree(tiny_repository, directory / file_format))
    for name in ("generator", "style_interpreter"):
        step = STEPS[name](generator, interpreter)
        config = step_config(f"tiny_{name}", step, "torchscript")
        write_model(found["torchscript"], config, 1, files={"model.pt": export_torchscript(step).data})
    config = step_config("tiny_style_interpreter", StyleInterpreterStep(interpreter), "native")
    write_model(found["native"], config, 1, files={"interpreter.npz": weights_file(interpreter)})
    return found


@pytest.fixture
def copy(tmp_path: Path, tiny_repository: Path) -> Path:
    return Path(shutil.copytree(tiny_repository, tmp_path / "repository"))


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("canary") / "canary"


def judge(check: Callable[[RegularFile], None], path: Path, data: bytes) -> str:
    """What a reader says of these bytes, "" if it takes them."""
    path.write_bytes(data)
    with RegularFile(path, len(data)) as file:
        try:
            check(file)
        except Malformed as problem:
            return str(problem)
    return ""


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_repository_is_refused(name: str, sources: dict[str, Path], tmp_path: Path, canary: Path) -> None:
    repository = build(name, sources, tmp_path, canary)
    started = time.process_time()  # whatever else the machine does
    said = judged(name, repository)
    assert time.process_time() - started < 3 * MAX_SECONDS  # the machine may be slow
    assert problems(name, said) == ""
    assert not canary.exists()


def test_exports_of_all_formats_pass(sources: dict[str, Path]) -> None:
    for repository in sources.values():
        check_models(repository, ["tiny"])
    check_models(sources["onnx"], ["tiny_staged"])
    check_models(REPOSITORY, ensembles(REPOSITORY))


def test_what_people_change_passes(copy: Path, tmp_path: Path) -> None:
    """A link to the repository, links within it, another name of the file, and what our backends can be told."""
    (copy / ".store").mkdir()
    shutil.move(copy / ONNX, copy / ".store" / "weights")
    (copy / ONNX).symlink_to("../../.store/weights")
    model = copy / "tiny_style_interpreter"
    (model / "1").rename(copy / ".store" / "promoted")
    (model / "1").symlink_to("../.store/promoted")
    (model / "1" / "model.onnx").rename(model / "1" / "of_tuesday.onnx")
    config = model / "config.pbtxt"
    config.write_text(config.read_text() + '# größer\ndefault_model_filename: "of_tuesday.onnx"\n')
    parameter("intra_op_thread_count", "2")(copy, tmp_path)
    (tmp_path / "current").symlink_to(copy)
    check_models(tmp_path / "current", ["tiny"])


@pytest.mark.parametrize("file_format", CHECKS)
def test_a_file_that_is_cut_off_anywhere_is_refused(file_format: str, sources: dict[str, Path], tmp_path: Path) -> None:
    name, check = CHECKS[file_format]
    data = (sources[file_format] / name).read_bytes()
    assert judge(check, tmp_path / "file", data) == ""
    for end in {*range(0, len(data), max(1, len(data) // CUTS)), *range(64), *range(len(data) - 64, len(data))}:
        assert judge(check, tmp_path / "file", data[:end]), end


@pytest.mark.parametrize("file_format", CHECKS)
def test_a_damaged_file_is_read_or_refused(file_format: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """Whatever the damage, the answer is `Malformed` or none."""
    name, check = CHECKS[file_format]
    data, dice = (sources[file_format] / name).read_bytes(), random.Random(0)
    for _ in range(FLIPS):
        spoiled = bytearray(data)
        for _ in range(dice.choice((1, 3, 30))):
            spoiled[dice.randrange(len(data))] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
        judge(check, tmp_path / "file", bytes(spoiled))


@pytest.mark.parametrize(("missing", "said"), [(0, ""), (4, "declares 1073741824 bytes")])
def test_large_weights_cost_no_time(tmp_path: Path, missing: int, said: str) -> None:
    """The bytes of a tensor are stepped over; here they are a hole in the file."""
    count = 1 << 28
    length = 4 * count - missing
    tensor = onnx.TensorProto(dims=[count], data_type=onnx.TensorProto.FLOAT).SerializeToString()
    tensor += b"\x4a" + varint(length)  # raw_data
    graph = b"\x2a" + varint(len(tensor) + length) + tensor
    path = tmp_path / "model.onnx"
    with path.open("wb") as written:
        written.write(b"\x3a" + varint(len(graph) + length) + graph)
        written.seek(length, os.SEEK_CUR)
        written.write(onnx.ModelProto(opset_import=[helper.make_opsetid("", 18)]).SerializeToString())
    started = time.process_time()
    with RegularFile(path, 1 << 31) as file, pytest.raises(Malformed, match=said) if said else nullcontext():
        check_onnx(file)
    assert time.process_time() - started < MAX_SECONDS


def test_what_is_not_checked_is_run(sources: dict[str, Path], tmp_path: Path, canary: Path) -> None:
    """The canary sings where Triton is started without the check: the attacks are real."""
    asyncio.run(load_unchecked(build(SINGING[0], sources, tmp_path, canary)))
    assert canary.exists()
    canary.unlink()


def test_serve_ends_with_one_line(sources: dict[str, Path], tmp_path: Path, canary: Path) -> None:
    repository = build(SINGING[0], sources, tmp_path, canary)
    said = refused_start("--model-repository", str(repository))
    assert said == (
        f"labelmint: {repository / STEP}/1/libtriton_onnxruntime.so is not part of an export, and Triton may "
        "run it; remove it\n"
    )
    assert not canary.exists()


def test_a_running_gateway_looks_again(copy: Path, tmp_path: Path, canary: Path) -> None:
    """Neither SIGHUP nor a new start of Triton loads what came beside a model that is served, here through a link."""
    (tmp_path / "current").symlink_to(copy)
    service = start_service(tmp_path / "serve.log", repository=tmp_path / "current")
    try:
        put(f"{STEP}/1/libtriton_onnxruntime.so", library)(copy, canary)
        service.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "was not read again, nothing changes" in service.log.read_text())
        os.kill(triton_pid(service), signal.SIGKILL)
        wait_for(lambda: service.log.read_text().count("libtriton_onnxruntime.so is not part of an export") > 1)
    finally:
        assert service.stop() == 0
    assert not canary.exists()


def test_only_who_checks_starts_triton() -> None:
    for path in sorted((ROOT / "service" / "labelmint").rglob("*.py")):
        called = {
            ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
        }
        assert "TritonServer" not in called or "read_whole_model" in path.read_text(), path


def test_a_step_that_nothing_names_is_nobodys(copy: Path) -> None:
    """What is not loaded is not looked at: another model's trouble is its own."""
    put("other/1/libtriton_onnxruntime.so", b"")(copy, copy)
    check_models(copy, ["tiny"])
    with pytest.raises(UnusableFile, match="does not exist"):
        check_models(copy, ["other"])
