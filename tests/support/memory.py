"""How much memory a process uses.

Never ask `getrusage`: a process inherits the maximum of the process that started it, even through exec. The child of a
test process of 2 GB then seems to have used 2 GB, and what it uses below that is not seen.
"""

import re
from pathlib import Path


def memory(pid: int | str, field_name: str = "VmRSS") -> float:
    """Return the megabytes of a process ("self": this one): resident now (VmRSS) or the maximum so far (VmHWM)."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(rf"^{field_name}:\s+(\d+) kB", status, re.MULTILINE)
    assert match is not None, status
    return int(match[1]) / 1024
