"""The boundary over a real server: whatever a servicer raises, before or after its first message, a client is told as it should be."""

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc import aio
from modeltraining.v1 import inference_service_pb2, training_service_pb2

from tests.api.trouble import INSIDE, Client, read_detail, read_lines, read_status, read_stream, serve_trouble

pb = inference_service_pb2
CODES = [
    ("bug", grpc.StatusCode.INTERNAL),
    ("invalid", grpc.StatusCode.INVALID_ARGUMENT),
    ("unavailable", grpc.StatusCode.UNAVAILABLE),
    ("cancelled", grpc.StatusCode.UNAVAILABLE),
]


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with serve_trouble() as connected:
        yield connected


async def fail(client: Client, model_id: str) -> aio.AioRpcError:
    """Make a unary call that fails."""
    with pytest.raises(aio.AioRpcError) as failure:
        await client.inference.Generate(pb.GenerateRequest(model_id=model_id), timeout=10)
    return failure.value


@pytest.mark.parametrize(("trouble", "code"), CODES)
async def test_a_unary_call_fails_with_the_status_of_its_error(client: Client, trouble: str, code: grpc.StatusCode) -> None:
    error = await fail(client, trouble)
    assert (error.code(), read_status(error).code) == (code, code.value[0])


@pytest.mark.parametrize(("trouble", "code"), CODES)
async def test_a_stream_that_fails_before_its_first_message_has_none(client: Client, trouble: str, code: grpc.StatusCode) -> None:
    outcome = await read_stream(client, trouble, 0)
    assert (outcome.messages, outcome.code) == ([], code)


@pytest.mark.parametrize(("trouble", "code"), CODES)
async def test_a_stream_that_fails_in_the_middle_says_so_in_band_too(client: Client, trouble: str, code: grpc.StatusCode) -> None:
    outcome = await read_stream(client, trouble, 2)
    assert [message.WhichOneof("event") for message in outcome.messages] == ["delta", "delta", "error"]
    assert outcome.error is not None
    assert outcome.messages[-1].error == read_status(outcome.error)
    assert outcome.code is code


async def test_a_stream_that_goes_well_has_no_error(client: Client) -> None:
    outcome = await read_stream(client, "fine", 1)
    assert [message.WhichOneof("event") for message in outcome.messages] == ["delta", "finished"]
    assert outcome.code is grpc.StatusCode.OK


async def test_an_unhandled_exception_stays_inside_and_is_found_by_its_incident(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    unary = await fail(client, "bug")
    before = (await read_stream(client, "bug", 0)).error
    after = await read_stream(client, "bug", 1)
    assert before is not None
    assert after.error is not None
    for error in (unary, before, after.error):
        shown = f"{error} {error.details()} {error.trailing_metadata()}"
        assert "secret" not in shown
        assert "Traceback" not in shown
        assert "RuntimeError" not in shown
        info = read_detail(read_status(error), error_details_pb2.ErrorInfo)
        assert info is not None
        explained = [record for record in caplog.records if info.metadata["incident_id"] in record.getMessage() and record.exc_info]
        assert len(explained) == 1
        assert explained[0].exc_info is not None
        assert str(explained[0].exc_info[1]) == INSIDE
    assert "secret" not in str(after.messages)


async def test_an_upload_that_fails_is_answered_while_the_client_still_sends(client: Client) -> None:
    async def send() -> AsyncIterator[training_service_pb2.UploadDatasetRequest]:
        for _ in range(1_000):
            yield training_service_pb2.UploadDatasetRequest(display_name="bug")
            await asyncio.sleep(0.01)

    with pytest.raises(aio.AioRpcError) as failure:
        await client.training.UploadDataset(send(), timeout=5)
    assert failure.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(failure.value)


async def test_a_client_that_cancels_ends_the_handler(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    call = client.inference.Generate(pb.GenerateRequest(model_id="hang"))
    task = asyncio.ensure_future(call)
    await asyncio.wait_for(client.servicer.entered.wait(), 5)
    call.cancel()
    await asyncio.wait_for(client.servicer.left.wait(), 5)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [line["code"] for line in await wait_for_lines(caplog)] == ["CANCELLED"]


async def test_a_client_that_leaves_a_stream_ends_the_handler(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    call = client.inference.StreamGenerate(pb.StreamGenerateRequest(model_id="hang", prompt="1"))
    await call.read()
    await asyncio.wait_for(client.servicer.entered.wait(), 5)
    call.cancel()
    await asyncio.wait_for(client.servicer.left.wait(), 5)
    assert [line["code"] for line in await wait_for_lines(caplog)] == ["CANCELLED"]


async def test_a_passed_deadline_ends_the_handler(client: Client) -> None:
    with pytest.raises(aio.AioRpcError) as failure:
        await client.inference.Generate(pb.GenerateRequest(model_id="hang"), timeout=0.2)
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(client.servicer.left.wait(), 5)


async def test_calls_that_the_stopping_server_ends_are_told_so(client: Client) -> None:
    unary = asyncio.ensure_future(fail(client, "hang"))
    stream = asyncio.ensure_future(read_stream(client, "hang", 1))
    await asyncio.wait_for(client.servicer.entered.wait(), 5)
    await asyncio.sleep(0.1)
    await client.server.stop(0.1)
    await asyncio.wait({unary, stream}, timeout=5)
    assert (unary.result().code(), stream.result().code) == (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE)


@pytest.mark.parametrize(("given", "kept"), [("abc-1", True), ("x" * 129, False), ("with space", False)])
async def test_a_sound_request_id_is_kept_and_always_given_back(client: Client, given: str, kept: bool) -> None:
    call = client.inference.Generate(pb.GenerateRequest(model_id="fine"), metadata=(("x-request-id", given),))
    await call
    back = dict(await call.trailing_metadata() or ())["x-request-id"]
    assert (back == given) is kept
    assert back


async def test_every_call_writes_one_line(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    await client.inference.Generate(pb.GenerateRequest(model_id="fine", prompt="private"), metadata=(("x-request-id", "r1"),))
    await fail(client, "invalid")
    await read_stream(client, "fine", 3)
    await read_stream(client, "unavailable", 3)
    lines = await wait_for_lines(caplog, 4)
    assert [(line["code"], line["messages_sent"]) for line in lines] == [("OK", 1), ("INVALID_ARGUMENT", 0), ("OK", 4), ("UNAVAILABLE", 3)]
    assert lines[0]["method"] == "/modeltraining.v1.InferenceService/Generate"
    assert lines[0]["request_id"] == "r1"
    assert lines[1]["reason"] == "INVALID_INPUT"
    assert len({line["call_id"] for line in lines}) == 4
    assert "private" not in caplog.text


async def wait_for_lines(caplog: pytest.LogCaptureFixture, count: int = 1) -> list[dict[str, object]]:
    """Wait until the server wrote so many lines: it may do so after the client has its answer."""
    for _ in range(200):
        if len(lines := read_lines(caplog.records)) >= count:
            return lines
        await asyncio.sleep(0.01)
    return read_lines(caplog.records)
