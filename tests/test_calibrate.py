"""A running Triton is measured as our own is: the same gate, or one clear error and nothing written."""

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import pytest_asyncio

from labelmint import calibrate
from labelmint.core.errors import InferenceFailed, InvalidRequest, LabelmintError, UnusableFile
from labelmint.export.repository import export_repository
from labelmint.triton.artifacts import read_whole_model
from labelmint.triton.client import Latents, TritonClient
from labelmint.triton.model_config import read_config, write_config
from labelmint.triton.server import TritonServer
from tests.support.commands import run
from tests.support.inference import running, statistics
from tests.support.models import export_conditional, files, tiny_weights
from tests.support.repositories import accept
from tests.support.waiting import until

pytestmark = [pytest.mark.triton, pytest.mark.torch]

SEEDS = 1000


@pytest_asyncio.fixture(scope="module")
async def triton(second: Path) -> AsyncIterator[TritonServer]:
    """It has both versions of `tiny`; `other` is in its repository, but not loaded."""
    async with running(second, "tiny", "tiny_v2") as server:
        yield server


@pytest.fixture
def copy(tmp_path: Path, second: Path) -> Path:
    return Path(shutil.copytree(second, tmp_path / "repository"))


async def measured(repository: Path, url: str, *, version: int = 1, model: str = "tiny") -> str:
    """Calibrate with the Triton at `url`, or with one of our own that runs what that one runs."""
    (found,) = await calibrate.calibrate_repository(
        repository,
        model,
        0,
        count=SEEDS,
        truncation_psi=1.0,
        version=version,
        executor="onnxruntime",
        triton_url=url,
    )
    return found.id


async def refused(repository: Path, url: str, model: str = "tiny") -> str:
    """The one line of a calibration that fails; the repository must be as before."""
    before = files(repository)
    with pytest.raises(LabelmintError) as raised:
        await measured(repository, url, model=model)
    assert files(repository) == before
    assert "\n" not in raised.value.message
    return raised.value.message


async def made(server: TritonServer, model: str) -> int:
    client = TritonClient(server.grpc_url)
    try:
        return (await statistics(client, f"{model}_generator"))[0]
    finally:
        await client.close()


async def test_it_writes_what_our_own_triton_gives(tmp_path: Path, second: Path, triton: TritonServer) -> None:
    own, remote = (Path(shutil.copytree(second, tmp_path / name)) for name in ("own", "remote"))
    # Steps for other hardware: our own Triton must not load them, another one may.
    for step in ("tiny_v2_generator", "tiny_v2_style_interpreter"):
        config = read_config(remote / step / "config.pbtxt")
        config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
        write_config(remote / step / "config.pbtxt", config)
    before = await made(triton, "tiny_v2")
    calibration = await measured(own, "", version=2)
    assert await made(triton, "tiny_v2") == before
    arguments = ("calibrate", "tiny", "--version", "2", "--first-seed", "0", "--count", str(SEEDS))
    done = await asyncio.to_thread(run, *arguments, "--model-repository", str(remote), "--triton-url", triton.grpc_url)
    assert done.returncode == 0, done.stderr
    assert await made(triton, "tiny_v2") == before + SEEDS
    gate, advice = done.stdout.splitlines()
    assert gate.startswith(f"calibration {calibration}: gate at JS ") and gate.endswith(" nats (score kind sum)")
    written = [f"{name}/config.pbtxt" for name in ("tiny_v2", "tiny_v2_staged")]
    for name in written:
        assert (remote / name).read_bytes() == (own / name).read_bytes() != (second / name).read_bytes()
        assert str(remote / name) in advice
    assert f"to the repository of the Triton at {triton.grpc_url} and reload" in advice
    unchanged = {name for name, digest in files(second).items() if files(own)[name] == digest}
    assert set(files(own)) - unchanged == set(written)


async def test_a_preview_of_a_running_triton_writes_nothing(copy: Path, triton: TritonServer) -> None:
    before = files(copy)
    arguments = ("calibrate", "tiny", "--preview", "--count", "3", "--model-repository", str(copy))
    ways = (("--executor", "onnxruntime"), ("--triton-url", triton.grpc_url))
    own, remote = [await asyncio.to_thread(run, *arguments, *more) for more in ways]
    assert own.returncode == remote.returncode == 0, remote.stderr
    assert own.stdout == remote.stdout
    assert own.stdout.startswith("preview of 3 seeds, JS in nats (score kind sum) by quantile: 0: ")
    assert files(copy) == before


