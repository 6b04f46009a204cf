"""Who may ask, and under which certificate, as the settings say it.

Rules of this file:
- All files are read and checked before anything is started.
"""

from __future__ import annotations

from dataclasses import dataclass

from labelmint.gateway.process.settings import ServeSettings
from labelmint.gateway.process.tls import Tls, tls_of
from labelmint.gateway.sampling.access import Tokens


@dataclass(frozen=True)
class Security:
    """`tokens` is None where anyone may ask, `tls` where connections are not encrypted."""

    tokens: Tokens | None
    tls: Tls | None

    @classmethod
    def of(cls, settings: ServeSettings) -> Security:
        """Raises UnusableFile."""
        tls = tls_of(settings)
        if tls is not None:
            tls.check()
        return cls(None if settings.tokens_file is None else Tokens(settings.tokens_file), tls)

    @property
    def private(self) -> bool:
        """Whether answers are for authenticated clients only, so that shared caches must keep nothing."""
        return self.tokens is not None or (self.tls is not None and self.tls.client_ca is not None)
