"""HTTP caching of samples: ETags that need no inference, and the lifetime of a response.

Rules of this file:
- The strong ETag is known before a sample is generated. It is a hash of everything that determines the bytes.
- A URL names a model, and the model may change. A cache therefore revalidates a plain URL each time, which costs no
  inference. Only a URL that pins the model's revision is immutable.
- If access needs a token, responses are `private`, because a shared cache does not check tokens.
- A rejection is as permanent as a sample and has the same Cache-Control. Caches never store any other error.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import version

import PIL
from pydantic import BaseModel

from labelmint.core.errors import RevisionChanged
from labelmint.core.served_model import ServedModel

_YEAR_SECONDS = 31_536_000
# Another version of an encoder may write other bytes for the same pixels, so the versions are part of the strong ETag.
_ENCODERS = f"labelmint {version('labelmint')}, Pillow {PIL.__version__}, zlib {zlib.ZLIB_RUNTIME_VERSION}"


@lru_cache(maxsize=64)
def revision(model: ServedModel) -> str:
    """Identify everything in a model that determines a response: artifacts, executor, calibration, names and colours.

    It is the first 16 hexadecimal digits of the SHA-256 over everything that the gateway knows about the model.
    """
    return hashlib.sha256(json.dumps(asdict(model), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Caching:
    """The caching headers of one response."""

    etag: str
    cache_control: str

    @property
    def headers(self) -> dict[str, str]:
        return {"ETag": self.etag, "Cache-Control": self.cache_control, "Accept-Ranges": "none"}

    def revalidated(self) -> Caching:
        """The caching of a response that more than the URL determines, so that no cache may keep it unasked."""
        return replace(self, cache_control=f"{self.cache_control.partition(',')[0]}, no-cache")

    def held(self, if_none_match: str | None, exists: bool = False) -> bool:
        """Whether If-None-Match names this response, or is `*` when a response is known to exist (`exists`)."""
        tags = {tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")}
        return self.etag in tags or (exists and "*" in tags)


def caching_of(
    model: ServedModel, representation: str, query: BaseModel, *, pinned: str | None, private: bool
) -> Caching:
    """Return the caching of the response in `representation` (seed and form) with the options of `query`.

    Raises RevisionChanged if `pinned` is not the served revision.
    """
    served = revision(model)
    if pinned is not None and pinned != served:
        raise RevisionChanged(model.name, served)
    content = [_ENCODERS, served, representation, query.model_dump(exclude={"revision"})]
    etag = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    lifetime = "no-cache" if pinned is None else f"max-age={_YEAR_SECONDS}, immutable"
    return Caching(f'"{etag}"', f"{'private' if private else 'public'}, {lifetime}")
