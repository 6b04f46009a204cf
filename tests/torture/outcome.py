"""What came of an attack, and a watch over the gateway while it lasts."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from labelmint.gateway.process.memory import PAUSE_SECONDS
from tests.conftest import Service

MAX_FINDINGS = 20
# Of what a peak took Python keeps a part: growth counts above a tenth of what there was, or this.
GROWTH_MEGABYTES = 64


@dataclass
class Outcome:
    """Of one attack: how often it tried, and a line for each thing that must not be."""

    attack: str
    tries: int = 0
    findings: list[str] = field(default_factory=list)
    note: str = ""

    def found(self, finding: str) -> None:
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding.replace("\n", " ")[-4000:])


def memory(pid: int, field_name: str = "VmRSS") -> float:
    """Megabytes of a process: resident now (VmRSS) or at most so far (VmHWM)."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(rf"^{field_name}:\s+(\d+) kB", status, re.MULTILINE)
    assert match is not None, status
    return int(match[1]) / 1024


class Watch:
    """Over a gateway, from now on: that it lives, logs no traceback and keeps its memory.

    Begin it when the gateway is warm: what it loads with its first requests is no growth.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._said = len(service.log.read_text())
        self._megabytes = memory(service.process.pid)

    def look(self, outcome: Outcome) -> None:
        """Add what is to be seen now to the findings."""
        if self._service.process.poll() is not None:
            outcome.found(f"the gateway ended with {self._service.process.returncode}")
            return
        said = self._service.log.read_text(errors="replace")[self._said :]
        for match in re.finditer(r"Traceback \(most recent call last\)[\s\S]*?\n(\S.*)", said):
            outcome.found(f"traceback in the log: {match[1]}")
        most = self._megabytes + max(GROWTH_MEGABYTES, self._megabytes / 10)
        patience = time.monotonic() + 3 * PAUSE_SECONDS  # what is free goes back in its time
        while (megabytes := memory(self._service.process.pid)) > most and time.monotonic() < patience:
            time.sleep(0.1)
        if megabytes > most:
            outcome.found(f"memory grew from {self._megabytes:.0f} to {megabytes:.0f} MB")
        outcome.note += f"{self._megabytes:.0f} to {megabytes:.0f} MB"
