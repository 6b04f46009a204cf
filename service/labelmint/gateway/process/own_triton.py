"""The gateway's child Triton: starts it on a checked repository, restarts it when it ends, and reloads its models.

Rules of this file:
- Only intact models are served. An ensemble is refused if its digest was not computed from the files of its steps.
- Before each start and each load, the structure and digests of the models are checked on disk. A restart leaves out
  a damaged model and serves the others.
- `reload` makes Triton serve the current content of the repository. New versions are served next to the old ones. A
  version whose files were replaced is withdrawn first, and so is one that a restart finds replaced. Otherwise a
  response under the old digest could come from the new files.
- If `reload` cannot read the repository, it changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from dataclasses import dataclass

from labelmint.core.errors import LabelmintError, UnusableFile
from labelmint.gateway.process.settings import ServeSettings
from labelmint.gateway.sampling.catalog import Catalog
from labelmint.gateway.sampling.metrics import Metrics
from labelmint.tracing import traces_url
from labelmint.triton.artifacts import read_whole_model
from labelmint.triton.client import TritonClient
from labelmint.triton.model_config import ensembles, read_config
from labelmint.triton.server import TritonServer, wait_until_ready

logger = logging.getLogger(__name__)

_RESTART_PAUSES_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class _OnDisk:
    """The state of an ensemble, to detect changes: its configuration, and its steps (digest and configurations)."""

    config: bytes
    steps: tuple[str | bytes, ...]


class OwnTriton:
    """A child Triton that serves all ensembles of one pipeline of a repository."""

    def __init__(self, settings: ServeSettings) -> None:
        """Raises UnusableFile if the repository has no model of the settings' pipeline, or a damaged one."""
        self._repository = settings.model_repository
        self._pipeline = settings.pipeline
        self._loaded = self._read_repository()
        self._wanted = dict(self._loaded)  # the models that a restart serves, in the state that was served last
        self.server = TritonServer(
            self._repository,
            list(self._loaded),
            settings.triton_log,
            executor=settings.executor,
            traces_url=traces_url(settings.otlp_endpoint) if settings.otlp_endpoint else "",
        )
        self._supervisor: asyncio.Task[None] | None = None
        self._reloading = asyncio.Lock()

    async def start(self, stop: asyncio.Event) -> None:
        """Start Triton; return when all models are ready or `stop` is set. Raises TritonUnavailable."""
        await self.server.start()  # `_read_repository` has checked the models
        await wait_until_ready(self.server, stop)

    def supervise(self, metrics: Metrics, catalog: Catalog) -> None:
        """From now on, restart Triton whenever it ends, after growing pauses."""
        self._supervisor = asyncio.create_task(self._keep_running(metrics, catalog))

    async def stop(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        await self.server.stop()

    async def reload(self, client: TritonClient, catalog: Catalog) -> None:
        """Load new models of the repository, unload removed ones and reload changed ones. Failures are logged."""
        async with self._reloading:
            try:
                found = await asyncio.to_thread(self._read_repository)
                self.server.check_room(found)
            except (LabelmintError, OSError) as error:
                logger.error("the model repository was not read again, nothing changes: %s", error)
                return
            exchanged = {
                name for name, old in self._loaded.items() if name not in found or found[name].steps != old.steps
            }
            changed = {name for name, new in found.items() if self._loaded.get(name) != new}
            await catalog.withdraw(exchanged)
            for name in sorted(exchanged):
                if await self._told(client.unload(name)):
                    del self._loaded[name]
            for name in sorted(changed):
                if await self._told(self._load(client, name, found[name])):
                    self._loaded[name] = found[name]
            self.server.models = tuple(self._loaded)
            self._wanted = dict(self._loaded)
            if await self._told(catalog.restore()):
                logger.info("the model repository was read again: %s", ", ".join(sorted(self._loaded)))

    async def _load(self, client: TritonClient, name: str, checked: _OnDisk) -> None:
        if await asyncio.to_thread(self._read_model, name) != checked:
            raise UnusableFile(self._repository / name, "changed while it was read; send SIGHUP once it is complete")
        await asyncio.to_thread(self.server.show, [name])
        await client.load(name)

    async def _told(self, call: Awaitable[None]) -> bool:
        try:
            await call
        except LabelmintError as error:
            logger.error("%s", self.server.with_own_paths(error.message))
            return False
        return True

    def _read_repository(self) -> dict[str, _OnDisk]:
        found = {}
        for name, config in ensembles(self._repository).items():
            if config.parameters["pipeline"].string_value != self._pipeline:
                continue
            found[name] = self._read_model(name)
        if not found:
            raise UnusableFile(self._repository, f"holds no {self._pipeline} ensemble; export the model again")
        return found

    def _read_model(self, name: str) -> _OnDisk:
        """Raises UnusableFile unless an export wrote the model and its steps match its digest."""
        model = read_whole_model(self._repository, name)
        path = self._repository / name / "config.pbtxt"
        config = read_config(path)
        steps = [self._repository / step.model_name / "config.pbtxt" for step in config.ensemble_scheduling.step]
        return _OnDisk(path.read_bytes(), (model.digest, *(step.read_bytes() for step in steps)))

    def _read_wanted(self) -> dict[str, _OnDisk]:
        """Return the intact ones of the wanted models. Raises UnusableFile or OSError if there are none."""
        whole: dict[str, _OnDisk] = {}
        problems: dict[str, Exception] = {}
        for name in self._wanted:
            try:
                whole[name] = self._read_model(name)
            except (LabelmintError, OSError) as error:
                problems[name] = error
        if not whole:
            raise next(iter(problems.values()))
        for name, problem in problems.items():
            logger.error("%s is not served; repair it and send SIGHUP: %s", name, problem)
        return whole

    async def _keep_running(self, metrics: Metrics, catalog: Catalog) -> None:
        while True:
            try:
                await self._restart_whenever_it_ends(metrics, catalog)
            except Exception:
                logger.exception("the supervision of Triton failed; it starts again")
                await asyncio.sleep(_RESTART_PAUSES_SECONDS[0])

    async def _restart_whenever_it_ends(self, metrics: Metrics, catalog: Catalog) -> None:
        failures = 0
        while True:
            started = time.monotonic()
            await self.server.wait()
            if time.monotonic() - started > 60.0:
                failures = 0
            problem = await self.server.explain_end()
            while problem:
                pause = _RESTART_PAUSES_SECONDS[min(failures, len(_RESTART_PAUSES_SECONDS) - 1)]
                failures += 1
                logger.error("starting Triton again in %.1f s: %s", pause, problem)
                await asyncio.sleep(pause)
                metrics.triton_restarts.inc()
                problem = await self._start_again(catalog)

    async def _start_again(self, catalog: Catalog) -> str:
        """Start Triton again and wait until it is ready. Return what prevented that, or "" on success."""
        try:
            async with self._reloading:
                whole = await asyncio.to_thread(self._read_wanted)
                await catalog.withdraw(name for name in whole if whole[name].steps != self._wanted[name].steps)
                self._loaded, self.server.models = whole, tuple(whole)
                await self.server.start()
                await wait_until_ready(self.server)
                self._wanted |= whole
                await self._told(catalog.restore())
        except (LabelmintError, OSError) as error:
            problem = str(error)
        except Exception:
            logger.exception("Triton could not be started")
            problem = "see the error above"
        else:
            return ""
        self.server.kill()  # it may hang
        return problem
