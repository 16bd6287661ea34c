"""The thread that computes: it alone touches batches, between steps it takes commands, and it posts what came of each step."""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

from server.domain.errors import ServiceError, Unavailable
from server.domain.generation import Delta, TokenEvent
from server.inference.batching import Batch, Output
from server.inference.generations import Generation
from server.inference.mailbox import Mailbox

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Stepper:
    """Steps all batches in turn, in a thread of its own."""

    def __init__(self) -> None:
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._batches: list[Batch] = []
        self._mailboxes: dict[str, tuple[asyncio.AbstractEventLoop, Mailbox]] = {}
        self._thread = threading.Thread(target=self._run, name="engine-steps", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step that runs; requests still running fail as Unavailable."""
        self._commands.put(None)
        self._thread.join()

    def submit(self, batch: Batch, generation: Generation, mailbox: Mailbox) -> None:
        """Hand a request over; all that comes of it, refusals too, comes by the mailbox. From an event loop only."""
        loop = asyncio.get_running_loop()

        def command() -> None:
            self._mailboxes[generation.request_id] = (loop, mailbox)
            try:
                batch.submit(generation)
            except ServiceError as error:
                self._post([Output(generation, error)])

        self._commands.put(command)

    def cancel(self, batch: Batch, request_id: str) -> None:
        """Take a request out before the next step; harmless where it is over."""

        def command() -> None:
            batch.cancel(request_id)
            self._mailboxes.pop(request_id, None)

        self._commands.put(command)

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function between two steps and give its result."""
        future: Future[T] = Future()

        def command() -> None:
            try:
                future.set_result(function())
            except Exception as error:  # handed on to the caller, whatever it is
                future.set_exception(error)

        self._commands.put(command)
        return await asyncio.wrap_future(future)

    async def add(self, batch: Batch) -> None:
        """Step this batch too from now on."""
        await self.call(lambda: self._batches.append(batch))

    async def remove(self, batch: Batch) -> None:
        """Step this batch no more; its requests fail."""

        def command() -> None:
            self._batches.remove(batch)
            self._post(batch.fail_all(Unavailable("The model was unloaded.", reason="MODEL_UNLOADED", retry_after_seconds=1.0)))

        await self.call(command)

    def _run(self) -> None:
        while self._take_commands():
            for batch in list(self._batches):
                if batch.has_work:
                    self._post(self._step(batch))
        for batch in self._batches:
            self._post(batch.fail_all(Unavailable("The engine is stopping.", reason="ENGINE_STOPPING", retry_after_seconds=1.0)))

    def _step(self, batch: Batch) -> Sequence[Output]:
        try:
            return batch.step()
        except Exception as error:  # a bug here must not hang every request of the process
            logger.critical("a step failed as a whole", exc_info=error)
            return batch.fail_all(Unavailable("The engine failed.", reason="ENGINE_FAILED"))

    def _take_commands(self) -> bool:
        """Run what was ordered; wait for an order while there is nothing to compute. False when told to stop."""
        is_idle = not any(batch.has_work for batch in self._batches)
        while True:
            try:
                command = self._commands.get(block=is_idle)
            except Empty:
                return True
            if command is None:
                return False
            command()
            is_idle = False

    def _post(self, outputs: Sequence[Output]) -> None:
        """Bring outputs to their event loops, with one wake-up per loop and step."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, TokenEvent | ServiceError]]] = {}
        for output in outputs:
            entry = self._mailboxes.get(output.generation.request_id)
            if entry is not None:
                by_loop.setdefault(entry[0], []).append((entry[1], output.event))
            if not isinstance(output.event, Delta):
                self._mailboxes.pop(output.generation.request_id, None)
        for loop, letters in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, letters)
            except RuntimeError:
                logger.info("an event loop closed before its requests were over")


def _put_all(letters: Sequence[tuple[Mailbox, TokenEvent | ServiceError]]) -> None:
    for mailbox, event in letters:
        mailbox.put(event)