async def test_only_a_triton_with_the_digest_is_measured(tmp_path: Path, copy: Path, triton: TritonServer) -> None:
    other = tmp_path / "other"
    export_repository(other, "tiny", tiny_weights(5))
    ours, theirs = (
        read_config(each / "tiny" / "config.pbtxt").parameters["model_digest"].string_value for each in (copy, other)
    )
    said = await refused(other, triton.grpc_url)
    assert f"has 'tiny' version 1 with the digest {ours}, but the repository has {theirs}; " in said
    async with running(other, "tiny") as differing:
        both = f"ipv4:{differing.grpc_url},{triton.grpc_url}"
        before = await made(triton, "tiny"), await made(differing, "tiny")
        assert await measured(copy, both) == await measured(copy, "")
        assert (await made(triton, "tiny"), await made(differing, "tiny")) == (before[0] + SEEDS, before[1])


async def test_a_model_that_is_not_ready(copy: Path, triton: TritonServer) -> None:
    said = await refused(copy, triton.grpc_url, "other")
    assert said == (
        f"Triton at {triton.grpc_url} does not have 'other' version 1 ready, only: 'tiny' version 1, "
        "'tiny_generator' version 1, 'tiny_style_interpreter' version 1, 'tiny_v2' version 2, 'tiny_v2_generator' "
        "version 2, 'tiny_v2_style_interpreter' version 2; load the model there first"
    )
    assert "no model named 'nothing'; served: other, tiny" in await refused(copy, triton.grpc_url, "nothing")


def test_another_score_kind_needs_another_export(copy: Path) -> None:
    before = files(copy)
    calibrate.check_score_kind(copy, "tiny", 2, "sum")
    with pytest.raises(InvalidRequest) as raised:
        calibrate.check_score_kind(copy, "tiny", 2, "mean_entropy")
    command = f"labelmint export --generator FILE --interpreter FILE --model-repository {copy} --version 2 "
    assert f"`{command}--score-kind mean_entropy tiny`" in raised.value.message
    assert files(copy) == before


async def test_no_triton_there(copy: Path) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        said = await refused(copy, f"127.0.0.1:{port}")
    assert "Triton does not answer" in said and str(port) in said
    assert "cannot be resolved" in await refused(copy, "nowhere.invalid:8001")


async def test_a_triton_that_dies_in_the_middle(copy: Path) -> None:
    async with running(copy, "tiny") as dying:
        failing = asyncio.create_task(refused(copy, dying.grpc_url))

        async def has_begun() -> bool:
            return await made(dying, "tiny") > 20

        await until(has_begun)
        dying.kill()
        said = await failing
    assert said.endswith(f"(Triton at {dying.grpc_url}); nothing was written")


