"""The models that Triton has ready, kept in step with it.

Rules of this file:
- Triton's model configurations are the only source; they are read again when a model is unknown or was lost.
- A flood of unknown names asks Triton once a second, not once a name.
- A malformed model is left out and reported once in the log; it does not take the others with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping

from tritonclient.grpc import model_config_pb2 as pb

from labelmint.errors import LabelmintError, ModelNotFound, TritonUnavailable
from labelmint.gateway.served_model import MalformedModel, ServedModel, is_labelmint, read_served_model
from labelmint.triton.client import TritonClient

logger = logging.getLogger(__name__)

_REFRESH_SECONDS = 1.0


class Catalog:
    """The served models of one pipeline ("fused" or "staged"), by name."""

    def __init__(self, triton: TritonClient, pipeline: str) -> None:
        self._triton = triton
        self._pipeline = pipeline
        self._models: dict[str, ServedModel] = {}
        self._reported: set[str] = set()
        self._asked = -_REFRESH_SECONDS
        self._failure: LabelmintError | None = None
        self._asking = asyncio.Lock()

    async def refresh(self) -> None:
        """Read the models from Triton; raises TritonUnavailable and forgets what it knew when there are none."""
        self._failure = None
        try:
            self._models = self._read(await self._triton.model_configs())
            if not self._models:
                raise TritonUnavailable(f"Triton at {self._triton.url} has no {self._pipeline} labelmint model ready")
        except LabelmintError as error:
            self._models, self._failure = {}, error
            raise
        finally:
            self._asked = time.monotonic()

    async def get(self, name: str) -> ServedModel:
        """The model of that name; asks Triton again, at most once a second, before it raises ModelNotFound."""
        if name not in self._models:
            async with self._asking:
                if time.monotonic() - self._asked >= _REFRESH_SECONDS:
                    await self.refresh()
                elif self._failure is not None:
                    raise self._failure
        if name not in self._models:
            raise ModelNotFound(name, tuple(sorted(self._models)))
        return self._models[name]

    async def list(self) -> list[ServedModel]:
        """All models by name, as Triton has them now."""
        await self.refresh()
        return [self._models[name] for name in sorted(self._models)]

    async def check_ready(self) -> None:
        """Raises TritonUnavailable unless Triton has at least one model, and every known one, ready now."""
        if not self._models:
            await self.refresh()
        for model in self._models.values():
            if not await self._triton.is_ready(model.triton_name):
                self._models, self._asked = {}, -_REFRESH_SECONDS
                raise TritonUnavailable(f"Triton at {self._triton.url} does not have model {model.name!r} ready")

    def _read(self, configs: Mapping[tuple[str, str], pb.ModelConfig]) -> dict[str, ServedModel]:
        models = {}
        for (_, version), config in sorted(configs.items()):
            if is_labelmint(config) and config.parameters["pipeline"].string_value == self._pipeline:
                try:
                    model = read_served_model(config, version)
                except MalformedModel as error:
                    self._report(str(error))
                else:
                    models[model.name] = model
        return models

    def _report(self, problem: str) -> None:
        if problem not in self._reported:
            self._reported.add(problem)
            logger.error("left out: %s", problem)
