"""`labelmint annotate`: opens a directory, starts the page on this machine, and serves it until Ctrl-C.

Rules of this file:
- Only this machine can reach the page: it listens at 127.0.0.1. Its address contains a secret, because other users of
  the machine can reach that too.
- Everything is saved before a request is answered, so ending at any moment loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import socket
import webbrowser
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from labelmint.annotate.app import JobBody, create_app
from labelmint.annotate.job import Job, Plan
from labelmint.annotate.studio import Studio
from labelmint.annotate.workspace import Bound, Workspace, opened
from labelmint.core.errors import CannotListen
from labelmint.core.task import TaskName, task_of
from labelmint.models.annotations import Unlabelled, sha256_of
from labelmint.models.store import load_unconditional

HOST = "127.0.0.1"


async def annotate(
    generator_path: Path,
    directory: Path,
    *,
    task: TaskName,
    layout: str,
    truncation_psi: float,
    annotation_format: str | None,
    unlabelled: Unlabelled,
    port: int,
    open_browser: bool,
) -> None:
    """Serve the page until it is interrupted. Raises UnusableFile, InsufficientResources or CannotListen."""
    generator = load_unconditional(generator_path)
    bound = Bound(sha256_of(generator_path), truncation_psi, task, generator.spec.resolution)
    studio = Studio(generator, layout=layout, truncation_psi=truncation_psi)

    def plan_of(workspace: Workspace, body: JobBody) -> Plan:
        return Plan(
            generator=generator_path,
            directory=workspace.directory,
            model=body.model,
            layout=layout,
            heads=body.heads,
            steps=body.steps,
            seeds=body.seeds,
            truncation_psi=truncation_psi,
            task_options=("--unlabelled", "extend") if task_of(task).has_label_image else ("--task", task),
        )

    with (
        _listening(port) as taken,
        opened(directory, bound, studio.image, annotation_format=annotation_format, unlabelled=unlabelled) as workspace,
    ):
        studio.attach(workspace)
        secret, job = secrets.token_urlsafe(16), Job()
        app = create_app(workspace, studio, job, plan=lambda body: plan_of(workspace, body), secret=secret)
        address = f"http://{HOST}:{taken.getsockname()[1]}/{secret}/"
        server = _Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False))
        server.end_in_peace()
        print(f"{directory}: {len(workspace.drawn)} of {len(workspace.sheets)} images drawn")
        print(f"annotate at {address} (this machine only). Ctrl-C stops", flush=True)
        if open_browser:
            webbrowser.open(address)
        try:
            await server.serve(sockets=[taken])
        finally:
            await asyncio.shield(job.cancel())
            studio.close()


class _Server(uvicorn.Server):
    """uvicorn that ends in peace: Ctrl-C is how this program is meant to end, and not an error."""

    def end_in_peace(self) -> None:
        """Let Ctrl-C end the server from now on, also while it starts."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, setattr, self, "should_exit", True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are captured already


@contextlib.contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((HOST, port))
            taken.listen()  # before the address is told, so that a browser that opens it at once waits
        except OSError as error:
            raise CannotListen(f"{HOST}:{port} cannot be used: {error.strerror}; give another --port") from error
        yield taken
