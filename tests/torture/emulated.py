"""A Triton whose model processes run on an emulated processor with AVX2 and without AVX-512.

Rules of this file:
- qemu-user runs only the model processes, which compute. Triton itself moves bytes.
- ONNX Runtime asks the processor what it can do. The kernel asks /proc/cpuinfo, so the model processes see another one.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from labelmint.core.executor import Choice
from labelmint.triton import server
from labelmint.triton.server import TritonServer, wait_until_ready

EMULATOR = "qemu-x86_64"
PROCESSOR = "Haswell"
STUB = "triton_python_backend_stub"


@asynccontextmanager
async def emulated(repository: Path, model: str, executor: Choice, *, directory: Path) -> AsyncIterator[TritonServer]:
    """Run a Triton with `model` ready. `directory` keeps what the emulated processes see instead of /proc/cpuinfo."""
    program = shutil.which(EMULATOR)
    assert program is not None, f"{EMULATOR} is missing: apt-get install qemu-user"
    described = directory / "proc" / "cpuinfo"
    described.parent.mkdir(parents=True)
    described.write_text(_without_avx512(Path("/proc/cpuinfo").read_text()))
    original = server._backend_directory

    def with_emulator(root: Path, workplace: Path) -> Path:
        backends = original(root, workplace)
        stub = backends / "python" / STUB
        native = stub.rename(stub.with_name(f"{STUB}.native"))
        emulator = f"{program} -cpu {PROCESSOR} -L {directory}"
        stub.write_text(f'#!/bin/sh\n: > {directory}/emulated\nexec {emulator} {native} "$@"\n')
        stub.chmod(0o755)
        return backends

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "_backend_directory", with_emulator)
        triton = TritonServer(repository, [model], executor=executor)
        await triton.start()
        try:
            await wait_until_ready(triton)
            assert (directory / "emulated").exists(), "Triton started another program than the emulated one"
            yield triton
        finally:
            await triton.stop()


def _without_avx512(cpuinfo: str) -> str:
    return "\n".join(
        " ".join(word for word in line.split(" ") if not word.startswith("avx512")) for line in cpuinfo.splitlines()
    )
