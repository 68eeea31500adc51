"""How an RPC failed, read from its status."""

from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2


@dataclass
class Failure:
    """How an RPC failed, with the details unpacked by their type's name."""

    code: grpc.StatusCode
    message: str
    trailers: dict[str, str | bytes]
    initial_metadata: dict[str, str | bytes]
    details: dict[str, Message]

    @property
    def reason(self) -> str:
        return self.details["ErrorInfo"].reason

    @property
    def violations(self) -> dict[str, str]:
        return {v.field: v.description for v in self.details["BadRequest"].field_violations}


def failure(error: grpc.aio.AioRpcError) -> Failure:
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))
    return Failure(
        code=error.code(),
        message=error.details(),
        trailers=trailers,
        initial_metadata=dict(error.initial_metadata()),
        details={name: detail for name, detail in map(_unpack, status.details)},
    )


def _unpack(packed: any_pb2.Any) -> tuple[str, Message]:
    name = packed.type_url.rpartition(".")[2]
    detail = getattr(error_details_pb2, name)()
    assert packed.Unpack(detail)
    return name, detail
