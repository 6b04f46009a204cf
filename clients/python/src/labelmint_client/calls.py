"""Builds the requests of both clients, blocking and asyncio, and reads their responses. Pure functions.

Rules of this file:
- Each unary method of a client is one `Call`, built here. The clients differ only in how they send it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from labelmint_client.messages import (
    Filtered,
    Model,
    Rejection,
    Sample,
    SampleOptions,
    SeedPage,
    checked,
    model_of,
    model_of_class,
    outcomes_of,
    sample_of,
    seed_page_of,
)
from labelmint_client.v1 import sample_service_pb2 as pb

T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T]):
    """The name of an RPC, its request, and the function that reads its response."""

    method: str
    request: Any
    read: Callable[[Any], T]


def list_models() -> Call[list[Model]]:
    return Call("ListModels", pb.ListModelsRequest(), lambda answer: [model_of(model) for model in answer.models])


def get_model(model: str, model_version: str, class_index: int | None) -> Call[Model]:
    request = pb.GetModelRequest(model=model, model_version=model_version, class_index=class_index)
    return Call("GetModel", request, lambda answer: model_of_class(answer.model, class_index))


def get_sample(model: str, seed: int, options: SampleOptions | None, *, model_version: str, task: str) -> Call[Sample]:
    message = (options or SampleOptions()).message(task)
    request = pb.GetSampleRequest(model=model, seed=seed, options=message, model_version=model_version)
    return Call("GetSample", request, lambda answer: sample_of(checked(answer.sample, message)))


def batch_get_samples(
    model: str,
    seeds: Sequence[int],
    options: SampleOptions | None,
    *,
    style_seeds: Sequence[int],
    model_version: str,
    task: str,
) -> Call[list[Sample | Rejection | Filtered]]:
    message = (options or SampleOptions()).message(task)
    request = pb.BatchGetSamplesRequest(
        model=model, seeds=seeds, options=message, style_seeds=style_seeds, model_version=model_version
    )
    return Call("BatchGetSamples", request, lambda answer: outcomes_of(answer, message))


def list_seeds(
    model: str, start_seed: int, end_seed: int, *, options: SampleOptions | None, model_version: str, task: str
) -> Call[SeedPage]:
    request = pb.ListSeedsRequest(
        model=model,
        start_seed=start_seed,
        end_seed=end_seed,
        options=(options or SampleOptions()).message(task),
        model_version=model_version,
    )
    return Call("ListSeeds", request, seed_page_of)