async def test_a_triton_that_answers_no_numbers(copy: Path) -> None:
    interpreter = copy / "tiny_style_interpreter" / "1" / "model.onnx"
    graph = onnx.load(interpreter)
    for tensor in graph.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.raw_data:
            tensor.raw_data = np.full(len(tensor.raw_data) // 4, np.nan, np.float32).tobytes()
    onnx.save(graph, interpreter)
    accept(copy, "tiny")
    async with running(copy, "tiny") as server:
        said = await refused(copy, server.grpc_url)
    assert f"not finite, for {SEEDS} of {SEEDS} seeds, the first one 0" in said and said.endswith("nothing was written")


async def test_a_damaged_repository_is_not_calibrated(copy: Path, triton: TritonServer) -> None:
    with (copy / "tiny_generator" / "1" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    before = files(copy)
    with pytest.raises(UnusableFile, match="digest that does not match"):
        await measured(copy, triton.grpc_url)
    assert files(copy) == before


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy it before changing it."""
    directory = tmp_path_factory.mktemp("conditional")
    export_conditional(directory)
    return directory


async def calibrated_by(repository: Path, *options: str) -> tuple[int, str, str]:
    arguments = ("calibrate", "kinds", "--model-repository", str(repository), "--first-seed", "0", "--count", "1000")
    done = await asyncio.to_thread(run, *arguments, *options)
    return done.returncode, done.stdout, done.stderr


async def test_each_class_has_its_own_gate(conditional: Path, tmp_path: Path) -> None:
    """Whether it is measured alone, with all others, or in a Triton that runs already."""
    all_classes, some = (Path(shutil.copytree(conditional, tmp_path / name)) for name in ("all", "some"))
    code, said, complaint = await calibrated_by(all_classes, "--all-classes", "--executor", "onnxruntime")
    assert code == 0, complaint
    model = read_whole_model(all_classes, "kinds")
    assert model.calibration is None and model.calibrated_classes == (0, 1, 2)
    gates = [calibration for calibration in model.class_calibrations if calibration is not None]
    assert [gate.class_index for gate in gates] == [0, 1, 2]
    assert len({gate.threshold for gate in gates}) == len({gate.id for gate in gates}) == 3
    for gate, line in zip(gates, said.splitlines(), strict=True):
        assert line.startswith(f"calibration {gate.id} of class {gate.class_index}: gate at JS {gate.threshold:.6g} ")
    async with running(some, "kinds") as server:
        code, said, complaint = await calibrated_by(some, "--class-index", "2,0", "--triton-url", server.grpc_url)
    assert code == 0, complaint
    assert [line.split(":")[0] for line in said.splitlines()[:2]] == [
        f"calibration {gates[index].id} of class {index}" for index in (2, 0)
    ]
    assert read_whole_model(some, "kinds").class_calibrations == (gates[0], None, gates[2])
    assert read_whole_model(some, "kinds_staged").class_calibrations == (gates[0], None, gates[2])


async def test_the_kernel_calibrates_a_class_under_its_own_name(conditional: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(conditional, tmp_path / "repository"))
    code, _, complaint = await calibrated_by(copied, "--class-index", "1")
    assert code == 0, complaint
    parameters = read_config(copied / "kinds" / "config.pbtxt").parameters
    assert {name for name in parameters if name.startswith("calibration")} == {"calibration.kernel.class_1"}


async def test_a_preview_of_classes(conditional: Path) -> None:
    before = files(conditional)
    code, said, complaint = await calibrated_by(conditional, "--class-index", "2,0", "--preview", "--count", "3")
    assert code == 0, complaint
    two, zero, rest = said.splitlines()
    assert two.startswith("preview of 3 seeds of class 2, JS") and zero.startswith("preview of 3 seeds of class 0, JS")
    assert two.split("quantile")[1] != zero.split("quantile")[1] and rest == "no gate was set, nothing was written"
    assert files(conditional) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "class_index: each of the 3 generator classes of model 'kinds' has a gate of its own; name those to "),
        (("--class-index", "0,3"), "class_index: 3 is out of range"),
        (("--class-index", "1", "--all-classes"), "--all-classes calibrates every class, so --class-index does not"),
    ],
)
async def test_classes_that_cannot_be_calibrated(conditional: Path, options: tuple[str, ...], said: str) -> None:
    before = files(conditional)
    code, _, complaint = await calibrated_by(conditional, *options)
    assert code == 2 and complaint.startswith(f"labelmint: {said}") and complaint.count("\n") == 1, complaint
    assert files(conditional) == before


@pytest.mark.parametrize(
    ("class_indices", "said"),
    [((0,), "class_index: model 'tiny' has no generator classes"), ("all", "all_classes: model 'tiny' has no gen")],
)
async def test_classes_of_a_model_without_any(second: Path, class_indices: calibrate.ClassIndices, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        await calibrate.calibrate_repository(
            second, "tiny", 0, count=SEEDS, truncation_psi=1.0, class_indices=class_indices
        )


async def test_a_failure_leaves_the_classes_before_it_written(
    conditional: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(conditional, tmp_path / "repository"))
    infer = TritonClient.infer

    async def failing(client: TritonClient, *arguments: object, **options: object) -> dict[str, np.ndarray]:
        latents = arguments[2]
        assert isinstance(latents, Latents)
        if latents.class_index == 2:
            raise InferenceFailed("it fails")
        return await infer(client, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(TritonClient, "infer", failing)
    with pytest.raises(InferenceFailed) as raised:
        await calibrate.calibrate_repository(
            copied, "kinds", 0, count=SEEDS, truncation_psi=1.0, executor="onnxruntime", class_indices="all"
        )
    assert raised.value.message.endswith("; nothing was written of class 2, only of the classes before it")
    assert read_whole_model(copied, "kinds").calibrated_classes == (0, 1)
