"""The configuration of `labelmint serve`: one definition, from which environment variables, flags and help derive.

Rules of this file:
- An environment variable is LABELMINT_ and the field's name; a flag is the field's name with dashes and wins.
- A value that cannot work is refused here, before anything is started.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

Port = Annotated[int, Field(ge=0, le=65535)]


class ServeSettings(BaseSettings):
    """Start Triton on a model repository, and the gateway before it."""

    model_config = SettingsConfigDict(env_prefix="LABELMINT_", extra="ignore")

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
            description="URL of an OTLP/HTTP receiver of traces; empty: none. Default: OTEL_EXPORTER_OTLP_ENDPOINT",
        ),
    ] = Field(default_factory=lambda: os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", ""))
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
    cache_bytes: Annotated[
        int, Field(ge=0, description="memory for samples that were minted, for repeated epochs; 0: none is kept")
    ] = 0

    @model_validator(mode="after")
    def _tls_is_whole(self) -> ServeSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together; give both")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key: client certificates are shown over TLS")
        return self
