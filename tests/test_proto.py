"""The generated modules are those of the committed proto, and every element of it is documented."""

import subprocess
import sys
from pathlib import Path

import pytest

from labelmint.v1 import sample_service_pb2 as pb

ROOT = Path(__file__).parent.parent
PROTO = ROOT / "protos" / "labelmint" / "v1" / "sample_service.proto"


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}"]
    command += [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run([*command, str(PROTO)], check=True)
    for path in sorted((tmp_path / "labelmint" / "v1").iterdir()):
        committed = ROOT / "service" / "labelmint" / "v1" / path.name
        assert committed.read_text() == path.read_text(), f"run `make proto`: {path.name} is stale"


def test_every_element_has_a_comment() -> None:
    previous = ""
    for number, line in enumerate(PROTO.read_text().splitlines(), 1):
        text = line.strip()
        declares = text.endswith((";", "{", "{}")) and not text.startswith(("//", "syntax", "package", "}"))
        if declares and "oneof outcome" not in text:
            assert previous.startswith("//"), f"line {number} has no comment: {text}"
        previous = text


def test_package_matches_its_directory_and_zero_is_unspecified() -> None:
    assert pb.DESCRIPTOR.package == "labelmint.v1" and PROTO.parent.name == "v1"
    for enum in pb.DESCRIPTOR.enum_types_by_name.values():
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED")
