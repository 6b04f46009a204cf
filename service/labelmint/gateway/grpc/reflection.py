"""Server reflection as `grpc.reflection.v1` and, for older tools, as `grpc.reflection.v1alpha`.

Rules of this file:
- grpcio-reflection implements only v1alpha. v1 has the same messages in another package. The same servicer therefore
  answers both, and the descriptor of v1 is built from that of v1alpha.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor
from grpc_reflection.v1alpha import reflection, reflection_pb2

_OLD, _NEW = "grpc.reflection.v1alpha", "grpc.reflection.v1"


def _described() -> ServiceDescriptor:
    """Return the descriptor of v1, after adding it to the pool from which reflection answers."""
    pool, path = descriptor_pool.Default(), "grpc/reflection/v1/reflection.proto"
    try:
        file = pool.FindFileByName(path)
    except KeyError:
        new = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(new)
        new.name, new.package = path, _NEW
        for method in new.service[0].method:
            method.input_type = method.input_type.replace(_OLD, _NEW)
            method.output_type = method.output_type.replace(_OLD, _NEW)
        for field in (field for message in new.message_type for field in message.field if field.type_name):
            field.type_name = field.type_name.replace(_OLD, _NEW)
        pool.AddSerializedFile(new.SerializeToString())
        file = pool.FindFileByName(path)
    return file.services_by_name["ServerReflection"]


SERVICE = _described()


def add_reflection(server: grpc.aio.Server, services: Iterable[str]) -> None:
    """Serve reflection under both names. It describes `services` and itself."""
    servicer = reflection.aio.ReflectionServicer((*services, SERVICE.full_name, reflection.SERVICE_NAME))
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for name in (SERVICE.full_name, reflection.SERVICE_NAME):
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler}),)
        )
