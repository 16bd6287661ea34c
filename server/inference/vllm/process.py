"""One vLLM server for one base model, on a unix socket: started, waited for, started again with back-off when it dies. Imports no vLLM."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

from server.domain.errors import ServiceError, Unavailable
from server.environment import ENGINE_ENVIRONMENT

# Adapters come while it serves. vLLM warns of it where everybody reaches the server; this one's socket is for this user only.
VARIABLES = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1"}
# It loads the weights of the largest models in minutes.
START_SECONDS = 1800.0
LOOK_SECONDS = 0.25
# How long it is left alone after it died; twice as long each time, until it has lived for a while.
FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS, GOOD_LIFE_SECONDS = 1.0, 60.0, 60.0
STOP_SECONDS = 10.0

logger = logging.getLogger(__name__)


class VllmProcess:
    """Keeps a server running from `start` to `stop`. `is_serving` asks it whether it answers."""

    def __init__(self, name: str, command: Sequence[str], socket: Path, is_serving: Callable[[], Awaitable[bool]]) -> None:
        self._name, self._command, self._socket, self._is_serving = name, list(command), socket, is_serving
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self.is_ready = False
        self.deaths = 0  # in a row, each after a short life
        self.losses = 0  # all deaths: what the server held went with it each time

    def start(self) -> None:
        """Start it in the background."""
        self._task = asyncio.get_running_loop().create_task(self._keep())

    async def wait_ready(self) -> None:
        """Wait until it answers. Raises Unavailable where it dies before, or is only being started again."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.is_ready or self.deaths > 0)
        if not self.is_ready:
            raise self.explain_death()

    def explain_death(self) -> Unavailable:
        """Say that it is being started again."""
        return Unavailable("vLLM has ended and is started again.", reason="ENGINE_UNAVAILABLE", retry_after_seconds=self._pause_seconds)

    async def stop(self) -> None:
        """End it, and what it started."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    @property
    def _pause_seconds(self) -> float:
        return float(min(FIRST_PAUSE_SECONDS * 2 ** max(0, self.deaths - 1), LAST_PAUSE_SECONDS))

    async def _keep(self) -> None:
        while True:
            began = time.monotonic()
            await self._run()
            life = time.monotonic() - began
            self.losses += 1
            await self._tell(is_ready=False, deaths=1 if life > GOOD_LIFE_SECONDS else self.deaths + 1)
            logger.error("vLLM for %s ended after %.0f s; it is started again in %.0f s", self._name, life, self._pause_seconds)
            await asyncio.sleep(self._pause_seconds)

    async def _run(self) -> None:
        """Run it once, to its end. Its log is this process' own."""
        self._socket.unlink(missing_ok=True)
        # Without what this engine's own torch was given, which would slow vLLM's.
        environment = {name: value for name, value in os.environ.items() if name not in ENGINE_ENVIRONMENT} | VARIABLES
        process = await asyncio.create_subprocess_exec(*self._command, env=environment, start_new_session=True)
        waiting = asyncio.create_task(self._wait_serving(process))
        try:
            await process.wait()
        finally:
            waiting.cancel()
            await _end(process)

    async def _wait_serving(self, process: asyncio.subprocess.Process) -> None:
        """Tell when it answers; end it where it never does, so that nobody waits for ever."""
        began = time.monotonic()
        while not await self._answers():
            if time.monotonic() - began > START_SECONDS:
                logger.error("vLLM for %s does not answer after %.0f s: it is ended", self._name, START_SECONDS)
                await _end(process)
                return
            await asyncio.sleep(LOOK_SECONDS)
        self._socket.chmod(0o600)
        logger.info("vLLM for %s serves after %.1f s", self._name, time.monotonic() - began)
        await self._tell(is_ready=True, deaths=self.deaths)

    async def _answers(self) -> bool:
        if not self._socket.exists():
            return False
        try:
            return await self._is_serving()
        except ServiceError:
            return False

    async def _tell(self, *, is_ready: bool, deaths: int) -> None:
        async with self._changed:
            self.is_ready, self.deaths = is_ready, deaths
            self._changed.notify_all()


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a process and its group: what holds the weights is a child of the one that listens."""
    with suppress(ProcessLookupError):
        if process.returncode is None:
            process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
