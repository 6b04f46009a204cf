"""Imports never run against the flow of the design, and serving never needs torch."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "service" / "labelmint"

# What each room may import of the others. Wire -> core -> Triton; models and export stand apart.
ALLOWED = {
    "errors": set(),
    "calibration": set(),
    "settings": {"errors"},
    "tracing": set(),
    "triton": {"errors", "tracing"},
    "gateway": {"errors", "calibration", "settings", "tracing", "triton", "v1"},
    "models": {"errors", "gateway"},  # the seed policy and nothing else, see below
    "checkpoints": {"errors", "models"},
    "export": {"errors", "models", "triton"},
    "demo": {"models", "gateway", "triton"},
    "cli": {"errors", "settings", "gateway", "models", "checkpoints", "export"},
}
WIRES = (
    "grpc_access",
    "grpc_api",
    "grpc_parsing",
    "rest_api",
    "rest_caching",
    "rest_docs",
    "rest_messages",
    "rest_middleware",
    "rest_problems",
    "rest_stream",
    "tar",
)
HEAVY = {"torch", "onnx", "onnxruntime", "safetensors", "pycocotools"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if room(path) not in ("v1", "__init__")]


def test_rooms_import_only_what_they_may() -> None:
    for path in files():
        for name in imports(path):
            if name.startswith("labelmint."):
                target = name.split(".")[1]
                assert target == room(path) or target in ALLOWED[room(path)], f"{path.name} imports {name}"


def test_models_know_only_the_seed_policy_of_the_gateway() -> None:
    for path in files():
        if room(path) == "models":
            used = {name for name in imports(path) if name.startswith("labelmint.gateway")}
            assert all(name.startswith("labelmint.core.policy") for name in used), path.name


def test_wire_adapters_know_nothing_of_triton() -> None:
    for name in WIRES:
        used = imports(PACKAGE / "gateway" / f"{name}.py")
        assert not [module for module in used if "triton" in module], name


def test_policy_does_no_io() -> None:
    used = imports(PACKAGE / "gateway" / "policy.py")
    assert not used.intersection({"asyncio", "grpc", "socket", "time", "pathlib", "os"})


def test_only_the_rooms_of_weights_import_what_is_heavy() -> None:
    for path in files():
        if room(path) not in ("models", "checkpoints", "export", "demo") and "backends" not in path.parts:
            assert not {name.split(".")[0] for name in imports(path)}.intersection(HEAVY), path.name


def test_serving_loads_without_torch() -> None:
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({sorted(HEAVY)!r}))\n"
        "import labelmint.cli, labelmint.gateway.process.server, labelmint.calibrate"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_file_states_its_rules() -> None:
    for path in files():
        if path.name != "__init__.py":
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            assert "Rules of this file:" in docstring, path


def test_a_clock_that_jumps_moves_nothing() -> None:
    """Serving measures time by clocks that only go forward; the time of day is for people to read, in the log."""
    for path in files():
        if room(path) in ("gateway", "triton", "tracing"):
            for node in ast.walk(ast.parse(path.read_text())):
                called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                assert called not in ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow"), path.name
