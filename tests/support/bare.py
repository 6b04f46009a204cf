"""A Python in which everything is missing that some requirements do not bring.

Rules of this file:
- What a package needs only for an extra counts as missing.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

_PROGRAM = """
import importlib.abc, sys

blocked = {blocked}

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""
# Modules of the environment itself, and what is tested.
_KEPT = {"labelmint", "_virtualenv", "sitecustomize"}


def missing_modules(requirements: Iterable[str]) -> set[str]:
    """Return the top-level modules that neither these packages nor what they need bring. Others may be absent here."""
    left, brought = list(requirements), set[str]()
    while left:
        name = _name(left.pop())
        if name not in brought:
            brought.add(name)
            with suppress(PackageNotFoundError):
                left += [each for each in requires(name) or () if "extra ==" not in each]
    known = packages_distributions().items()
    return {module for module, names in known if brought.isdisjoint(map(_name, names))} - _KEPT


def without(modules: Iterable[str]) -> str:
    """Return the first lines of a program, or a sitecustomize.py, in which these modules cannot be imported."""
    return _PROGRAM.format(blocked=sorted(modules))


def _name(requirement: str) -> str:
    return re.split(r"[ ;<>=!~\[(]", requirement)[0].lower().replace("_", "-")
