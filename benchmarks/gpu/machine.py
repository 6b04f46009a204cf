"""Describes the machine of a run: device, driver, versions, commit; and reads the GPU's clocks while it works.

Rules of this file:
- Clocks, temperature and power come from nvidia-smi. Without it they are missing, and the results say so.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("torch", "triton", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "nvidia-pytriton")
CLOCKS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "temperature.gpu": "celsius",
    "power.draw": "watts",
}
DIE_WITH_PARENT = ROOT / "service" / "labelmint" / "triton" / "die_with_parent.py"


def dying_with(parent: int) -> list[str]:
    """Return the beginning of a command whose process ends when its parent ends."""
    return [sys.executable, "-I", "-S", str(DIE_WITH_PARENT), str(parent)]


def described(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"device": device.type, "python": platform.python_version(), "commit": commit()}
    found["packages"] = {name: version for name in PACKAGES if (version := version_of(name)) is not None}
    if device.type != "cuda":
        return found | {"name": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    found["name"] = properties.name
    found["capability"] = f"{properties.major}.{properties.minor}"
    found["multiprocessors"] = properties.multi_processor_count
    found["memory_bytes"] = properties.total_memory
    found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    driver = smi("driver_version", device)
    found["driver"] = driver[0] if driver else {"missing": "nvidia-smi is not installed"}
    return found


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of the sources, with `+` if files differ from it; None outside of a clone."""
    if shutil.which("git") is None:
        return None
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False)
    return head.stdout.strip() + ("+" if changed.returncode else "") if head.returncode == 0 else None


def clocks(device: torch.device) -> dict[str, float] | None:
    """Return the GPU's clocks, temperature and power now; None if nothing tells them."""
    values = smi(",".join(CLOCKS), device)
    if values is None:
        return None
    return {name: number for name, text in zip(CLOCKS.values(), values, strict=True) if (number := _number(text))}


def smi(query: str, device: torch.device) -> list[str] | None:
    """Ask nvidia-smi for the values of `query`; None without it or without a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None or device.type != "cuda":
        return None
    command = [program, f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--id={device.index or 0}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return [value.strip() for value in done.stdout.strip().split(",")]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None  # such as [N/A]
