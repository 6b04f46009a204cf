"""The authentication and TLS that the settings configure.

Rules of this file:
- All files are read and checked before anything starts. A bad file then stops the start with its error.
"""

from __future__ import annotations

from dataclasses import dataclass

from labelmint.gateway.process.settings import ServeSettings
from labelmint.gateway.process.tls import Tls, tls_of
from labelmint.gateway.sampling.access import Tokens


@dataclass(frozen=True)
class Security:
    """`tokens` is None if clients need no token; `tls` is None if connections are not encrypted."""

    tokens: Tokens | None
    tls: Tls | None

    @classmethod
    def of(cls, settings: ServeSettings) -> Security:
        """Read and check the files that `settings` name. Raises UnusableFile."""
        tls = tls_of(settings)
        if tls is not None:
            tls.check()
        return cls(None if settings.tokens_file is None else Tokens(settings.tokens_file), tls)

    @property
    def private(self) -> bool:
        """Whether only authenticated clients get responses. Shared caches must not store them then."""
        return self.tokens is not None or (self.tls is not None and self.tls.client_ca is not None)
