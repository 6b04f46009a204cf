"""The configuration of `labelmint serve`: one definition, from which environment variables, flags and help derive.

Rules of this file:
- An environment variable is LABELMINT_ and the field's name; a flag is the field's name with dashes. A flag wins over
  the environment, the environment over a configuration file.
- A value that cannot work is refused here, before anything is started.
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
# What Kubernetes sets for each service of a namespace; one that is called labelmint-... looks like ours.
_OF_KUBERNETES = re.compile(r"\w+_SERVICE_(HOST|PORT)\w*=|\w+_PORT_\d+_\w+=|\w+_PORT=(tcp|udp|sctp)://")

Port = Annotated[int, Field(ge=0, le=65535)]


class ServeSettings(BaseSettings):
    """Start Triton on a model repository, and the gateway before it."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, extra="ignore")

    config: Annotated[
        Path | None,
        Field(description="TOML file of these settings (model_repository = ...); flags and environment win"),
    ] = None
    model_repository: Annotated[Path, Field(description="directory that `labelmint export` wrote")] = Path(
        "model_repository"
    )
    pipeline: Annotated[
        Literal["fused", "staged"],
        Field(description="fused: generator and style_interpreter; staged: the four steps one by one"),
    ] = "fused"
    triton_url: Annotated[
        str, Field(description="HOST:PORT of a running Triton's gRPC, or of several; empty: start one of our own")
    ] = ""
    triton_log: Annotated[Path | None, Field(description="file for the log of our own Triton")] = None
    host: Annotated[str, Field(description="address that both doors listen on")] = "127.0.0.1"
    http_port: Annotated[Port, Field(description="port of REST; 0: any free one")] = 8080
    grpc_port: Annotated[Port, Field(description="port of gRPC; 0: any free one")] = 50051
    max_in_flight: Annotated[
        int,
        Field(ge=1, description="samples of requests, waiting or in Triton, at once; more are refused with 429"),
    ] = 128
    triton_slots: Annotated[
        int,
        Field(ge=1, description="samples in Triton at once, shared fairly by requests and streams; a batch or two"),
    ] = 16
    max_streams: Annotated[int, Field(ge=1, description="streams at once; more are refused with 429")] = 64
    max_window: Annotated[
        int, Field(ge=1, description="largest window of a stream: samples that are minted ahead of its reader")
    ] = 64
    max_connections: Annotated[
        int, Field(ge=1, description="connections at once at each of the two doors; more are closed")
    ] = 400
    http_keep_alive_seconds: Annotated[
        int, Field(ge=1, description="time that an idle REST connection is kept; longer than load balancers do")
    ] = 75
    capacity_wait_seconds: Annotated[
        float,
        Field(ge=0, description="time that what is asked is held while Triton is away (scaled to zero); 0: none"),
    ] = 0.0
    drain_seconds: Annotated[
        float, Field(ge=0, description="time at shutdown between not ready and closed doors, for load balancers to see")
    ] = 0.0
    grace_seconds: Annotated[
        float, Field(ge=0, description="time that requests in flight get to finish once the doors are closed")
    ] = 10.0
    max_connection_age_seconds: Annotated[
        float, Field(ge=0, description="gRPC connections and streams are renewed after it, to spread load; 0: never")
    ] = 1800.0
    log_format: Annotated[
        Literal["text", "json"], Field(description="text: lines for people; json: one object a line")
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
        Path | None, Field(description="PEM file of the server's certificate and its chain: both doors then speak TLS")
    ] = None
    tls_key: Annotated[Path | None, Field(description="PEM file of the certificate's private key, not encrypted")] = (
        None
    )
    tls_client_ca: Annotated[
        Path | None,
        Field(description="PEM file of authorities: a client must show a certificate of theirs (mutual TLS)"),
    ] = None
    tokens_file: Annotated[
        Path | None, Field(description="file of who may ask: a line each with name, SHA-256 of the token, limits")
    ] = None
    insecure: Annotated[
        bool,
        Field(description="listen beyond this machine though neither tokens nor client certificates are asked for"),
    ] = False
    cors_origin: Annotated[
        str,
        Field(
            pattern=f"^({_ORIGIN}(,{_ORIGIN})*)?$",
            description="origins whose pages may ask REST, https://HOST[:PORT] with commas between, or *; empty: none",
        ),
    ] = ""
    cache_bytes: Annotated[
        int, Field(ge=0, description="memory for samples that were minted, for repeated epochs; 0: none is kept")
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
        """Raises UnusableFile for a configuration file that cannot be read, or sets what there is not."""
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
            raise ValueError("tls_client_ca needs tls_certificate and tls_key: client certificates are shown over TLS")
        return self


def unknown_variables() -> list[str]:
    """A sentence on each variable of the environment that looks like a setting and is none."""
    known = {f"{_PREFIX}{name}".upper() for name in ServeSettings.model_fields}
    sentences = []
    for name, value in sorted(os.environ.items()):
        if not name.upper().startswith(_PREFIX) or name.upper() in known or _OF_KUBERNETES.match(f"{name}={value}"):
            continue
        near = difflib.get_close_matches(name.upper(), known, 1)
        sentences.append(f"{name} is no setting and has no effect" + (f"; is {near[0]} meant?" if near else ""))
    return sentences


def _read_config(path: Path, known: frozenset[str]) -> dict[str, object]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnusableFile(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UnusableFile(path, f"is no TOML file: {error}") from error
    for name in values.keys() - known:
        near = difflib.get_close_matches(name.replace("-", "_"), known, 1)
        raise UnusableFile(path, f"sets {name!r}, which is no setting" + (f"; is {near[0]} meant?" if near else ""))
    return values
