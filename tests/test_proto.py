"""The wire contract: lint-clean, documented, never broken, and the generated modules are its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from labelmint.v1 import sample_service_pb2 as pb
from tests.conftest import ROOT, need_program

pytestmark = pytest.mark.unit


PROTO = ROOT / "protos" / "labelmint" / "v1" / "sample_service.proto"
RELEASED = PROTO.parent / "released.binpb"


def buf(*arguments: str | Path, at: Path = ROOT) -> subprocess.CompletedProcess[str]:
    program = need_program("buf", "buf-bin of PyPI")
    return subprocess.run([program, *arguments], cwd=at, capture_output=True, text=True, timeout=60)


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}"]
    command += [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run([*command, str(PROTO)], check=True)
    for path in sorted((tmp_path / "labelmint" / "v1").iterdir()):
        committed = ROOT / "service" / "labelmint" / "v1" / path.name
        assert committed.read_text() == path.read_text(), f"run `make proto`: {path.name} is stale"
        copied = ROOT / "clients" / "python" / "src" / "labelmint_client" / "v1" / path.name
        renamed = committed.read_text().replace("\nfrom labelmint.v1 import", "\nfrom labelmint_client.v1 import")
        assert copied.read_text() == renamed, f"run `make proto`: the client's {path.name} is stale"


def test_the_javascript_client_has_the_contract_beside_it() -> None:
    copied = ROOT / "clients" / "javascript" / PROTO.name
    assert copied.read_bytes() == PROTO.read_bytes(), "run `make proto`: the JavaScript client's proto is stale"


def test_the_contract_is_lint_clean_and_every_element_documented() -> None:
    done = buf("lint")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_method_says_how_it_fails() -> None:
    methods = PROTO.read_text().split("service SampleService {")[1].split("\n}\n")[0].split("returns")[:-1]
    assert len(methods) == len(pb.DESCRIPTOR.services_by_name["SampleService"].methods)
    for method in methods:
        assert "// Errors: " in method, method


def test_the_released_wire_is_not_broken() -> None:
    done = buf("breaking", "--against", RELEASED)
    assert done.returncode == 0, f"clients of the last release would break:\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("uint64 next_seed = 2;", "uint64 next_seed = 102;", 'field "2" with name "next_seed"'),
        ("double js_score = 6;", "float js_score = 6;", 'Field "6" with name "js_score"'),
        ("bytes js_map = 5;", "bytes js_divergence = 5;", 'Field "5" with name "js_divergence"'),
        ("ENCODING_RAW = 1;", "ENCODING_RAW = 101;", 'enum value "1"'),
        ("  rpc GetModel(GetModelRequest) returns (GetModelResponse);", "", 'RPC "GetModel"'),
        ("stream StreamSamplesResponse", "StreamSamplesResponse", 'RPC "StreamSamples"'),
        ("message GetModelRequest {", "message GetModelRequest {\n  string added = 100;", None),
        ("ENCODING_RAW = 1;", "ENCODING_RAW = 1;\n  // Added.\n  ENCODING_ADDED = 100;", None),
    ],
)
def test_a_break_is_caught_and_an_addition_is_not(
    tmp_path: Path, before: str, after: str, complaint: str | None
) -> None:
    text = PROTO.read_text()
    assert before in text
    (tmp_path / "buf.yaml").write_text((ROOT / "buf.yaml").read_text())
    changed = tmp_path / PROTO.relative_to(ROOT)
    changed.parent.mkdir(parents=True)
    changed.write_text(text.replace(before, after, 1))
    done = buf("breaking", "--against", RELEASED, at=tmp_path)
    if complaint is None:
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert done.returncode == 100 and complaint in done.stdout, done.stdout + done.stderr
