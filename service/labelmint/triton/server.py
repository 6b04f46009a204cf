"""Runs the `tritonserver` of the nvidia-pytriton wheel as a child process.

Rules of this file:
- The wheel's files stay untouched: the backend directory is a copy in the `Workplace` of the run (Triton refuses a
  backend library that is a link out of its directory). No path of the user's is told to Triton, links to them are.
- The child loads what it is told to: who starts it has the models checked before (`artifacts`).
- The child listens on loopback only, in a process group of its own, and dies with this process.
- What Triton says on its way up is kept: a start that fails tells the user why, in one line of Triton's words.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import re
import shutil
import signal
import socket
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from labelmint.core.errors import TritonUnavailable, UnusableFile
from labelmint.kernel import interpreter
from labelmint.triton.client import TritonClient
from labelmint.triton.shared_memory import check_room
from labelmint.triton.workplace import Workplace

logger = logging.getLogger(__name__)

BACKENDS = Path(__file__).parent / "backends"
KERNEL = Path(interpreter.__file__).parent  # of the `labelmint` backend, which finds it under the name below
KERNEL_NAME = "labelmint_kernel"
DIE_WITH_PARENT = Path(__file__).parent / "die_with_parent.py"
REPOSITORY = "repository"  # its name for Triton
EXIT_TIMEOUT_SECONDS = 20
START_TIMEOUT_SECONDS = 180.0
_POLL_SECONDS = 0.1
_LOG_LINES = 400
# Triton's own, and the last words of a C++ program that an exception ends.
_ERROR = re.compile(r'E[01]\d{3} \S+ +\d+ \S+\] "?(.*?)"?$|\s*what\(\): +(.*)$')
_COLOURS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
# What Triton calls errors wherever there is no GPU.
_NO_GPU = ("CudaDriverHelper", "CUDA driver version")


class TritonServer:
    """One tritonserver child. Serves gRPC at `grpc_url` and metrics at `metrics_url`."""

    def __init__(
        self, repository: Path, models: Sequence[str], log_path: Path | None = None, traces_url: str = ""
    ) -> None:
        """Serve `models` (Triton names; an ensemble brings its steps) of `repository`: those that a start loads.

        `log_path` receives Triton's whole log; without it only the last lines are kept for error messages.
        `traces_url` receives Triton's spans of the requests that bring a trace, over OTLP/HTTP.
        """
        self.models = tuple(models)
        self._repository = repository
        self._log_path = log_path
        self._traces_url = traces_url
        self._process: asyncio.subprocess.Process | None = None
        self._group: int | None = None  # of processes, to be killed
        self._reader: asyncio.Task[None] | None = None
        self._lines: deque[str] = deque(maxlen=_LOG_LINES)
        self._workplace: Workplace | None = None  # from a start to the end of all its processes
        # Chosen once, so that clients find the child again after it was started again.
        self._grpc_port, self._metrics_port = _free_ports(2)
        self.grpc_url = f"127.0.0.1:{self._grpc_port}"
        self.metrics_url = f"http://127.0.0.1:{self._metrics_port}/metrics"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Launch the process; readiness is asked over gRPC by the caller.

        Raises InsufficientResources where the models could not hand on their tensors.
        """
        self.kill()  # what is left of the last process
        self.check_room(self.models)
        self._lines.clear()
        root = _wheel_root()
        self._workplace = workplace = Workplace()
        backends = _backend_directory(root, workplace.path)
        repository = workplace.link(REPOSITORY, self._repository)
        libraries = workplace.link("libraries", root / "nvidia_pytriton.libs")
        command = [
            *(sys.executable, "-I", "-S", str(DIE_WITH_PARENT), str(os.getpid())),
            str(root / "pytriton" / "tritonserver" / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            "--model-control-mode=explicit",
            *(f"--load-model={model}" for model in self.models),
            "--strict-readiness=true",
            "--disable-auto-complete-config",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={self._grpc_port}",
            "--allow-http=false",  # all that we ask goes over gRPC
            "--metrics-address=127.0.0.1",
            f"--metrics-port={self._metrics_port}",
            f"--exit-timeout-secs={EXIT_TIMEOUT_SECONDS}",
            *self._tracing(),
            f"--backend-config=python,shm-region-prefix-name={workplace.shared_memory}",
            # A cold disk or a busy machine takes longer than the usual 30 s to read a model process's libraries.
            f"--backend-config=python,stub-timeout-seconds={START_TIMEOUT_SECONDS:.0f}",
        ]
        log = self._open_log()
        self._process = await asyncio.create_subprocess_exec(
            *command,
            env=_environment(libraries),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=1 << 20,  # bytes of the longest line; a longer one would end the reading
            start_new_session=True,
        )
        self._group = self._process.pid
        self._reader = asyncio.create_task(self._read_log(self._process, log))

    def check_room(self, models: Iterable[str]) -> None:
        """Raises InsufficientResources unless these models fit into the shared memory beside what others hold of it."""
        check_room(self._repository, models, "" if self._workplace is None else self._workplace.shared_memory)

    async def wait(self) -> int:
        """Wait until the child ends; returns its exit code."""
        assert self._process is not None
        # Python before 3.12.5 waits for the end of its output too, which a model process that outlived it keeps open.
        while self._process.returncode is None:
            await asyncio.sleep(_POLL_SECONDS)
        return self._process.returncode

    async def explain_end(self) -> str:
        """How a child has ended and, where its log says an error, that; after its last lines were read."""
        assert self._process is not None and self._reader is not None
        # A model process that outlived the child keeps the pipe open.
        await asyncio.wait([self._reader], timeout=1.0)
        code = self._process.returncode
        assert code is not None
        if code > 0:
            return f"Triton ended with exit code {code}. It said: {self.explain()}"
        # Somebody else's doing: what it said last has nothing to do with it, unless it is an error.
        said = f". Its last error: {self._quoted(errors[-1:])}" if (errors := self._errors()) else ""
        return f"Triton {f'was killed by {_signal_name(-code)}' if code else 'ended with exit code 0'}{said}"

    def with_own_paths(self, said: str) -> str:
        """Triton's words, with the repository called as the user calls it."""
        if self._workplace is None:
            return said
        return said.replace(str(self._workplace.path / REPOSITORY), str(self._repository))

    def explain(self) -> str:
        """In one line what Triton's log says is wrong: why a model failed, or its first error, or its last line."""
        errors = self._errors()
        failed = [error for error in errors if error.startswith("failed to load")]
        said = failed or errors[:1] or [line for line in self._lines if line.strip()][-1:]
        return self._quoted(said) if said else "nothing"

    def _errors(self) -> list[str]:
        errors = [match[1] or match[2] for line in self._lines if (match := _ERROR.match(line))]
        return [error for error in errors if not any(text in error for text in _NO_GPU)]

    def _quoted(self, said: Sequence[str]) -> str:
        more = f"; and {len(said) - 1} models more" if len(said) > 1 else ""
        where = "" if self._log_path is not None else "; --triton-log FILE keeps the rest"
        # Triton writes the lines of a message in one, and a Python backend adds where in its code it failed.
        return self.with_own_paths(said[0].partition("\\n")[0]) + more + where

    async def stop(self) -> None:
        """SIGTERM, wait for the exit timeout, then SIGKILL to the whole group; leaves no file behind."""
        if self._process is not None:
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.terminate()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.wait(), EXIT_TIMEOUT_SECONDS + 5)
            self.kill()
            await self.wait()
        if self._reader is not None:
            await self._reader

    def kill(self) -> None:
        """End the child and its processes at once, whatever they do; leaves no file behind."""
        # Model processes of a killed server outlive it; the group is theirs too. Once: later its number is another's.
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        workplace, self._workplace = self._workplace, None
        if workplace is not None:
            workplace.remove()

    def _tracing(self) -> list[str]:
        if not self._traces_url:
            return []
        settings = ("mode=opentelemetry", "level=TIMESTAMPS", "rate=1")
        own = (f"url={self._traces_url}", "resource=service.name=labelmint-triton")
        return [
            *(f"--trace-config={setting}" for setting in settings),
            *(f"--trace-config=opentelemetry,{setting}" for setting in own),
        ]

    def _open_log(self) -> BinaryIO | None:
        if self._log_path is None:
            return None
        try:
            return self._log_path.open("ab", buffering=0)
        except OSError as error:
            raise UnusableFile(self._log_path, f"cannot be written: {error.strerror}") from error

    async def _read_log(self, process: asyncio.subprocess.Process, log: BinaryIO | None) -> None:
        """Read to the end whatever happens to the file: a full pipe would stop Triton."""
        assert process.stdout is not None
        async for raw in process.stdout:
            self._lines.append(_COLOURS.sub("", raw.decode("utf-8", "replace")).rstrip())
            if log is not None:
                try:
                    log.write(raw)
                except OSError:
                    logger.exception("Triton's log can no longer be written")
                    log.close()
                    log = None
        if log is not None:
            log.close()


