"""The models that Triton has ready, in all their versions, kept up to date.

Rules of this file:
- Triton's model configurations are the only source. Requests, however many, cause at most one read per second. A
  request in between is answered at once from the last read.
- No request waits long for a Triton that hangs. The last known models stay valid until the read fails; then Triton
  counts as unavailable.
- A name and a version identify one digest, so a client that began with it never gets samples of another digest. If
  Tritons differ, the served digest stays served as long as one of them has it.
- A malformed model is skipped and logged once. The other models are still served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Mapping
from copy import copy
from typing import TypeAlias

from tritonclient.grpc import model_config_pb2 as pb

from labelmint.core.errors import LabelmintError, ModelNotFound, ModelVersionGone, TritonUnavailable
from labelmint.core.executor import Executor, executor_at
from labelmint.core.served_model import MalformedModel, ServedModel, is_labelmint, read_served_model
from labelmint.triton.client import TritonClient

logger = logging.getLogger(__name__)

_REFRESH_SECONDS = 1.0
# The longest time that `refresh` waits for a read in progress.
_PATIENCE_SECONDS = 0.5

Key: TypeAlias = tuple[str, int]


class Catalog:
    """The served models of one pipeline ("fused" or "staged"), by name and version."""

    def __init__(self, triton: TritonClient, pipeline: str) -> None:
        self._triton = triton
        self._pipeline = pipeline
        # The models of Triton's last answer. An outage does not clear them: pinned versions are known again afterwards.
        self._models: dict[Key, ServedModel] = {}
        # Models that only unavailable Tritons had, while others answer. A pinned version of these is not gone.
        self._missing: dict[Key, ServedModel] = {}
        # Until the first read, no model may be reported as unknown.
        self._failure: LabelmintError | None = TritonUnavailable("the models are being read; try again in a moment")
        self._lost = False  # it was ready and no longer is, which was logged
        self._withdrawn: frozenset[str] = frozenset()  # names in Triton
        self._changing: frozenset[str] = frozenset()  # the model names of the withdrawn ensembles
        self._reported: set[str] = set()
        self._asked = float("-inf")
        self._asking = asyncio.Lock()
        self._look: asyncio.Task[None] | None = None

    def known(self) -> list[ServedModel]:
        """The models of Triton's last answer, sorted by name and version; none during an outage."""
        return [] if self._failure is not None else [self._models[key] for key in sorted(self._models)]

    async def refresh(self) -> None:
        """Read Triton's models unless the last second had a read; raises TritonUnavailable during an outage."""
        if self._look is None or (self._look.done() and time.monotonic() - self._asked >= _REFRESH_SECONDS):
            self._begin_look()
        await self._wait_for_look(_PATIENCE_SECONDS)
        self._raise_failure()

    async def refresh_anew(self) -> None:
        """Wait for the end of a read that begins after this call; raises as `refresh` does."""
        arrived = time.monotonic()
        while self._asked < arrived:
            await self._wait_for_look()
            pause = self._asked + _REFRESH_SECONDS - time.monotonic()
            if pause > 0:  # another caller may begin the read meanwhile
                await asyncio.sleep(pause)
            else:
                self._begin_look()
        await self._wait_for_look()
        self._raise_failure()

    async def get(self, name: str, version: str = "") -> ServedModel:
        """The model of that name and version ("" for the highest); raises ModelNotFound or TritonUnavailable.

        Triton is read again, at most once a second, before a model is reported as unknown.
        """
        found = self._find(name, version)
        if found is None or self._failure is not None:
            await self.refresh()
            found = self._find(name, version)
        if found is not None:
            return found
        if name in self._changing:
            raise TritonUnavailable(f"model {name!r} is being reloaded; try again in a moment")
        versions = tuple(str(number) for known, number in sorted(self._models) if known == name)
        if versions:
            raise ModelNotFound(name, versions, version)
        raise ModelNotFound(name, tuple(sorted({known for known, _ in self._models})))

    async def list(self) -> list[ServedModel]:
        """All models, sorted by name and version; raises TritonUnavailable."""
        await self.refresh()
        return self.known()

    def check_pinned(self, model: ServedModel) -> None:
        """Raises ModelVersionGone if the version of `model` was removed or now has a different digest."""
        current = self._models.get(_key(model)) or self._missing.get(_key(model))
        if current is None or current.digest != model.digest:
            raise ModelVersionGone(model.name, model.version, model.digest)

    async def check_lost(self, model: ServedModel) -> None:
        """After a failed call: raises ModelVersionGone if Triton answers but no longer has this version."""
        with contextlib.suppress(LabelmintError):  # in an outage the last known models still count
            await self.refresh_anew()
        self.check_pinned(model)

    async def withdraw(self, triton_names: Iterable[str]) -> None:
        """Stop serving these, whatever Triton reports, until `restore`: they are about to change in Triton."""
        async with self._asking:  # a read in progress may return the old state
            self._withdrawn = frozenset(triton_names)
            kept = {key: model for key, model in self._models.items() if model.triton_name not in self._withdrawn}
            self._changing = frozenset(name for name, _ in self._models.keys() - kept.keys())
            self._replace(kept)

    async def restore(self) -> None:
        """End `withdraw` and read Triton's models at once; raises TritonUnavailable as `refresh` does."""
        async with self._asking:
            self._withdrawn = frozenset()
            await self._ask()
            self._changing = frozenset()
        self._raise_failure()

    def _begin_look(self) -> None:
        async def look() -> None:
            async with self._asking:
                await self._ask()

        self._asked = time.monotonic()
        self._look = asyncio.create_task(look())

    async def _wait_for_look(self, seconds: float | None = None) -> None:
        if self._look is not None:
            done, _ = await asyncio.wait([self._look], timeout=seconds)
            for look in done:
                look.result()

    async def _ask(self) -> None:
        self._asked = time.monotonic()
        before, self._failure = self._failure, await self._read()
        if before is None and self._failure is not None:
            self._lost = True
            logger.warning("not ready: %s", self._failure.message)
        elif self._lost and self._failure is None:
            self._lost = False
            logger.warning("ready again: Triton at %s", self._triton.url)

    def _find(self, name: str, version: str) -> ServedModel | None:
        if version:
            key = name, int(version) if version.isdecimal() and len(version) < 20 else -1
            return self._models.get(key) or self._missing.get(key)
        versions = [number for known, number in self._models if known == name]
        return self._models[name, max(versions)] if versions else None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise copy(self._failure)  # a copy for each caller, because exceptions collect tracebacks

    async def _read(self) -> LabelmintError | None:
        """Read and adopt Triton's models; returns the error if that failed."""
        try:
            models = self._read_models(await self._triton.model_configs())
        except LabelmintError as error:
            return error
        if not models and not self._withdrawn:
            return TritonUnavailable(f"Triton at {self._triton.url} has no {self._pipeline} labelmint model ready")
        self._missing = {
            key: model
            for key, model in {**self._missing, **self._models}.items()
            if key not in models and self._triton.may_return(model.triton_name, model.version, model.digest)
        }
        self._replace(models)
        if not models:
            return TritonUnavailable("the models are being reloaded; try again in a moment")
        return None

    def _read_models(self, configs: Mapping[tuple[str, str], Mapping[str, pb.ModelConfig]]) -> dict[Key, ServedModel]:
        models: dict[Key, ServedModel] = {}
        for (triton_name, version), by_address in sorted(configs.items()):
            if triton_name in self._withdrawn:
                continue
            found = {
                address: model
                for address, config in by_address.items()
                if (model := self._parse(config, version, executor_at(configs, config, address)))
            }
            if not found:
                continue
            model = self._choose(found)
            twin = models.setdefault(_key(model), model)
            if twin is not model:
                self._report(f"left out: {triton_name} is version {version} of {model.name}, as is {twin.triton_name}")
        return models

    def _parse(self, config: pb.ModelConfig, version: str, executor: Executor) -> ServedModel | None:
        """None if the model is not a labelmint model, belongs to the other pipeline, or is malformed."""
        if not is_labelmint(config) or config.parameters["pipeline"].string_value != self._pipeline:
            return None
        try:
            return read_served_model(config, version, executor)
        except MalformedModel as error:
            self._report(f"left out: {error}")
            return None

    def _choose(self, found: Mapping[str, ServedModel]) -> ServedModel:
        """Choose among the models that Tritons have under one name and version; `found` is by address.

        The served model stays. Otherwise the model that most Tritons have wins, and among equals the smallest digest.
        """
        models = list(found.values())
        first = models[0]
        if all(model == first for model in models):
            return first
        current = self._models.get(_key(first))
        best = min(models, key=lambda model: (model != current, -models.count(model), model.digest))
        told = ", ".join(f"{model.digest[:12]} at {address}" for address, model in sorted(found.items()))
        if any(model.digest != best.digest for model in models):
            self._report(
                f"Tritons at {self._triton.url} differ in {first.triton_name} version {first.version}: digest {told}. "
                f"{best.digest[:12]} is served as long as one has it; export different weights as a different version"
            )
        return best

    def _replace(self, models: dict[Key, ServedModel]) -> None:
        for key in sorted(self._models.keys() | models.keys()):
            old, new = self._models.get(key), models.get(key)
            if old is not None and (new is None or new.digest != old.digest):
                logger.info("no longer served: %s version %s, digest %s", old.name, old.version, old.digest[:12])
            if new is not None and (old is None or new.digest != old.digest):
                logger.info("serving %s version %s, digest %s", new.name, new.version, new.digest[:12])
        self._models = models

    def _report(self, problem: str) -> None:
        if problem not in self._reported:
            self._reported.add(problem)
            logger.error("%s", problem)


def _key(model: ServedModel) -> Key:
    return model.name, int(model.version)
