"""The configuration of `labelmint serve`: one definition yields the environment variables, the flags and the help.

Rules of this file:
- An environment variable is LABELMINT_ plus the field's name. A flag is the field's name with dashes. A flag overrides
  the environment, and the environment overrides the configuration file.
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

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PREFIX = "LABELMINT_"
_ORIGIN = r"(\*|https?://[^/\s,]+)"
# Kubernetes sets these for each service of a namespace; those of a service labelmint-... look like settings.
_OF_KUBERNETES = re.compile(r"\w+_SERVICE_(HOST|PORT)\w*=|\w+_PORT_\d+_\w+=|\w+_PORT=(tcp|udp|sctp)://")

Port = Annotated[int, Field(ge=0, le=65535)]


class ServeSettings(BaseSettings):
    """Start Triton on a model repository, and the gateway in front of it."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, extra="ignore")

    config: Annotated[
        Path | None,
        Field(description="TOML file of these settings (model_repository = ...); flags and environment override it"),
    ] = None
    model_repository: Annotated[Path, Field(description="directory that `labelmint export` wrote")] = Path(
        "model_repository"
    )
    pipeline: Annotated[
        Literal["fused", "staged"],
        Field(description="fused: generator and style_interpreter; staged: the four steps one by one"),
    ] = "fused"
    triton_url: Annotated[
        str, Field(description="gRPC target (HOST:PORT) of one or several running Tritons; empty: start one")
    ] = ""
    triton_log: Annotated[Path | None, Field(description="file for the log of the Triton that this command starts")] = (
        None
    )
    host: Annotated[str, Field(description="address that both servers listen on")] = "127.0.0.1"
    http_port: Annotated[Port, Field(description="port of the REST server; 0: any free port")] = 8080
    grpc_port: Annotated[Port, Field(description="port of the gRPC server; 0: any free port")] = 50051
    max_in_flight: Annotated[
        int,
        Field(ge=1, description="most samples of requests at once, waiting or in Triton; more are rejected with 429"),
    ] = 128
    triton_slots: Annotated[
        int,
        Field(
            ge=1,
            description="most samples in Triton at once, shared fairly by all requests and streams; set 1 to 2 batches",
        ),
    ] = 16
    max_streams: Annotated[int, Field(ge=1, description="most streams at once; more are rejected with 429")] = 64
    max_window: Annotated[
        int, Field(ge=1, description="largest window of a stream: samples that are generated ahead of its reader")
    ] = 64
    max_connections: Annotated[
        int, Field(ge=1, description="most connections at once at each of the two servers; more are closed")
    ] = 400
    http_keep_alive_seconds: Annotated[
        int,
        Field(ge=1, description="time that an idle REST connection stays open; set it longer than load balancers do"),
    ] = 75
    capacity_wait_seconds: Annotated[
        float,
        Field(ge=0, description="time that a request waits for an absent Triton (scaled to zero); 0: it fails at once"),
    ] = 0.0
    drain_seconds: Annotated[
        float,
        Field(ge=0, description="time at shutdown between not ready and closed servers, for load balancers to notice"),
    ] = 0.0
    grace_seconds: Annotated[
        float, Field(ge=0, description="time for requests in flight to finish once the servers accept no more")
    ] = 10.0
    max_connection_age_seconds: Annotated[
        float, Field(ge=0, description="age at which gRPC connections and streams end, to spread load; 0: never")
    ] = 1800.0
    log_format: Annotated[
        Literal["text", "json"], Field(description="text: lines for people; json: one object per line")
    ] = "text"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="least severe level that is logged")
    ] = "info"
    otlp_endpoint: Annotated[
        str,
        Field(
            pattern="^(https?://.+)?$",
            description="URL of an OTLP/HTTP receiver of traces; empty: OTEL_EXPORTER_OTLP_ENDPOINT, or none",
        ),
    ] = ""
    tls_certificate: Annotated[
        Path | None, Field(description="PEM file of the server certificate and its chain; both servers then use TLS")
    ] = None
    tls_key: Annotated[Path | None, Field(description="PEM file of the certificate's private key, not encrypted")] = (
        None
    )
    tls_client_ca: Annotated[
        Path | None,
        Field(description="PEM file of the authorities that must have signed each client's certificate (mutual TLS)"),
    ] = None
    tokens_file: Annotated[
        Path | None, Field(description="file of the callers, one per line: name, SHA-256 of the token, limits")
    ] = None
    insecure: Annotated[
        bool,
        Field(description="allow other machines to connect without tokens or client certificates"),
    ] = False
    cors_origin: Annotated[
        str,
        Field(
            pattern=f"^({_ORIGIN}(,{_ORIGIN})*)?$",
            description="origins whose pages may call REST: https://HOST[:PORT], comma-separated, or *; empty: none",
        ),
    ] = ""
    cache_bytes: Annotated[
        int, Field(ge=0, description="memory to cache generated samples, for repeated epochs; 0: no cache")
    ] = 0

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
