"""The gateway's own Triton: started on a checked repository, started again when it dies, told what changed on disk.

Rules of this file:
- Only whole models are served: an ensemble whose steps are not the files that its digest names is refused.
- Before each start and each load the models are checked on disk, structure and digests. One that is not whole is left
  out of a new start, and the others are served.
- `reload` makes Triton serve what the repository holds now. New versions come beside the old ones; a version that was
  exchanged in place is withdrawn first, so that no answer under its old digest comes from the new files. So is one that
  a new start finds exchanged.
- What cannot be read changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path

from labelmint.core.errors import LabelmintError, UnusableFile
from labelmint.gateway.sampling.catalog import Catalog
from labelmint.gateway.sampling.metrics import Metrics
from labelmint.tracing import traces_url
from labelmint.triton.client import TritonClient
from labelmint.triton.model_config import ensembles, read_config
from labelmint.triton.repository import read_whole_model
from labelmint.triton.server import TritonServer, wait_until_ready

logger = logging.getLogger(__name__)

_RESTART_PAUSES_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class _OnDisk:
    """What tells whether an ensemble changed: its configuration, and its steps (digest and configurations)."""

    config: bytes
    steps: tuple[str | bytes, ...]


class OwnTriton:
    """A child Triton with all ensembles of one pipeline of a repository."""

    def __init__(self, repository: Path, pipeline: str, log: Path | None, otlp_endpoint: str) -> None:
        """Raises UnusableFile unless the repository holds whole models of that pipeline.

        Triton sends its part of each trace to the OTLP/HTTP receiver at `otlp_endpoint`, if there is one.
        """
        self._repository = repository
        self._pipeline = pipeline
        self._loaded = self._read_repository()
        self._wanted = dict(self._loaded)  # what a new start serves, as it was last served
        self._server = TritonServer(
            repository, list(self._loaded), log, traces_url(otlp_endpoint) if otlp_endpoint else ""
        )
        self._supervisor: asyncio.Task[None] | None = None
        self._reloading = asyncio.Lock()

    @property
    def url(self) -> str:
        return self._server.grpc_url

    @property
    def models(self) -> tuple[str, ...]:
        """Triton's names of the ensembles."""
        return self._server.models

    async def start(self, stop: asyncio.Event) -> None:
        """Return when all models are ready, or `stop` is set; raises TritonUnavailable with Triton's own words."""
        await self._server.start()  # checked by `_read_repository`
        await wait_until_ready(self._server, stop)

    def supervise(self, metrics: Metrics, catalog: Catalog) -> None:
        """From now on start Triton again, after growing pauses, whenever it ends."""
        self._supervisor = asyncio.create_task(self._keep_running(metrics, catalog))

    async def stop(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        await self._server.stop()

    def kill(self) -> None:
        """End it at once."""
        self._server.kill()

    async def reload(self, client: TritonClient, catalog: Catalog) -> None:
        """Load what is new in the repository, unload what is gone, take over what changed; failures go to the log."""
        async with self._reloading:
            try:
                found = await asyncio.to_thread(self._read_repository)
                self._server.check_room(found)
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
            self._server.models = tuple(self._loaded)
            self._wanted = dict(self._loaded)
            if await self._told(catalog.restore()):
                logger.info("the model repository was read again: %s", ", ".join(sorted(self._loaded)))

    async def _load(self, client: TritonClient, name: str, checked: _OnDisk) -> None:
        if await asyncio.to_thread(self._read_model, name) != checked:
            raise UnusableFile(self._repository / name, "changed while it was read; send SIGHUP once it is whole")
        await client.load(name)

    async def _told(self, call: Awaitable[None]) -> bool:
        try:
            await call
        except LabelmintError as error:
            logger.error("%s", self._server.with_own_paths(error.message))
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
        """Raises UnusableFile unless an export wrote it and its steps are the files that its digest names."""
        model = read_whole_model(self._repository, name)
        path = self._repository / name / "config.pbtxt"
        config = read_config(path)
        steps = [self._repository / step.model_name / "config.pbtxt" for step in config.ensemble_scheduling.step]
        return _OnDisk(path.read_bytes(), (model.digest, *(step.read_bytes() for step in steps)))

    def _read_wanted(self) -> dict[str, _OnDisk]:
        """Those of the wanted models that are whole; raises UnusableFile or OSError where none is."""
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
            logger.error("%s is not served until it is whole and SIGHUP comes: %s", name, problem)
        return whole

    async def _keep_running(self, metrics: Metrics, catalog: Catalog) -> None:
        while True:
            try:
                await self._restart_whenever_it_ends(metrics, catalog)
            except Exception:
                logger.exception("the watch over Triton failed; it begins anew")
                await asyncio.sleep(_RESTART_PAUSES_SECONDS[0])

    async def _restart_whenever_it_ends(self, metrics: Metrics, catalog: Catalog) -> None:
        failures = 0
        while True:
            started = time.monotonic()
            await self._server.wait()
            if time.monotonic() - started > 60.0:
                failures = 0
            problem = await self._server.explain_end()
            while problem:
                pause = _RESTART_PAUSES_SECONDS[min(failures, len(_RESTART_PAUSES_SECONDS) - 1)]
                failures += 1
                logger.error("starting Triton again in %.1f s: %s", pause, problem)
                await asyncio.sleep(pause)
                metrics.triton_restarts.inc()
                problem = await self._start_again(catalog)

    async def _start_again(self, catalog: Catalog) -> str:
        """What kept Triton from it; "" when it is ready."""
        try:
            async with self._reloading:
                whole = await asyncio.to_thread(self._read_wanted)
                await catalog.withdraw(name for name in whole if whole[name].steps != self._wanted[name].steps)
                self._loaded, self._server.models = whole, tuple(whole)
                await self._server.start()
                await wait_until_ready(self._server)
                self._wanted |= whole
                await self._told(catalog.restore())
        except (LabelmintError, OSError) as error:
            problem = str(error)
        except Exception:
            logger.exception("Triton could not be started")
            problem = "see above"
        else:
            return ""
        self._server.kill()  # it may hang
        return problem
