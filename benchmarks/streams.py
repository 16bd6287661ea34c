"""Many streams at once through the service's gRPC, and how long each token of them took."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from google.protobuf.message import Message
from grpc import aio
from modeltraining.v1 import inference_service_pb2 as pb
from modeltraining.v1.generation_pb2 import GenerationParameters

METHOD = "/modeltraining.v1.InferenceService/StreamGenerate"
# Streams on one HTTP/2 connection wait for each other at 100.
STREAMS_PER_CONNECTION = 64

Send = Callable[[Message], "aio.UnaryStreamCall[Message, bytes]"]


@dataclass(frozen=True)
class Ask:
    """One request: a base model's name or a model's id, greedy, so many new tokens at most."""

    model_id: str
    prompt: str
    new_tokens: int


@dataclass(frozen=True)
class Stream:
    """One answer. Seconds from sending to its first text and between its texts, and those that the engine was loading for it."""

    tokens: int
    first_seconds: float
    gap_seconds: Sequence[float]
    load_seconds: float


@dataclass(frozen=True)
class Figures:
    """What streams took together: the clock's seconds, and each stream's answer."""

    wall_seconds: float
    streams: Sequence[Stream]

    @property
    def tokens(self) -> int:
        """Tokens of all streams."""
        return sum(stream.tokens for stream in self.streams)

    @property
    def rate(self) -> float:
        """Tokens per second of all streams together."""
        return self.tokens / self.wall_seconds

    def first_ms(self, percent: int) -> float:
        """Give a percentile of the time to the first token in milliseconds."""
        return percentile([stream.first_seconds for stream in self.streams], percent) * 1000

    def gap_ms(self, percent: int) -> float:
        """Give a percentile of the time between two texts of a stream in milliseconds."""
        return percentile([gap for stream in self.streams for gap in stream.gap_seconds], percent) * 1000


def percentile(values: Sequence[float], percent: int) -> float:
    """Give the value below which so many percent lie (nearest rank)."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, len(ranked) * percent // 100)] if ranked else 0.0


@asynccontextmanager
async def connect(target: str, streams: int) -> AsyncIterator[Sequence[Send]]:
    """Open as many connections as these streams need; give what sends a request on each."""
    count = -(-streams // STREAMS_PER_CONNECTION)
    channels = [aio.insecure_channel(target, options=(("grpc.use_local_subchannel_pool", 1),)) for _ in range(count)]
    try:
        # Answers stay bytes until their stream has ended: on few cores a client that reads them at once would slow what it measures.
        yield [channel.unary_stream(METHOD, pb.StreamGenerateRequest.SerializeToString, bytes) for channel in channels]
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


async def ask(send: Send, asked: Ask) -> Stream:
    """Send one request and read its answer to the end. Raises RuntimeError where it failed within its stream."""
    parameters = GenerationParameters(max_tokens=asked.new_tokens, temperature=0.0)
    start, times, messages = time.perf_counter(), list[float](), list[bytes]()
    async for data in send(pb.StreamGenerateRequest(model_id=asked.model_id, prompt=asked.prompt, parameters=parameters)):
        times.append(time.perf_counter())
        messages.append(data)
    return _read(start, times, [pb.StreamGenerateResponse.FromString(data) for data in messages])


def _read(start: float, times: Sequence[float], messages: Sequence[pb.StreamGenerateResponse]) -> Stream:
    if not messages or not messages[-1].HasField("finished"):
        raise RuntimeError(f"a stream ended with {messages[-1:]}")
    finished = messages[-1].finished
    texts = [when for when, message in zip(times, messages, strict=True) if message.HasField("delta")]
    gaps = [later - sooner for sooner, later in itertools.pairwise(texts)]
    timings = finished.timings
    return Stream(
        finished.usage.completion_tokens,
        (texts or times)[0] - start,
        gaps,
        timings.load_seconds + timings.adapter_load_seconds,
    )


async def run_streams(target: str, asked: Sequence[Ask], at_once: int) -> Figures:
    """Run requests in their order, so many at a time: as one ends the next begins."""
    waiting = enumerate(asked)  # each worker takes the next
    streams: dict[int, Stream] = {}

    async def work(send: Send) -> None:
        for place, one in waiting:
            streams[place] = await ask(send, one)

    async with connect(target, at_once) as sends:
        start = time.perf_counter()
        await asyncio.gather(*(work(sends[number % len(sends)]) for number in range(at_once)))
        wall_seconds = time.perf_counter() - start
    return Figures(wall_seconds, [streams[place] for place in sorted(streams)])
