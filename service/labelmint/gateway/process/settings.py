"""The configuration of `labelmint serve`: one definition yields the environment variables, the flags and the help.

Rules of this file:
- An environment variable is LABELMINT_ plus the field's name. A flag is the field's name with dashes. A flag overrides
  the environment, and the environment overrides the configuration file. The text below a field is its help.
- A value that cannot work is rejected here, before anything starts.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from labelmint.core.errors import UnusableFile
from labelmint.core.executor import KERNEL, Choice

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PREFIX = "LABELMINT_"
_ORIGIN = r"(\*|https?://[^/\s,]+)"
# Kubernetes sets these for each service of a namespace; those of a service labelmint-... look like settings.
_OF_KUBERNETES = re.compile(r"\w+_SERVICE_(HOST|PORT)\w*=|\w+_PORT_\d+_\w+=|\w+_PORT=(tcp|udp|sctp)://")

Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0)]


class ServeSettings(BaseSettings):
    """Start Triton on a model repository, and the gateway in front of it."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, extra="ignore", use_attribute_docstrings=True)

    config: Path | None = None
    """TOML file of these settings (model_repository = ...); flags and environment override it"""
    model_repository: Path = Path("model_repository")
    """directory that `labelmint export` wrote"""
    pipeline: Literal["fused", "staged"] = "fused"
    """fused: generator and style_interpreter; staged: the four steps one by one"""
    triton_url: str = ""
    """gRPC target (HOST:PORT) of one or several running Tritons; empty: start one"""
    executor: Choice = KERNEL
    """what runs interpreters of the format onnx in the Triton that this command starts"""
    triton_log: Path | None = None
    """file for the log of the Triton that this command starts"""
    host: str = "127.0.0.1"
    """address that both servers listen on"""
    http_port: Port = 8080
    """port of the REST server; 0: any free port"""
    grpc_port: Port = 50051
    """port of the gRPC server; 0: any free port"""
    max_in_flight: Positive = 128
    """most samples of requests at once, waiting or in Triton; more are rejected with 429"""
    triton_slots: Positive = 16
    """most samples in all Tritons at once, shared fairly by requests and streams; set 1 to 2 batches per Triton"""
    max_streams: Positive = 64
    """most streams at once; more are rejected with 429"""
    max_window: Positive = 64
    """largest window of a stream: samples that are generated ahead of its reader"""
    max_empty_seeds: Positive = 100_000
    """a stream with conditions (where) ends after so many seeds in a row without a sample"""
    index: Path | None = None
    """directory of an index of seeds, which `labelmint index` wrote: streams then skip what they would not deliver"""
    max_connections: Positive = 400
    """most connections at once at each of the two servers; more are closed"""
    http_keep_alive_seconds: Positive = 75
    """time that an idle REST connection stays open; set it longer than load balancers do"""
    capacity_wait_seconds: Seconds = 0.0
    """time that a request waits for an absent Triton (scaled to zero); 0: it fails at once"""
    drain_seconds: Seconds = 0.0
    """time at shutdown between not ready and closed servers, for load balancers to notice"""
    grace_seconds: Seconds = 10.0
    """time for requests in flight to finish once the servers accept no more"""
    max_connection_age_seconds: Seconds = 1800.0
    """age at which gRPC connections and streams end, to spread load; 0: never"""
    log_format: Literal["text", "json"] = "text"
    """text: lines for people; json: one object per line"""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """least severe level that is logged"""
    otlp_endpoint: Annotated[str, Field(pattern="^(https?://.+)?$")] = ""
    """URL of an OTLP/HTTP receiver of traces; empty: OTEL_EXPORTER_OTLP_ENDPOINT, or none"""
    tls_certificate: Path | None = None
    """PEM file of the server certificate and its chain; both servers then use TLS"""
    tls_key: Path | None = None
    """PEM file of the certificate's private key, not encrypted"""
    tls_client_ca: Path | None = None
    """PEM file of the authorities that must have signed each client's certificate (mutual TLS)"""
    tokens_file: Path | None = None
    """file of the callers, one per line: name, SHA-256 of the token, limits"""
    insecure: bool = False
    """allow other machines to connect without tokens or client certificates"""
    cors_origin: Annotated[str, Field(pattern=f"^({_ORIGIN}(,{_ORIGIN})*)?$")] = ""
    """origins whose pages may call REST: https://HOST[:PORT], comma-separated, or *; empty: none"""
    cache_bytes: Annotated[int, Field(ge=0)] = 0
    """memory to cache generated samples, for repeated epochs; 0: no cache"""

    @property
    def cors_origins(self) -> list[str]:
        return [origin for origin in self.cors_origin.split(",") if origin]

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Raises UnusableFile for a configuration file that cannot be read or that sets an unknown name."""
        given = init_settings().get("config") or env_settings().get("config")
        values = {} if given is None else _read_config(Path(given), frozenset(cls.model_fields) - {"config"})
        return init_settings, env_settings, InitSettingsSource(settings_cls, values)

    @field_validator("host")
    @classmethod
    def _without_brackets(cls, host: str) -> str:
        return host[1:-1] if host.startswith("[") and host.endswith("]") else host

    @model_validator(mode="after")
    def _otlp_endpoint_of_the_environment(self) -> ServeSettings:
        self.otlp_endpoint = self.otlp_endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
        return self

    @model_validator(mode="after")
    def _tls_is_whole(self) -> ServeSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together; give both")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key: clients present certificates over TLS")
        return self


def unknown_variables() -> list[str]:
    """Return a warning for each environment variable that looks like a setting but is not one."""
    known = {f"{_PREFIX}{name}".upper() for name in ServeSettings.model_fields}
    sentences = []
    for name, value in sorted(os.environ.items()):
        if not name.upper().startswith(_PREFIX) or name.upper() in known or _OF_KUBERNETES.match(f"{name}={value}"):
            continue
        near = difflib.get_close_matches(name.upper(), known, 1)
        sentences.append(f"{name} is not a setting and has no effect" + (f"; is {near[0]} meant?" if near else ""))
    return sentences


def _read_config(path: Path, known: frozenset[str]) -> dict[str, object]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnusableFile(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UnusableFile(path, f"is not a TOML file: {error}") from error
    for name in values.keys() - known:
        near = difflib.get_close_matches(name.replace("-", "_"), known, 1)
        raise UnusableFile(path, f"sets {name!r}, which is not a setting" + (f"; is {near[0]} meant?" if near else ""))
    return values
