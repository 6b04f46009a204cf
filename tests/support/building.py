"""What k8s/images/build.py knows about the images, for tests."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

from tests.conftest import ROOT

SCRIPT = ROOT / "k8s" / "images" / "build.py"


def _load() -> ModuleType:
    specification = importlib.util.spec_from_file_location("build_images", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look there
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


BUILD: Any = _load()
IMAGES: dict[str, Any] = BUILD.IMAGES
