"""The configuration of `labelmint serve`: one definition, from which environment variables, flags and help derive.

Rules of this file:
- An environment variable is LABELMINT_ and the field's name; a flag is the field's name with dashes and wins.
- A value that cannot work is refused here, before anything is started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
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
        str, Field(description="HOST:PORT of a running Triton's gRPC; empty: start one of our own")
    ] = ""
    triton_log: Annotated[Path | None, Field(description="file for the log of our own Triton")] = None
    host: Annotated[str, Field(description="address that both doors listen on")] = "127.0.0.1"
    http_port: Annotated[Port, Field(description="port of REST; 0: any free one")] = 8080
    grpc_port: Annotated[Port, Field(description="port of gRPC; 0: any free one")] = 50051
    max_in_flight: Annotated[
        int, Field(ge=1, description="samples in Triton at once; beyond it requests are refused with 429")
    ] = 128
    grace_seconds: Annotated[
        float, Field(ge=0, description="time that requests in flight get to finish at shutdown")
    ] = 10.0
