"""The values of a gateway's /metrics."""

import httpx

REST_IN_FLIGHT = 'labelmint_requests_in_flight{transport="rest"}'
GRPC_IN_FLIGHT = 'labelmint_requests_in_flight{transport="grpc"}'
IN_TRITON = "labelmint_samples_in_flight"
DEMAND = "labelmint_demand_samples"


def value_of(text: str, name: str) -> float:
    """Return the value of the series with this name and these labels; 0 if there is none."""
    for line in text.splitlines():
        if line.startswith(name + " "):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


def metric(http: httpx.Client, name: str) -> float:
    answer = http.get("/metrics")
    assert answer.status_code == 200, answer.text
    return value_of(answer.text, name)


async def metric_of(http: httpx.AsyncClient, name: str) -> float:
    answer = await http.get("/metrics")
    assert answer.status_code == 200, answer.text
    return value_of(answer.text, name)
