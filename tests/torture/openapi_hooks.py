"""Hooks for schemathesis: what the OpenAPI document cannot say, and what would only cost time.

Loaded by schemathesis itself (SCHEMATHESIS_HOOKS), not by pytest.
"""

from typing import Any

import schemathesis

from labelmint.gateway.rest.messages import MAX_TAR_COUNT

MODEL, NUM_WS, CLASSES = "faces", 12, ("hair", "skin", "eye", "nose")


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    """A positive case asks for the model that is served and keeps the rules between parameters."""
    if case.operation.path.endswith("samples.tar"):
        case.query = short(case.query or {})
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    if case.path_parameters and "model" in case.path_parameters:
        case.path_parameters = {**case.path_parameters, "model": MODEL}
    if isinstance(case.query, dict):
        case.query = coherent(case.query)
    if isinstance(case.body, dict):
        case.body = coherent({**case.body, "seeds": case.body["seeds"][:4]})


def short(query: dict[str, Any]) -> dict[str, Any]:
    """An archive of two samples, whatever the gate says of them; what is not valid stays so."""
    count = number(query.get("count", 100))
    if count is not None and 2 < count <= MAX_TAR_COUNT:
        query = {**query, "count": 2}
    if query.get("include_rejected", False) in (False, "false"):
        query = {**query, "include_rejected": "true"}
    return query


def coherent(options: dict[str, Any]) -> dict[str, Any]:
    left_out = ("revision", "model_version", "style_seeds", "class_index")
    options = {key: value for key, value in options.items() if key not in left_out}
    style_seed, crossover = number(options.pop("style_seed", None)), number(options.pop("crossover", None))
    if style_seed is not None and crossover is not None:
        options |= {"style_seed": style_seed, "crossover": 1 + crossover % (NUM_WS - 1), "max_js": 1.0}
    if options.get("where"):
        options["where"] = [f"{name}:0.." for name, _ in zip(CLASSES, options["where"], strict=False)]
    if options.get("truncation_psi") is not None and options.get("max_js") is None:
        options["max_js"] = 1.0
    if options.get("max_js") is not None:
        options.pop("max_quantile", None)
    shard_index = number(options.pop("shard_index", None))
    if shard_index is not None:
        options["shard_index"] = shard_index % (number(options.get("shard_count")) or 1)
    return options


def number(value: object) -> int | None:
    """A whole number, which a query may hold as text."""
    return int(value) if isinstance(value, (int, str)) and str(value).lstrip("-").isdecimal() else None