async def wait_until_ready(server: TritonServer, stop: asyncio.Event | None = None) -> None:
    """Return when all models that it has by then are ready, or `stop` is set.

    Raises TritonUnavailable with Triton's own words.
    """
    client = TritonClient(server.grpc_url)
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    try:
        while stop is None or not stop.is_set():
            if all([await client.is_ready(model) for model in server.models]):
                return
            if not server.running:
                raise TritonUnavailable(f"Triton could not load the model repository: {await server.explain_end()}")
            if time.monotonic() > deadline:
                raise TritonUnavailable(
                    f"Triton was not ready after {START_TIMEOUT_SECONDS:.0f} s. It said: {server.explain()}"
                )
            await asyncio.sleep(_POLL_SECONDS)
    finally:
        await client.close()


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):  # real-time signals have no names
        return signal.Signals(number).name
    return f"signal {number}"


def _wheel_root() -> Path:
    spec = find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise TritonUnavailable(
            "the nvidia-pytriton wheel, which brings tritonserver, is not installed; "
            "run `pip install '.[triton]'` in a clone of labelmint, or point --triton-url at a running Triton"
        )
    return Path(spec.origin).parent.parent


def _backend_directory(root: Path, directory: Path) -> Path:
    """Copies of the wheel's Python backend, its stub for this Python, and our backends.

    What our backends share goes into the Python backend's folder: all Python-based backends have it on their path.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    triton = root / "pytriton" / "tritonserver"
    stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        known = sorted(path.name for path in stub.parent.parent.iterdir())
        raise TritonUnavailable(f"nvidia-pytriton has no Python {version} stub; use one of {', '.join(known)}")
    backends = directory / "backends"
    python = backends / "python"
    shutil.rmtree(backends, ignore_errors=True)
    shutil.copytree(BACKENDS, backends, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(KERNEL, backends / "labelmint" / KERNEL_NAME, ignore=shutil.ignore_patterns("__pycache__"))
    wheel = triton / "backends" / "python"
    shutil.copytree(wheel, python, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    shutil.copy2(stub, python)
    return backends


def _environment(libraries: Path) -> dict[str, str]:
    """The child's environment: the wheel's libraries, this Python's library and this environment's packages."""
    environment = dict(os.environ)
    directories = [str(libraries)]
    library = sysconfig.get_config_var("LIBDIR")
    if library and sysconfig.get_config_var("Py_ENABLE_SHARED"):
        directories.append(library)
    environment["LD_LIBRARY_PATH"] = os.pathsep.join([*directories, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    # The stub ignores PYTHONPATH; it takes the environment of the first python3 on the PATH.
    bin_directory = str(Path(sys.executable).absolute().parent)
    environment["PATH"] = os.pathsep.join([bin_directory, os.environ.get("PATH", os.defpath)])
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    return environment


def _free_ports(count: int) -> list[int]:
    """Ports of which the kernel gives none to an outgoing connection: while Triton is away nobody takes them by chance.

    Without such ports, any that are free.
    """
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ours = range(first_outgoing * 2 // 3, first_outgoing)
    candidates = [*random.sample(ours, min(len(ours), 64 * count)), *[0] * count]
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        for candidate in candidates:
            each = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # it is taken, or reserved
                each.bind(("127.0.0.1", candidate))
                ports.append(int(each.getsockname()[1]))
            if len(ports) == count:
                break
        return ports
