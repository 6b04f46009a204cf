"""Runs the `tritonserver` of the nvidia-pytriton wheel as a child process.

Rules of this file:
- The wheel's files stay unchanged. The backend directory is a copy in the run's `Workplace`, because Triton refuses a
  backend library that is a link out of its directory. Triton never gets a user's path, only links to it.
- The child loads every model that it is given. The code that starts it must check the models before (`artifacts`).
- The child listens on loopback only, runs in its own process group, and ends when this process ends.
- The last lines of Triton's log are kept. When a start fails, the error quotes Triton's reason in one line.
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
from labelmint.core.executor import ONNXRUNTIME, Choice
from labelmint.kernel import interpreter
from labelmint.triton.client import TritonClient
from labelmint.triton.mirror import Mirror
from labelmint.triton.shared_memory import check_room
from labelmint.triton.workplace import Workplace

logger = logging.getLogger(__name__)

BACKENDS = Path(__file__).parent / "backends"
KERNEL = Path(interpreter.__file__).parent  # the `labelmint` backend imports it under the name below
KERNEL_NAME = "labelmint_kernel"
DIE_WITH_PARENT = Path(__file__).parent / "die_with_parent.py"
REPOSITORY = "repository"  # the name of the directory that Triton gets
EXIT_TIMEOUT_SECONDS = 20
START_TIMEOUT_SECONDS = 180.0
_POLL_SECONDS = 0.1
_LOG_LINES = 400
# Triton's error lines, and the last line of a C++ program that ends by an exception.
_ERROR = re.compile(r'E[01]\d{3} \S+ +\d+ \S+\] "?(.*?)"?$|\s*what\(\): +(.*)$')
_COLOURS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
# Triton logs these as errors on every machine without a GPU.
_NO_GPU = ("CudaDriverHelper", "CUDA driver version")
_LOCK_TIMED_OUT = "boost::interprocess::lock_exception"
_MAX_STARTS = 3


class TritonServer:
    """One tritonserver child. Serves gRPC at `grpc_url` and metrics at `metrics_url`."""

    def __init__(
        self,
        repository: Path,
        models: Sequence[str],
        log_path: Path | None = None,
        *,
        executor: Choice = ONNXRUNTIME,
        traces_url: str = "",
    ) -> None:
        """Each start loads `models` of `repository`. They are Triton names; an ensemble includes its steps.

        With the `executor` "kernel", the kernel runs the interpreters that it can run. By default, every step runs in
        the backend that the repository names, as in any other Triton.
        `log_path` receives Triton's whole log. Without it, only the last lines are kept, for error messages.
        `traces_url` receives Triton's spans of requests with a trace, over OTLP/HTTP.
        """
        self.models = tuple(models)
        self._repository = repository
        self._executor: Choice = executor
        self._told: set[str] = set()  # why the kernel does not run a step, as logged before
        self._mirror: Mirror | None = None
        self._log_path = log_path
        self._traces_url = traces_url
        self._process: asyncio.subprocess.Process | None = None
        self._group: int | None = None  # the process group to kill
        self._reader: asyncio.Task[None] | None = None
        self._lines: deque[str] = deque(maxlen=_LOG_LINES)
        self._workplace: Workplace | None = None  # exists from a start until all processes of the run ended
        # Chosen once: clients reach the child at the same ports after a restart.
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
        """Launch the process. The caller checks readiness over gRPC.

        Raises InsufficientResources if the shared memory is too small for the models' tensors.
        """
        self.kill()  # ends what is left of the last run
        self.check_room(self.models)
        self._lines.clear()
        root = _wheel_root()
        self._workplace = workplace = Workplace()
        backends = _backend_directory(root, workplace.path)
        repository = workplace.path / REPOSITORY
        self._mirror = Mirror(self._repository, repository, self._executor, told=self._told)
        await asyncio.to_thread(self.show, self.models)
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
            "--allow-http=false",  # the gateway uses only gRPC
            "--metrics-address=127.0.0.1",
            f"--metrics-port={self._metrics_port}",
            f"--exit-timeout-secs={EXIT_TIMEOUT_SECONDS}",
            *self._tracing(),
            f"--backend-config=python,shm-region-prefix-name={workplace.shared_memory}",
            # On a cold disk or a busy machine, a model process reads its libraries for more than the default 30 s.
            f"--backend-config=python,stub-timeout-seconds={START_TIMEOUT_SECONDS:.0f}",
        ]
        log = self._open_log()
        self._process = await asyncio.create_subprocess_exec(
            *command,
            env=_environment(libraries),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=1 << 20,  # bytes of the longest line; a longer one would end the reading of the log
            start_new_session=True,
        )
        self._group = self._process.pid
        self._reader = asyncio.create_task(self._read_log(self._process, log))

    def show(self, models: Iterable[str]) -> None:
        """Let Triton see the current files of these ensembles when it loads them next. Raises UnusableFile."""
        assert self._mirror is not None
        self._mirror.show(models)

    def check_room(self, models: Iterable[str]) -> None:
        """Raises InsufficientResources unless the free shared memory is enough for these models."""
        check_room(self._repository, models, "" if self._workplace is None else self._workplace.shared_memory)

    async def wait(self) -> int:
        """Wait until the child ends; returns its exit code."""
        assert self._process is not None
        # Python before 3.12.5 also waits for the end of the output, and a surviving model process keeps that open.
        while self._process.returncode is None:
            await asyncio.sleep(_POLL_SECONDS)
        return self._process.returncode

    async def explain_end(self) -> str:
        """Read the last lines of the log; return how the child ended, with an error from its log if there is one."""
        assert self._process is not None and self._reader is not None
        # A model process that outlives the child keeps the pipe open, so this wait has a limit.
        await asyncio.wait([self._reader], timeout=1.0)
        code = self._process.returncode
        assert code is not None
        if code > 0:
            return f"Triton ended with exit code {code}. It said: {self.explain()}"
        # Something outside ended Triton. Its last log line is unrelated, unless it is an error.
        said = f". Its last error: {self._quoted(errors[-1:])}" if (errors := self._errors()) else ""
        return f"Triton {f'was killed by {_signal_name(-code)}' if code else 'ended with exit code 0'}{said}"

    def with_own_paths(self, said: str) -> str:
        """Return a message of Triton with the repository's path as the user gave it."""
        if self._workplace is None:
            return said
        return said.replace(str(self._workplace.path / REPOSITORY), str(self._repository))

    def explain(self) -> str:
        """Return one line of Triton's log: why a model failed to load, or the first error, or the last line."""
        errors = self._errors()
        failed = [error for error in errors if error.startswith("failed to load")]
        said = failed or errors[:1] or [line for line in self._lines if line.strip()][-1:]
        return self._quoted(said) if said else "nothing"

    def _errors(self) -> list[str]:
        errors = [match[1] or match[2] for line in self._lines if (match := _ERROR.match(line))]
        return [error for error in errors if not any(text in error for text in _NO_GPU)]

    def _quoted(self, said: Sequence[str]) -> str:
        more = f"; and {len(said) - 1} more models" if len(said) > 1 else ""
        where = "" if self._log_path is not None else "; --triton-log FILE keeps the whole log"
        # Triton joins the lines of a message with a literal \n. A Python backend adds lines that say where it failed.
        return self.with_own_paths(said[0].partition("\\n")[0]) + more + where

    async def stop(self) -> None:
        """Send SIGTERM, wait for the exit timeout, then SIGKILL the whole group. Leaves no file behind."""
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
        """Kill the child and its processes at once. Leaves no file behind."""
        # Model processes outlive a killed server but are in its group. Kill once: the group's number may be reused.
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
        """Read the pipe to its end even if the file cannot be written: a full pipe would block Triton."""
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
    """Return when all current `models` of the server are ready, or `stop` is set.

    Triton aborts if it waits for ten seconds for the lock of its shared memory, which happens on a busy machine. It is
    then started again, twice at most. Raises TritonUnavailable with Triton's own message.
    """
    client = TritonClient(server.grpc_url)
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    starts = 1
    try:
        while stop is None or not stop.is_set():
            if all([await client.is_ready(model) for model in server.models]):
                return
            if not server.running:
                ended = await server.explain_end()
                if _LOCK_TIMED_OUT not in ended or starts == _MAX_STARTS:
                    raise TritonUnavailable(f"Triton could not load the model repository: {ended}")
                logger.warning("Triton waited too long for the lock of its shared memory; starting it again")
                starts += 1
                await server.start()
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
    """Copy the wheel's Python backend, its stub for this Python version, and labelmint's backends.

    Code that labelmint's backends share goes into the Python backend's folder, which is on the path of all Python-based
    backends.
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
    """Return the child's environment: with the wheel's libraries, this Python's library and its packages."""
    environment = dict(os.environ)
    directories = [str(libraries)]
    library = sysconfig.get_config_var("LIBDIR")
    if library and sysconfig.get_config_var("Py_ENABLE_SHARED"):
        directories.append(library)
    environment["LD_LIBRARY_PATH"] = os.pathsep.join([*directories, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    # The stub ignores PYTHONPATH. It uses the environment of the first python3 on the PATH.
    bin_directory = str(Path(sys.executable).absolute().parent)
    environment["PATH"] = os.pathsep.join([bin_directory, os.environ.get("PATH", os.defpath)])
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    return environment


def _free_ports(count: int) -> list[int]:
    """Return free ports that the kernel gives to no outgoing connection. They thus stay free while Triton restarts.

    If there are none, return any free ports.
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
