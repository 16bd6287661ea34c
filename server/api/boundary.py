"""The boundary between the servicers and the wire: ids, the log line and errors of every call, unary and streaming side by side.

Nothing that a servicer raises reaches a client as it is. Knows no servicer and no message but by its descriptor.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias, cast

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc import aio

from server.api.calls import REQUEST_ID_HEADER, Call, begin_call
from server.api.errors import code_of, status_from_error, status_from_incident
from server.domain.errors import ServiceError, Unavailable

# Where gRPC libraries, and Envoy's transcoder, look for a google.rpc.Status.
STATUS_DETAILS_TRAILER = "grpc-status-details-bin"

logger = logging.getLogger("server.api")

# Messages of any type pass here: only grpc's own types for them are this wide.
Context = aio.ServicerContext[Any, Any]
Unary = Callable[[Any, Context], Awaitable[Any]]
Streaming = Callable[[Any, Context], AsyncGenerator[Any, None]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"  # generic to the type checker only
StatusMessage = Callable[[status_pb2.Status], Message]

# How a handler is made, by (request streams, response streams).
MAKERS: Mapping[tuple[bool, bool], Callable[..., "grpc.RpcMethodHandler[Any, Any]"]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class Boundary(aio.ServerInterceptor):
    """Stands around every method of the given services; others (health, reflection) pass untouched."""

    def __init__(self, services: Sequence[FileDescriptor]) -> None:
        self._methods: Mapping[str, MethodDescriptor] = {
            f"/{service.full_name}/{method.name}": method
            for file in services
            for service in file.services_by_name.values()
            for method in service.methods
        }

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        """Wrap the method's handler in one of the same shape."""
        handler = await continuation(handler_call_details)
        name = handler_call_details.method
        method = self._methods.get(name)
        if handler is None or method is None:
            return handler
        shape = (handler.request_streaming, handler.response_streaming)
        # The stubs describe the synchronous server, whose handlers return what ours await.
        if handler.response_streaming:
            stream = cast(Streaming, handler.stream_stream or handler.unary_stream)
            guarded: Any = _guard_stream(name, stream, _find_in_band(method))
        else:
            guarded = _guard_answer(name, cast(Unary, handler.stream_unary or handler.unary_unary))
        return MAKERS[shape](guarded, handler.request_deserializer, handler.response_serializer)


def _guard_answer(method: str, handle: Unary) -> Unary:
    async def answer(request: Any, context: Context) -> Any:
        call = _begin(method, context)
        try:
            response = await handle(request, context)
        except BaseException as error:
            await _abort(context, call, _judge(error, call))
            raise
        call.messages_sent = 1
        call.log(grpc.StatusCode.OK)
        return response

    return answer


def _guard_stream(method: str, handle: Streaming, in_band: StatusMessage | None) -> Streaming:
    async def stream(request: Any, context: Context) -> AsyncGenerator[Any, None]:
        call = _begin(method, context)
        try:
            async with aclosing(handle(request, context)) as responses:
                async for response in responses:
                    yield response
                    call.messages_sent += 1
        except BaseException as error:
            status = _judge(error, call)
            # Behind a proxy that speaks HTTP/1.1 a status after the first message is lost: say it in the stream as well.
            if call.messages_sent and in_band:
                yield in_band(status)
            await _abort(context, call, status)
            raise
        call.log(grpc.StatusCode.OK)

    return stream


def _begin(method: str, context: Context) -> Call:
    call = begin_call(method, dict(context.invocation_metadata() or ()))
    context.set_trailing_metadata(((REQUEST_ID_HEADER, call.request_id),))
    return call


def _judge(error: BaseException, call: Call) -> status_pb2.Status:
    """Give the status for what was raised; raises it again where nobody is there to be told."""
    if isinstance(error, ServiceError):
        return status_from_error(error)
    task = asyncio.current_task()
    if isinstance(error, GeneratorExit) or (isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling()):
        # gRPC cancelled the task: the client went away, or the server stops and has told it. Swallowing this would keep the call's
        # memory. (`context.cancelled()` is False here in grpcio 1.85: it cannot tell.)
        call.log(grpc.StatusCode.CANCELLED)
        raise error
    if isinstance(error, asyncio.CancelledError):
        # Something inside was cancelled, not the call: without a status the client would wait for ever.
        return status_from_error(Unavailable("The call was interrupted. Try again.", reason="CALL_INTERRUPTED"))
    if isinstance(error, aio.AbortError) or not isinstance(error, Exception):
        # A status was sent already, or the process ends.
        call.log(grpc.StatusCode.UNKNOWN)
        raise error
    call.incident_id = uuid.uuid4().hex
    fields = {"incident_id": call.incident_id, "method": call.method, "request_id": call.request_id, "call_id": call.call_id}
    logger.error("incident %s", call.incident_id, exc_info=error, extra={"fields": fields})
    return status_from_incident(call.incident_id)


async def _abort(context: Context, call: Call, status: status_pb2.Status) -> None:
    """End the call with a status; raises AbortError."""
    call.log(code_of(status), status)
    trailers = ((REQUEST_ID_HEADER, call.request_id), (STATUS_DETAILS_TRAILER, status.SerializeToString()))
    await context.abort(code_of(status), status.message, trailers)


def _find_in_band(method: MethodDescriptor) -> StatusMessage | None:
    """Find how a stream's messages carry an error: those of the contract have a field `error` for it."""
    error = method.output_type.fields_by_name.get("error")
    if error is None or error.message_type is None or error.message_type.full_name != "google.rpc.Status":
        return None
    kind = message_factory.GetMessageClass(method.output_type)
    return lambda status: kind(error=status)
