"""Containers run by runc from the root file systems of images, alone in a network, as a manifest or compose.yaml says.

Rules of this file:
- What a manifest asks of a container is either done here or refused, so that no test passes because of an omission.
- The containers of one `Network` reach each other on its loopback interface under the names that /etc/hosts gives, as
  the containers of a pod would. Their ports are free on every machine, because no other process is in that network.
- No container has a capability, a device of the machine, or a way to new privileges.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.images import ROOT_WORDS, Store, as_root
from tests.support.waiting import wait_for

# Brings the loopback interface up, tells its own pid, and keeps the network until its input ends.
_HOLD = """
import fcntl, os, socket, struct, sys
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 1 | 64))  # SIOCSIFFLAGS: IFF_UP, IFF_RUNNING
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Network:
    """A network that has only its loopback interface."""

    pid: int
    hosts: Path

    def words(self, *command: str | Path) -> list[str]:
        """Return a command that runs another one in this network."""
        return [*ROOT_WORDS, "nsenter", f"--net=/proc/{self.pid}/ns/net", *map(str, command)]

    def curl(self, url: str) -> bytes:
        """Return the body of a successful answer. Raises CalledProcessError otherwise."""
        here = ("--connect-to", "::127.0.0.1:")  # every name is this network
        command = self.words("curl", "--silent", "--show-error", "--fail", "--max-time", "120", *here, url)
        return subprocess.run(command, capture_output=True, check=True, env={"PATH": os.environ["PATH"]}).stdout

    def answers(self, url: str) -> bool:
        try:
            self.curl(url)
        except subprocess.CalledProcessError:
            return False
        return True


@contextmanager
def network(directory: Path, *names: str) -> Iterator[Network]:
    """Make a network in which `names` are this network itself."""
    hosts = directory / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {' '.join(names)}\n")
    command = [*ROOT_WORDS, "unshare", "--net", sys.executable, "-c", _HOLD]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdin is not None and holder.stdout is not None
    try:
        yield Network(int(holder.stdout.readline()), hosts)
    finally:
        holder.stdin.close()
        holder.wait(10)


@dataclass(frozen=True)
class Mount:
    """A directory or file of this machine, or without a source a new file system in memory."""

    target: str
    source: Path | None = None
    read_only: bool = False
    size: str = ""

    def of_runtime(self) -> dict[str, object]:
        if self.source is not None:
            options = ["rbind", "ro" if self.read_only else "rw", "nosuid", "nodev"]
            return {"destination": self.target, "type": "bind", "source": str(self.source), "options": options}
        options = ["nosuid", "nodev", "mode=1777", *([f"size={self.size}"] if self.size else [])]
        return {"destination": self.target, "type": "tmpfs", "source": "tmpfs", "options": options}


@dataclass(frozen=True)
class Spec:
    """What one container is: the image, and what a manifest adds to it. None is what the image says."""

    image: str
    entrypoint: Sequence[str] | None = None
    arguments: Sequence[str] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    read_only: bool = False
    mounts: Sequence[Mount] = ()
    shared_memory: str = "64m"  # Docker's and Kubernetes' default


class Container:
    """A running container. `log` has what it prints."""

    def __init__(self, bundle: Path, spec: Spec) -> None:
        self.name = f"labelmint-{uuid.uuid4().hex[:12]}"
        self.spec = spec
        self.log_path = bundle / "log"
        self._runc = [*ROOT_WORDS, "runc", "--root", str(bundle / "state")]
        with self.log_path.open("w") as log:
            command = [*self._runc, "run", "--bundle", str(bundle), self.name]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def wait(self, seconds: float = 120.0) -> int:
        return self.process.wait(seconds)

    def until_answers(self, net: Network, url: str) -> None:
        """Wait until the URL answers. Raises AssertionError with the log if it does not, or if the container ends."""
        try:
            wait_for(lambda: net.answers(url) or self.process.poll() is not None, 180)
        except AssertionError as error:
            raise AssertionError(f"{url} does not answer: {self.log}") from error
        assert self.process.poll() is None, self.log

    def signal(self, number: int) -> None:
        as_root(*self._runc[len(ROOT_WORDS) :], "kill", self.name, str(number))

    def stop(self) -> int:
        """Ask the container to end, as a kubelet and `docker stop` do. Returns its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.wait()


@contextmanager
def running(store: Store, net: Network, spec: Spec, bundle: Path) -> Iterator[Container]:
    """Run a container, and end it afterwards."""
    bundle.mkdir()
    (bundle / "config.json").write_text(json.dumps(_runtime_config(store, net, spec)))
    container = Container(bundle, spec)
    try:
        yield container
    finally:
        container.kill()


def run(store: Store, net: Network, spec: Spec, bundle: Path) -> str:
    """Run a container to its end; return what it printed. Raises AssertionError if it fails."""
    with running(store, net, spec, bundle) as container:
        assert container.wait() == 0, container.log
        return container.log


def command_of(config: Mapping[str, list[str]], spec: Spec) -> list[str]:
    """Return the words to run. An entry point of the manifest's own leaves out the image's command."""
    entrypoint = config.get("Entrypoint") or [] if spec.entrypoint is None else list(spec.entrypoint)
    command = (config.get("Cmd") or []) if spec.entrypoint is None else []
    return [*entrypoint, *(command if spec.arguments is None else spec.arguments)]


def _runtime_config(store: Store, net: Network, spec: Spec) -> dict[str, object]:
    config = store.inspect(spec.image)["OCIv1"]["config"]
    user, _, group = (spec.user or config.get("User") or "0:0").partition(":")
    environment = {**dict(each.split("=", 1) for each in config["Env"]), **spec.environment}
    memory = ["nosuid", "nodev", "noexec", "mode=1777", f"size={spec.shared_memory}"]
    mounts: list[dict[str, object]] = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": memory},
        {"destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind", "ro"]},
        Mount("/etc/hosts", net.hosts, read_only=True).of_runtime(),
        *(mount.of_runtime() for mount in spec.mounts),
    ]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": int(user), "gid": int(group or user)},
            "args": command_of(config, spec),
            "env": [f"{key}={value}" for key, value in environment.items()],
            "cwd": config.get("WorkingDir") or "/",
            "capabilities": {each: [] for each in ("bounding", "effective", "inheritable", "permitted", "ambient")},
            "noNewPrivileges": True,
        },
        "root": {"path": str(store.root(spec.image)), "readonly": spec.read_only},
        "mounts": mounts,
        "linux": {
            "namespaces": [
                *({"type": kind} for kind in ("pid", "ipc", "uts", "mount")),
                {"type": "network", "path": f"/proc/{net.pid}/ns/net"},
            ]
        },
    }
