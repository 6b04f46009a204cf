"""What comes over the wires, read for assertions: errors of gRPC and REST, and options that accept everything."""

import grpc
import grpc.aio
import httpx
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from labelmint.v1 import sample_service_pb2 as pb
from tests.conftest import Service

LOOSE = pb.SampleOptions(max_quantile=1.0, include_rejected=True)


LOOSE_QUERY = {"max_quantile": 1.0, "include_rejected": True}  # the same for REST
RAW = pb.SampleOptions(
    max_quantile=1.0,
    include_rejected=True,
    image_encoding=pb.ENCODING_RAW,
    label_encoding=pb.ENCODING_RAW,
)


def info_of(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    trailers = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert status.code == error.code().value[0] and status.message == error.details()
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info) and info.domain == "labelmint"
    return info


def pause_of(error: grpc.RpcError) -> int:
    """The delay of google.rpc.RetryInfo in seconds; 0 where there is none."""
    status = status_pb2.Status.FromString(dict(error.trailing_metadata() or ())["grpc-status-details-bin"])
    info = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return int(info.retry_delay.seconds)
    return 0


def problem(answer: httpx.Response, status: int, reason: str) -> dict[str, str]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status and body["reason"] == reason and body["detail"]
    assert "Traceback" not in answer.text
    return dict(body["metadata"])


def health_of(service: Service) -> int:
    with grpc.insecure_channel(service.grpc) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status
