"""Imports never run against the flow of the design, and serving never needs torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit


TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "service" / "labelmint"

# What each package may import of the others, itself aside: data flows one way, and there is no circle.
ALLOWED = {
    "core": set(),
    "files": set(),
    "conventions": set(),
    "tracing": {"conventions"},
    "kernel": set(),
    "gpu": set(),
    "untrusted": {"core"},
    "triton": {"conventions", "core", "files", "kernel", "tracing", "untrusted"},
    "seed_index": {"core"},
    "gateway.sampling": {"conventions", "core", "seed_index", "tracing", "triton"},
    "gateway.encoding": {"core", "gateway.sampling"},
    "gateway.grpc": {"core", "gateway.encoding", "gateway.sampling", "v1"},
    "gateway.rest": {"conventions", "core", "gateway.encoding", "gateway.sampling"},
    "gateway.process": {
        "conventions",
        "core",
        "gateway.grpc",
        "gateway.rest",
        "gateway.sampling",
        "seed_index",
        "tracing",
        "triton",
        "v1",
    },
    "pipeline": {"core", "triton"},
    "calibrate": {"core", "pipeline", "triton"},
    "indexing": {"core", "pipeline", "seed_index", "triton"},
    "models": {"core", "files"},
    "checkpoints": {"core", "models", "untrusted"},
    "export": {"core", "files", "kernel", "models", "triton"},
    "annotate": {"core", "models"},
    "cli": {
        "annotate",
        "calibrate",
        "checkpoints",
        "core",
        "export",
        "gateway.process",
        "indexing",
        "models",
        "seed_index",
    },
}
HEAVY = {"torch", "triton", "onnx", "onnxruntime", "safetensors", "pycocotools"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, (
                f"{path} has a relative import, which is not checked here"
            )
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def package(name: str) -> str:
    """The package of a module's name, without `labelmint.`: the gateway's are counted one by one."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "gateway" else parts[0]


def package_of(path: Path) -> str:
    return package(".".join(path.relative_to(PACKAGE).with_suffix("").parts))


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py" and package_of(path) != "v1"]


def test_packages_import_only_what_they_may() -> None:
    for path in files():
        for name in imports(path):
            if name.startswith("labelmint."):
                target, own = package(name.removeprefix("labelmint.")), package_of(path)
                assert target == own or target in ALLOWED[own], f"{path.relative_to(PACKAGE)} imports {name}"


def test_every_package_is_used_and_no_permission_is_left_over() -> None:
    used: dict[str, set[str]] = {name: set() for name in ALLOWED}
    for path in files():
        names = [name.removeprefix("labelmint.") for name in imports(path) if name.startswith("labelmint.")]
        used[package_of(path)].update({package(name) for name in names} - {package_of(path)})
    assert used == ALLOWED


def test_the_core_does_no_io() -> None:
    for path in files():
        if package_of(path) == "core":
            used = {name.split(".")[0] for name in imports(path)}
            assert not used.intersection({"asyncio", "socket", "time", "os", "subprocess"}), path.name


def test_only_the_rooms_of_weights_import_what_is_heavy() -> None:
    for path in files():
        if (
            package_of(path) not in ("annotate", "models", "checkpoints", "export", "gpu")
            and "backends" not in path.parts
        ):
            assert not {name.split(".")[0] for name in imports(path)}.intersection(HEAVY), path.name


def test_serving_loads_without_torch_and_pyarrow() -> None:
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({sorted({*HEAVY, 'pyarrow'})!r}))\n"
        "import labelmint.cli, labelmint.gateway.process.server, labelmint.calibrate"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_file_states_its_rules() -> None:
    for path in files():
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert "Rules of this file:" in docstring, path


def test_a_clock_that_jumps_moves_nothing() -> None:
    """Serving measures time by clocks that only go forward; the time of day is for people to read, in the log."""
    for path in files():
        if package_of(path).split(".")[0] in ("gateway", "triton", "tracing"):
            for node in ast.walk(ast.parse(path.read_text())):
                called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                assert called not in ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow"), path.name


def test_tests_do_not_import_each_other() -> None:
    """They share tests/support, what a conftest.py has, and the attacks of tests/torture."""
    shared = ("tests.conftest", "tests.support", "tests.torture")
    for path in sorted(TESTS.rglob("*.py")):
        here = ("tests", *path.relative_to(TESTS).parent.parts)
        above = {".".join((*here[:depth], "conftest")) for depth in range(1, len(here) + 1)}
        for name in imports(path):
            if name.startswith("tests."):
                fits = name.startswith(shared) or any(f"{name}.".startswith(f"{each}.") for each in above)
                assert fits and ".test_" not in name, f"{path.relative_to(TESTS)} imports {name}"


def test_the_tests_of_the_gateway_lie_in_its_packages() -> None:
    """A file of tests has the name of a module of that package, and perhaps of a part of it: `test_archives_tar.py`."""
    for package_name in ("encoding", "grpc", "process", "rest", "sampling"):
        modules = {path.stem for path in (PACKAGE / "gateway" / package_name).rglob("*.py")}
        for path in (TESTS / "gateway" / package_name).rglob("test_*.py"):
            name = path.stem.removeprefix("test_")
            assert any(name == module or name.startswith(f"{module}_") for module in modules), path.relative_to(TESTS)
