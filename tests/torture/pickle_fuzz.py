"""A coverage-guided fuzz run (atheris) of the checkpoint readers: `fuzz`, and the child process that it starts.

The corpus has valid files of every container and all crafted ones. A finding is an input that ends in anything but a
value or Malformed, raises a forbidden audit event, or exceeds libFuzzer's limits of time or memory.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.torture.outcome import Outcome

MAX_BYTES = 64 << 10
MEMORY_MEGABYTES = 2048
SECONDS_OF_ONE = 20


def corpus(directory: Path) -> int:
    """Write the initial corpus. Returns the number of files."""
    import torch

    from tests.support.checkpoints import reference
    from tests.support.checkpoints.hostile import CASES
    from tests.support.checkpoints.writers import nvlabs_bytes

    torch.manual_seed(3)
    generator = reference.Generator(channels={4: 2, 8: 2}, mapping={"num_layers": 1})
    tensors = {"g_synthesis.torgb.weight": torch.ones(3, 4, 1, 1), "name": torch.arange(4).half()}
    zip_format, legacy_format = io.BytesIO(), io.BytesIO()
    torch.save(tensors, zip_format)
    torch.save(tensors, legacy_format, _use_new_zipfile_serialization=False)
    files = [nvlabs_bytes({"G_ema": generator}, protocol) for protocol in (2, 3, 4)]
    files += [zip_format.getvalue(), legacy_format.getvalue(), *(content for content, _ in CASES.values())]
    kept = [content for content in files if len(content) <= MAX_BYTES]
    for number, content in enumerate(kept):
        (directory / f"{number:04d}").write_bytes(content)
    return len(kept)


def fuzz(directory: Path, runs: int, seconds: int) -> Outcome:
    """Fuzz for at most `runs` executions and `seconds` seconds, whichever ends first."""
    outcome = Outcome("coverage-guided fuzz of checkpoints")
    inputs, work = directory / "corpus", directory / "fuzz"
    inputs.mkdir()
    work.mkdir()
    begun = corpus(inputs)
    # libFuzzer asks getrusage for its memory, so a small shell between starts it (tests/support/memory.py).
    command = ["sh", "-c", '"$@"; exit $?', "sh"]
    command += [sys.executable, "-m", "tests.torture.pickle_fuzz", str(inputs), f"-runs={runs}", "-seed=8"]
    command += [f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", f"-rss_limit_mb={MEMORY_MEGABYTES}"]
    command += [f"-timeout={SECONDS_OF_ONE}", f"-artifact_prefix={directory}/crash-", "-print_final_stats=1"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'service'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=seconds + 600)
    executed = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    outcome.tries = int(executed[1]) if executed else 0
    outcome.note = f"from {begun} files, coverage {covered[0]} to {covered[-1]}" if covered else "no coverage"
    if done.returncode != 0 or not covered:
        outcome.found(f"ended with {done.returncode}: {done.stderr[-1500:]}")
    if left := sorted(path.name for path in work.iterdir()):
        outcome.found(f"something was written: {left}")
    return outcome


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["labelmint.checkpoints", "labelmint.untrusted"]):
        from labelmint.checkpoints import container
        from labelmint.untrusted import pickle_machine

    from tests.torture.import_files import FORBIDDEN

    def record(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(FORBIDDEN):
            raise AssertionError(f"a file made it do {event} {str(arguments)[:200]}")

    def one(content: bytes) -> None:
        with contextlib.suppress(pickle_machine.Malformed):
            pickle_machine.check_tree(container._read(memoryview(content)))

    atheris.Setup(sys.argv, one)
    sys.addaudithook(record)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
