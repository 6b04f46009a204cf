"""Reports the gateway's progress, such as "starting" and "ready", to the person who started it.

Rules of this file:
- With text logs a report goes to stdout. With JSON logs it goes to the log, because machines read it there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from labelmint.core.errors import LabelmintError
from labelmint.core.served_model import ServedModel
from labelmint.gateway.process.addresses import bracketed
from labelmint.gateway.process.background import HEALTH_SECONDS
from labelmint.gateway.process.settings import ServeSettings
from labelmint.gateway.sampling.catalog import Catalog

logger = logging.getLogger(__name__)


class Announcer:
    def __init__(self, settings: ServeSettings) -> None:
        self._text = settings.log_format == "text"
        self._host = settings.host
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        if self._text:
            print(f"labelmint: {text}", flush=True)
        else:
            logger.info("%s", text)

    async def announce(self, catalog: Catalog, stop: asyncio.Event, *, ports: tuple[int, int], tls: bool) -> None:
        """Report the served models as soon as Triton is ready; report once that the gateway waits for Triton.

        `ports` are the ports of REST and gRPC.
        """
        waiting = False
        while not stop.is_set():
            try:
                await catalog.refresh_anew()
            except LabelmintError as error:
                if not waiting:
                    self.say(f"listening, but not ready: {error.message}. Waiting for Triton.")
                    waiting = True
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(stop.wait(), HEALTH_SECONDS)
            else:
                self._ready(catalog.known(), ports, tls)
                return

    def _ready(self, models: list[ServedModel], ports: tuple[int, int], tls: bool) -> None:
        for model in models:
            labels = f"{len(model.label_names)} {model.task.names}"
            name = model.name if model.version == "1" else f"{model.name} version {model.version}"
            self.say(f"{name}, {model.resolution}x{model.resolution}, {labels}, {_gate(model)}")
        http, grpc_address = (bracketed(self._host, port) for port in ports)
        url = f"{'https' if tls else 'http'}://{http}"
        self.say(
            f"ready after {time.monotonic() - self._started:.1f} s. REST {url} (docs at /docs), "
            f"gRPC {grpc_address}. Ctrl-C stops everything."
        )
        if self._text:
            example = f"{url}/v1/models/{models[0].name}/samples/7/overlay.png"
            example = f"'{example}?class_index=0'" if models[0].generator_classes else example
            print(f"  try: curl -so pair.png {example}", flush=True)


def _gate(model: ServedModel) -> str:
    if model.generator_classes:
        return f"{len(model.generator_classes)} generator classes, {len(model.calibrated_classes)} of them with a gate"
    if model.calibration is not None:
        return f"gate at JS {model.calibration.threshold:.4g}"
    return f"no gate: {model.uncalibrated()}" if model.calibrated_for else "not calibrated"
