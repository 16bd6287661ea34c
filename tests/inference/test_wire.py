"""The border between api and engine: real sockets, and where it is about dying, real processes."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path

import pytest

from server.domain.embeddings import EmbeddingBackend, Embeddings
from server.domain.errors import InvalidInput, NotFound, ResourceExhausted, Unavailable
from server.domain.generation import EmbedRole, FinishReason, ModelReference, TokenLogprob
from server.inference.batching import BatchLimits
from server.inference.client import EngineClient
from server.inference.engine import EmbeddedEngine
from server.inference.library import LoadingOptions
from server.inference.server import serve
from server.storage.artefacts import ArtefactStore
from tests.inference.asking import Answer, ask, collect
from tests.inference.engine_process import start_engine_process
from tests.inference.engines import Directories, make_engine
from tests.tiny_models import CONTEXT_TOKENS

LLAMA = ModelReference("llama", "llama")


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """A path short enough for a unix socket."""
    with tempfile.TemporaryDirectory(prefix="engine") as directory:
        yield Path(directory) / "engine.sock"


class Served:
    """An engine behind a socket in this process, with a client."""

    def __init__(self, engine: EmbeddedEngine, socket_path: Path) -> None:
        self.engine, self.client = engine, EngineClient(socket_path)
        self._stop, ready = asyncio.Event(), asyncio.Event()
        self.ready = ready
        self._task = asyncio.create_task(serve(engine, socket_path, stop=self._stop, on_ready=ready.set))

    async def end(self) -> None:
        """Stop all."""
        await self.client.close()
        self._stop.set()
        await self._task

    async def running(self) -> int:
        """Count requests that hold a place or wait for one."""
        models = (await self.engine.describe()).models
        return sum(model.running_requests + model.waiting_requests for model in models)


@pytest.fixture
async def served(tiny: Callable[[str], Path], tmp_path: Path, socket_path: Path) -> AsyncIterator[Served]:
    """The tiny engine served."""
    made = Served(make_engine({"llama": tiny("llama")}, tmp_path, BatchLimits(max_rows=2, max_waiting=1, cache_tokens=4096)), socket_path)
    await made.ready.wait()
    yield made
    await made.end()


def list_logprobs(answer: Answer) -> list[tuple[TokenLogprob, ...]]:
    return [(position.chosen, *position.top) for delta in answer.deltas for position in delta.logprobs]


async def wait_until_idle(served: Served) -> None:
    async with asyncio.timeout(10):
        while await served.running():  # noqa: ASYNC110  # the engine's status is polled, as a caller would
            await asyncio.sleep(0.01)


async def test_an_answer_crosses_the_border_unchanged(served: Served) -> None:
    request = ask("الخرائط maps", max_tokens=20, logprobs=1)
    direct = await collect(served.engine.generate(request))
    crossed = await collect(served.client.generate(request))
    assert crossed.text == direct.text
    assert crossed.end.usage == direct.end.usage
    assert list_logprobs(crossed) == list_logprobs(direct)
    assert len(list_logprobs(direct)) == direct.end.usage.completion_tokens
    assert await served.client.count_tokens(LLAMA, ["maps", ""]) == await served.engine.count_tokens(LLAMA, ["maps", ""])
    assert await served.client.read_context_tokens(LLAMA) == CONTEXT_TOKENS
    assert (await served.client.describe()).models[0].base_model == "llama"
    await served.client.forget("llama")
    assert not (await served.client.describe()).models


async def test_typed_errors_are_raised_again_as_what_they_were(served: Served) -> None:
    with pytest.raises(NotFound) as unknown:
        await collect(served.client.generate(ask("x", model="nowhere")))
    assert unknown.value.reason == "BASE_MODEL_NOT_FOUND"
    with pytest.raises(InvalidInput) as long:
        await collect(served.client.generate(ask("maps " * 600)))
    assert long.value.data.violations[0].field == "prompt"
    with pytest.raises(NotFound):
        await served.client.count_tokens(ModelReference("x", "nowhere"), ["x"])
    results = await asyncio.gather(
        *(collect(served.client.generate(ask("maps", max_tokens=60))) for _ in range(12)), return_exceptions=True
    )
    refused = [r for r in results if isinstance(r, ResourceExhausted)]
    assert refused
    assert refused[0].data.retry_after_seconds


async def test_vectors_come_from_the_injected_embedder(tiny: Callable[[str], Path], tmp_path: Path, socket_path: Path) -> None:
    class Lengths:
        def is_loaded(self, embedding_model: str, backend: EmbeddingBackend) -> bool:
            return False

        def load(self, embedding_model: str, backend: EmbeddingBackend) -> None:
            if embedding_model != "lengths":
                raise NotFound.of("embedding model", embedding_model)

        def embed_texts(self, embedding_model: str, texts: Sequence[str], role: EmbedRole, backend: EmbeddingBackend) -> Embeddings:
            assert backend is EmbeddingBackend.BFLOAT16
            vectors = [[len(text) / 3, 1.0 if role is EmbedRole.QUERY else 2.0] for text in texts]
            return Embeddings(vectors, 2, [len(text) for text in texts], 7)

    engine = EmbeddedEngine(
        base_models=Directories({}),
        versions=ArtefactStore(tmp_path),
        embedder=Lengths(),
        options=LoadingOptions(BatchLimits()),
        max_model_bytes=1,
    )
    served = Served(engine, socket_path)
    await served.ready.wait()
    given = await served.client.embed("lengths", ["a", "bcd"], EmbedRole.QUERY, EmbeddingBackend.BFLOAT16)
    assert [list(vector) for vector in given.vectors] == [[pytest.approx(1 / 3, abs=1e-7), 1.0], [1.0, 1.0]]
    assert (given.dimension, given.token_counts, given.max_tokens) == (2, [1, 3], 7)
    with pytest.raises(NotFound):
        await served.client.embed("other", ["a"], EmbedRole.PASSAGE)
    await served.end()


async def test_scores_come_from_the_injected_reranker_which_is_told_the_end_of_its_time(tmp_path: Path, socket_path: Path) -> None:
    class Lengths:
        def score(self, model: str, query: str, texts: Sequence[str], deadline_seconds: float) -> Sequence[float] | None:
            left = deadline_seconds - time.monotonic()
            assert 0 < left <= 30
            return [float(len(query) + len(text)) for text in texts] if model == "lengths" and left > 10 else None

    served = Served(make_engine({}, tmp_path, reranker=Lengths()), socket_path)
    await served.ready.wait()
    assert await served.client.rerank("lengths", "q", ["a", "bcd"], 30.0) == [2.0, 4.0]
    assert await served.client.rerank("lengths", "q", ["a"], 5.0) is None
    await served.end()


async def test_closing_the_clients_stream_frees_the_place_in_the_engine(served: Served) -> None:
    async with aclosing(served.client.generate(ask("The river", max_tokens=480))) as events:
        await anext(events)
        assert await served.running() == 1
    await wait_until_idle(served)


async def test_a_client_that_vanishes_frees_its_places(served: Served, socket_path: Path) -> None:
    script = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from server.inference.client import EngineClient\n"
        "from tests.inference.asking import ask\n"
        "async def main():\n"
        "    async for _ in EngineClient(Path(sys.argv[1])).generate(ask('The river', max_tokens=480)):\n"
        "        print('first', flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", script, str(socket_path), stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert await child.stdout.readline() == b"first\n"
    os.kill(child.pid, signal.SIGKILL)
    await child.wait()
    await wait_until_idle(served)
    assert (await collect(served.client.generate(ask("The river")))).end.finish_reason in FinishReason


async def test_a_reader_who_reads_nothing_neither_slows_others_nor_keeps_its_place(served: Served) -> None:
    sleeper = served.client.generate(ask("The river", max_tokens=480, logprobs=5))
    await anext(sleeper)
    answers = [await collect(served.client.generate(ask(f"A question {n}", max_tokens=30))) for n in range(5)]
    assert all(answer.end.usage.completion_tokens for answer in answers)
    await wait_until_idle(served)
    async with aclosing(sleeper):
        rest = await collect(sleeper)
    assert rest.end.usage.completion_tokens > 100


async def test_a_killed_engine_is_a_typed_error_and_its_successor_is_found(tiny: Callable[[str], Path], socket_path: Path) -> None:
    client = EngineClient(socket_path)
    with pytest.raises(Unavailable):
        await client.describe()
    with start_engine_process(socket_path, tiny("llama")) as process:
        first = await collect(client.generate(ask("The river")))
        streams = [client.generate(ask(f"The river {n}", max_tokens=480)) for n in range(4)]
        for stream in streams:
            await anext(stream)
        process.kill()
        results = await asyncio.gather(*map(collect, streams), return_exceptions=True)
        assert all(isinstance(result, Unavailable) for result in results), results
        with pytest.raises(Unavailable) as down:
            await client.count_tokens(LLAMA, ["x"])
        assert down.value.data.retry_after_seconds
    with start_engine_process(socket_path, tiny("llama")) as process:
        assert (await collect(client.generate(ask("The river")))).text == first.text
        process.terminate()
        assert await asyncio.to_thread(process.wait, 20) == 0
    await client.close()


async def test_an_engine_that_hangs_is_not_taken_for_healthy(
    tiny: Callable[[str], Path], socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.inference.client.DESCRIBE_SECONDS", 0.5)
    client = EngineClient(socket_path)
    with start_engine_process(socket_path, tiny("llama")) as process:
        await client.load(LLAMA)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(Unavailable):
            await client.describe()
        process.send_signal(signal.SIGCONT)
        monkeypatch.setattr("server.inference.client.DESCRIBE_SECONDS", 20.0)
        assert (await client.describe()).models
    await client.close()


async def test_a_stopping_engine_ends_its_streams_with_a_typed_error(
    tiny: Callable[[str], Path], tmp_path: Path, socket_path: Path
) -> None:
    served = Served(make_engine({"llama": tiny("llama")}, tmp_path), socket_path)
    await served.ready.wait()
    stream = served.client.generate(ask("The river", max_tokens=480))
    await anext(stream)
    await served.engine.stop()
    with pytest.raises(Unavailable):
        await collect(stream)
    await served.end()


def test_the_client_imports_no_torch() -> None:
    probe = "import sys, server.inference.client; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
