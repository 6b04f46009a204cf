"""Data sets on disk: `pull` writes the accepted samples of a walk, `verify` checks what was written.

Rules of this package:
- `pulling` and `verifying` decide, `directory` writes; each format is a module of its own, listed in `formats`.
- It needs the extra `pull`.
"""

from labelmint_client.pull.errors import PullError
from labelmint_client.pull.pulling import Progress, PullOptions, pull
from labelmint_client.pull.verifying import Report, verify

__all__ = ["Progress", "PullError", "PullOptions", "Report", "pull", "verify"]
