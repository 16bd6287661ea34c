"""A small REST client: JSON in, JSON out, server-sent events as they come. It knows HTTP and the service's errors, not what is asked."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import httpx

PREFIX = "/api/v1/model-training"
# Unary calls: the first question to a model waits until it is loaded. Streams send heartbeats, so that silence means a cut.
CALL_TIMEOUT_SECONDS = 180.0

Json = dict[str, Any]


class DemoFailure(Exception):
    """The service did not do what the demo shows; the message is one sentence for a person."""


class Rest:
    """Calls the service below one base address."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url.rstrip("/") + PREFIX, timeout=CALL_TIMEOUT_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def is_answering(self) -> bool:
        """Tell whether the service answers a simple question."""
        try:
            return self._client.get("/models", params={"page_size": 1}, timeout=5.0).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def get(self, path: str) -> Json:
        """Read a resource."""
        return self._call("GET", path)

    def post(self, path: str, body: Json) -> Json:
        """Send a JSON body."""
        return self._call("POST", path, json=body)

    def upload(self, path: str, body: bytes, **query: str) -> Json:
        """Send a file as it is, its name and the like in the query."""
        return self._call("POST", path, content=body, params=query, headers={"content-type": "application/jsonl"})

    def delete(self, path: str) -> None:
        """Delete a resource."""
        self._call("DELETE", path)

    def is_missing(self, path: str) -> bool:
        """Tell whether the service says that there is no such resource."""
        return self._client.get(path).status_code == httpx.codes.NOT_FOUND

    def stream(self, method: str, path: str, body: Json | None = None, **query: str) -> Iterator[Json]:
        """Yield the events of a stream as they arrive. An `error` event ends it as a DemoFailure."""
        with _explained(method, path), self._client.stream(method, path, json=body, params=query) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
            _check(response, method, path)
            for line in response.iter_lines():
                if not line.startswith("data:"):
                    continue
                event: Json = json.loads(line.removeprefix("data:"))
                if "error" in event:
                    raise DemoFailure(f"The stream {path} ended with an error: {event['error'].get('message', event['error'])}")
                yield event

    def _call(self, method: str, path: str, **options: Any) -> Json:
        with _explained(method, path):
            response = self._client.request(method, path, **options)
            _check(response, method, path)
            answer: Json = response.json() if response.content else {}
            return answer


@contextmanager
def _explained(method: str, path: str) -> Iterator[None]:
    """Turn what goes wrong below HTTP into a sentence."""
    try:
        yield
    except httpx.HTTPError as error:
        raise DemoFailure(f"{method} {path} did not go through: {error or type(error).__name__}") from error
    except ValueError as error:
        raise DemoFailure(f"{method} {path} answered with something that is no JSON: {error}") from error


def _check(response: httpx.Response, method: str, path: str) -> None:
    if response.status_code != httpx.codes.OK:
        raise DemoFailure(f"{method} {path} answered {response.status_code} {_message(response)}")


def _message(response: httpx.Response) -> str:
    """Take the service's own sentence from an error body, or show the body's beginning."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:300]
    return str(body.get("message", body)) if isinstance(body, dict) else str(body)[:300]
