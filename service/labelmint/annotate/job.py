"""From annotations to a running service: the commands of `labelmint`, run one after the other as child processes.

Rules of this file:
- The page shows the commands that it runs. So what it makes is what the commands make, byte for byte.
- There is one job at a time. Cancelling ends the running command. `fit` keeps its checkpoint, and resumes if nothing
  was drawn since then and the options are the same; else it begins again.
- Progress is what the commands show: the percentage of the progress bar that has the step's name.
- The service runs until it is stopped or the page's program ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from labelmint.core.errors import CannotSave, ChangedElsewhere
from labelmint.models.annotations import json_text, sha256_of, write_json

State = Literal["idle", "running", "failed", "cancelled", "serving"]
INTERPRETER = "interpreter.safetensors"
STEPS = ("fit", "export", "calibrate", "serve")
GRACE_SECONDS = 15.0
_FIT_READS = ("dataset.json", "classes.json", "masks/*.png", "keypoints.json", "keypoints.csv")
_BAR = re.compile(r"(\w[\w ]*): +(\d{1,3})%\|")  # its name and percentage, as tqdm writes them
_READY = re.compile(r"REST (http://\S+) ")
_TAIL = 2_000  # characters of a failed command's output


@dataclass(frozen=True)
class Plan:
    """What is fitted, and how. `task_options` are those of `labelmint fit` for the directory's task."""

    generator: Path
    directory: Path
    model: str
    layout: str
    heads: int
    steps: int
    seeds: int  # of the calibration
    truncation_psi: float
    task_options: tuple[str, ...]

    @property
    def build(self) -> Path:
        """The directory of everything that the commands make."""
        return self.directory / "build"

    def commands(self) -> dict[str, list[str]]:
        """The arguments of `labelmint` for each step."""
        interpreter, repository = str(self.build / INTERPRETER), str(self.build / "model_repository")
        generator = ["--generator", str(self.generator)]
        fit = ["--annotations", str(self.directory), "--layout", self.layout, "--heads", str(self.heads)]
        fit += ["--steps", str(self.steps), *self.task_options]
        at = ["--model-repository", repository]
        calibrate = ["--count", str(self.seeds), "--truncation-psi", f"{self.truncation_psi:g}"]
        return {
            "fit": ["fit", *generator, *fit, interpreter],
            "export": ["export", *generator, "--interpreter", interpreter, *at, self.model],
            "calibrate": ["calibrate", *at, *calibrate, self.model],
            "serve": ["serve", *at],
        }

    def lines(self) -> list[str]:
        """The commands as a person types them."""
        return [shlex.join(["labelmint", *arguments]) for arguments in self.commands().values()]


@dataclass(frozen=True)
class Status:
    """`share` is the share of the running step that is done, 0 to 1. `url` is that of the service, once it answers."""

    state: State = "idle"
    step: str = ""
    share: float = 0.0
    message: str = ""
    url: str = ""


class Job:
    """The one job of a page."""

    def __init__(self) -> None:
        self.status = Status()
        self._task: asyncio.Task[None] | None = None

    def start(self, plan: Plan) -> None:
        """Begin the commands of a plan.

        Raises ChangedElsewhere if a job is running or its service is, and CannotSave.
        """
        if self._task is not None and not self._task.done():
            raise ChangedElsewhere("a job is running, perhaps started in another tab; cancel it first")
        try:
            _put_other_checkpoint_aside(plan)
        except OSError as error:
            raise CannotSave(Path(error.filename or plan.directory), error) from error
        self.status = Status("running", STEPS[0])
        self._task = asyncio.create_task(self._run(plan))

    async def cancel(self) -> None:
        """End the running command, or the service, and wait for its end."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self, plan: Plan) -> None:
        try:
            for step, arguments in plan.commands().items():
                self.status = Status("running", step)
                ports = ["--http-port", "0", "--grpc-port", "0", "--log-format", "json"] if step == "serve" else []
                code, output = await self._command([*arguments, *ports])
                if code != 0 or step == "serve":  # a service that ends by itself has failed too
                    self.status = Status("failed", step, message=output)
                    return
        except asyncio.CancelledError:
            self.status = replace(self.status, state="cancelled", url="")
        except OSError as error:
            self.status = replace(self.status, state="failed", message=str(error))

    async def _command(self, arguments: Sequence[str]) -> tuple[int, str]:
        """Run one command to its end; returns its exit code and the end of its output."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "labelmint.cli",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert process.stdout is not None
        tail = ""
        try:
            while chunk := await process.stdout.read(4096):
                text = chunk.decode(errors="replace")
                self._look(text)
                tail = (tail + text)[-_TAIL:]
            return await process.wait(), _last_lines(tail)
        except asyncio.CancelledError:
            await _end(process)
            raise

    def _look(self, text: str) -> None:
        """Take progress and the address of the service from what a command prints."""
        if found := [int(percent) for name, percent in _BAR.findall(text) if name == self.status.step]:
            self.status = replace(self.status, share=min(found[-1], 100) / 100)
        if self.status.step == "serve" and (ready := _READY.search(text)):
            self.status = replace(self.status, state="serving", share=1.0, url=ready[1])


def _put_other_checkpoint_aside(plan: Plan) -> None:
    """Rename the checkpoint of a cancelled `fit` unless the new one has the same options and drawings.

    `fit` itself refuses the checkpoint of another run, and leaves it to the person to remove it. On the page, the
    person has drawn on, or changed the numbers, and wants a new run. The old checkpoint stays as a file.
    """
    plan.build.mkdir(exist_ok=True)
    read = [path for name in _FIT_READS for path in sorted(plan.directory.glob(name))]
    drawn = {str(path.relative_to(plan.directory)): sha256_of(path) for path in read}
    now = {"layout": plan.layout, "heads": plan.heads, "steps": plan.steps, "drawn": drawn}
    begun, checkpoint = plan.directory / "begun.json", plan.build / f"{INTERPRETER}.checkpoint"
    same = begun.exists() and begun.read_text() == json_text(now)
    write_json(begun, now)
    if not same and checkpoint.exists():
        checkpoint.replace(checkpoint.with_name(f"{checkpoint.name}.old"))


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), GRACE_SECONDS)
    except asyncio.TimeoutError:
        process.kill()
        await process.wait()


def _last_lines(text: str) -> str:
    """The last three lines that are neither empty nor a progress bar; a JSON line's message."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    return "\n".join([_message(line) for line in lines if line and not _BAR.search(line)][-3:])


def _message(line: str) -> str:
    if line.startswith("{"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return str(json.loads(line)["message"])
    return line
