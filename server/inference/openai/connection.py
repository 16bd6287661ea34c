"""The HTTP side of a server that speaks OpenAI's protocol: its calls, and its failures as typed errors. Knows no tokens."""

import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path

import httpx2
from pydantic import ValidationError

from server.domain.errors import FailedPrecondition, InvalidInput, NotFound, ResourceExhausted, ServiceError, Unavailable
from server.inference.openai.messages import Card, Cards, Event, Failure, Problem, make_nonsense, read_events

CONNECT_SECONDS = 5.0
# A server that does not tell its state within this time hangs.
DESCRIBE_SECONDS = 5.0
# What a caller is told to wait for a server that is down, and for one that is full.
RETRY_SECONDS, FULL_RETRY_SECONDS = 5.0, 1.0
MAX_PROBLEM_CHARACTERS = 300
# A host that vanished without a word is noticed by the kernel after 15 + 3 x 5 s, however long an answer may be silent.
KEEP_ALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]


class ModelGone(NotFound):
    """The server does not know the model (any more)."""

    default_reason = "MODEL_NOT_SERVED"


class Connection:
    """Calls one server, at a URL or on a unix socket. Belongs to one event loop. Every call may raise Unavailable."""

    def __init__(self, url: str, *, api_key: str | None = None, silence_seconds: float = 300.0, uds: Path | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        # The number of streams is bounded by the engine, not by the pool: in the pool they would wait without a word.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        options = None if uds is not None else KEEP_ALIVE
        self._client = httpx2.AsyncClient(
            transport=httpx2.AsyncHTTPTransport(limits=limits, uds=None if uds is None else str(uds), socket_options=options),
            headers={} if api_key is None else {"authorization": f"Bearer {api_key}"},
            timeout=httpx2.Timeout(silence_seconds, connect=CONNECT_SECONDS),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def list_models(self) -> Sequence[Card]:
        """Give the models that are served. Its answer is the server's health."""
        with _translate_transport():
            response = await self._client.get(f"{self._url}/v1/models", timeout=DESCRIBE_SECONDS)
        _check(response)
        try:
            return Cards.model_validate_json(response.content).data
        except ValidationError as error:
            raise make_nonsense() from error

    @asynccontextmanager
    async def complete(self, body: Mapping[str, object]) -> AsyncIterator[AsyncIterator[Event]]:
        """Ask for a completion; give its events. Leaving the block closes the connection, by which the server knows to stop."""
        with _translate_transport():
            async with self._client.stream("POST", f"{self._url}/v1/completions", json=body) as response:
                if not response.is_success:
                    await response.aread()
                _check(response)
                async with aclosing(read_events(response.aiter_bytes())) as events, aclosing(_raise_problems(events)) as good:
                    yield good

    async def load_adapter(self, name: str, directory: Path) -> None:
        """Let the server load an adapter from a directory that it sees, too. Raises FailedPrecondition where it cannot."""
        response = await self._post("load_lora_adapter", {"lora_name": name, "lora_path": str(directory)})
        problem = _read_problem(response)
        if response.is_success or "already" in problem.message:  # the name stands for these files for ever
            return
        if response.status_code in (404, 405) and not problem.message.startswith("Loading"):
            raise FailedPrecondition(
                "The server of this model loads no adapters at run time (vLLM: --enable-lora, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True).",
                reason="ADAPTERS_NOT_SUPPORTED",
            )
        if response.status_code in (401, 403, 429, 502, 503, 504):
            _check(response)
        said = _shorten(problem).replace(str(directory), "its files")  # paths are nobody's business
        raise FailedPrecondition(f"The server of this model cannot load this version: {said}", reason="ADAPTER_NOT_LOADED")

    async def unload_adapter(self, name: str) -> None:
        """Let the server forget an adapter; one that it does not know is forgotten already."""
        response = await self._post("unload_lora_adapter", {"lora_name": name})
        if response.status_code != 404:
            _check(response)

    async def _post(self, call: str, body: Mapping[str, object]) -> httpx2.Response:
        with _translate_transport():
            return await self._client.post(f"{self._url}/v1/{call}", json=body)


@contextmanager
def _translate_transport() -> Iterator[None]:
    """Make what goes wrong with a connection a typed error."""
    try:
        yield
    except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
        raise Unavailable(
            "The server of this model cannot be reached.", reason="ENGINE_UNAVAILABLE", retry_after_seconds=RETRY_SECONDS
        ) from error
    except httpx2.TimeoutException as error:
        raise Unavailable("The server of this model is silent.", reason="ENGINE_SILENT", retry_after_seconds=RETRY_SECONDS) from error
    except (httpx2.HTTPError, httpx2.StreamError) as error:
        raise make_lost() from error


def make_lost() -> Unavailable:
    """Say that an answer was cut."""
    return Unavailable("The server of this model ended a stream too early.", reason="ENGINE_LOST", retry_after_seconds=RETRY_SECONDS)


async def _raise_problems(events: AsyncIterator[Event]) -> AsyncGenerator[Event]:
    async for event in events:
        if event.error is not None:
            code = event.error.code
            raise _translate(code if isinstance(code, int) else 500, event.error, None)
        yield event


def _check(response: httpx2.Response) -> None:
    if not response.is_success:
        raise _translate(response.status_code, _read_problem(response), response.headers.get("retry-after"))


def _read_problem(response: httpx2.Response) -> Problem:
    try:
        failure = Failure.model_validate_json(response.content)
    except ValidationError:
        return Problem(message=response.reason_phrase)
    return failure.error or Problem(message=failure.message)


def _translate(status: int, problem: Problem, retry_after: str | None) -> ServiceError:
    """Say what a status means to the caller. The server's own words are shown only where they are about the request."""
    seconds = float(retry_after) if retry_after is not None and retry_after.isdecimal() else None
    match status:
        case 401 | 403:
            return Unavailable("The server of this model refuses this service's key (ENGINE_API_KEY).", reason="ENGINE_KEY_REFUSED")
        case 404:
            return ModelGone("The server of this model does not serve it.")
        case 429:
            return ResourceExhausted(
                "The server of this model takes no more requests now.",
                reason="QUEUE_FULL",
                retry_after_seconds=seconds or FULL_RETRY_SECONDS,
            )
        case 400 | 413 | 422:
            return InvalidInput(f"The server of this model refuses the request: {_shorten(problem)}", reason="REFUSED_BY_ENGINE")
        case 502 | 503 | 504:
            return Unavailable(
                "The server of this model is not ready.", reason="ENGINE_UNAVAILABLE", retry_after_seconds=seconds or RETRY_SECONDS
            )
        case _:
            return Unavailable("The server of this model failed on this call.", reason="ENGINE_FAILED")


def _shorten(problem: Problem) -> str:
    return " ".join(problem.message.split())[:MAX_PROBLEM_CHARACTERS]
