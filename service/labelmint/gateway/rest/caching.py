"""What an HTTP cache may do with a sample: validators that need no inference, and how long an answer holds.

Rules of this file:
- A strong ETag is known before anything is minted: it is a hash of all that decides the bytes.
- A URL names a model, and a model may change. So a plain URL is revalidated each time, which costs no inference, and
  only a URL that pins the model's revision is immutable.
- Where access is restricted, answers are `private`: a shared cache does not ask for tokens.
- A rejection is as lasting as a sample and has the same Cache-Control; every other error is never stored.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version

import PIL
from pydantic import BaseModel

from labelmint.core.errors import RevisionChanged
from labelmint.core.served_model import ServedModel

_YEAR_SECONDS = 31_536_000
# Other encoders write other bytes for the same pixels: a strong validator must not outlive them.
_ENCODERS = f"labelmint {version('labelmint')}, Pillow {PIL.__version__}, zlib {zlib.ZLIB_RUNTIME_VERSION}"


@lru_cache(maxsize=64)
def revision(model: ServedModel) -> str:
    """Names all of a model that decides an answer: artifacts, calibration, names and colours of classes.

    The first 16 hexadecimal digits of the SHA-256 over everything that the gateway knows of it.
    """
    return hashlib.sha256(json.dumps(asdict(model), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Caching:
    """What the answer to one request says to caches."""

    etag: str
    cache_control: str

    @property
    def headers(self) -> dict[str, str]:
        return {"ETag": self.etag, "Cache-Control": self.cache_control, "Accept-Ranges": "none"}

    def held(self, if_none_match: str | None, exists: bool = False) -> bool:
        """Whether the client says that it holds these very bytes, or by `*` any where an answer `exists`."""
        tags = {tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")}
        return self.etag in tags or (exists and "*" in tags)


def caching_of(model: ServedModel, representation: str, query: BaseModel, pinned: str | None, private: bool) -> Caching:
    """`representation` names seed and form, `query` has the options; raises RevisionChanged unless `pinned` holds."""
    served = revision(model)
    if pinned is not None and pinned != served:
        raise RevisionChanged(model.name, served)
    content = [_ENCODERS, served, representation, query.model_dump(exclude={"revision"})]
    etag = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    lifetime = "no-cache" if pinned is None else f"max-age={_YEAR_SECONDS}, immutable"
    return Caching(f'"{etag}"', f"{'private' if private else 'public'}, {lifetime}")
