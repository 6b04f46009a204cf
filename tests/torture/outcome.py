"""The outcome of an attack, and a watch over the gateway during it."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from labelmint.gateway.process.background import PAUSE_SECONDS
from tests.conftest import Service
from tests.support.memory import memory

MAX_FINDINGS = 20
# Python retains a part of a memory peak, so growth counts only above a tenth of the memory before, or above this.
GROWTH_MEGABYTES = 64


@dataclass
class Outcome:
    """The number of attempts of one attack, and a line for each finding."""

    attack: str
    tries: int = 0
    findings: list[str] = field(default_factory=list)
    note: str = ""

    def found(self, finding: str) -> None:
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding.replace("\n", " ")[-4000:])


class Watch:
    """Watches a gateway from now on: it must live, log no traceback and not grow in memory.

    Start it when the gateway is warm, because memory that it loads with its first requests would count as growth.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._said = len(service.log.read_text())
        self._megabytes = memory(service.process.pid)

    def look(self, outcome: Outcome) -> None:
        """Add the problems that are visible now to the findings."""
        if self._service.process.poll() is not None:
            outcome.found(f"the gateway ended with {self._service.process.returncode}")
            return
        said = self._service.log.read_text(errors="replace")[self._said :]
        for match in re.finditer(r"Traceback \(most recent call last\)[\s\S]*?\n(\S.*)", said):
            outcome.found(f"traceback in the log: {match[1]}")
        most = self._megabytes + max(GROWTH_MEGABYTES, self._megabytes / 10)
        patience = time.monotonic() + 3 * PAUSE_SECONDS  # the gateway returns free memory only after a pause
        while (megabytes := memory(self._service.process.pid)) > most and time.monotonic() < patience:
            time.sleep(0.1)
        if megabytes > most:
            outcome.found(f"memory grew from {self._megabytes:.0f} to {megabytes:.0f} MB")
        outcome.note += f"{self._megabytes:.0f} to {megabytes:.0f} MB"
