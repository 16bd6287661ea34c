"""Watches over the parts that run: starts a dead one again, with growing pauses, and stops all in reverse order."""

import asyncio
import time
from collections.abc import Callable

from server.launcher.part import Part, PartFailed, PartProcess

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0
# A part that ran so long is taken for healthy: its next end starts with the short pause again.
_HEALTHY_SECONDS = 60.0


class Supervision:
    """The running parts, in the order of their start. `report` gets a line for whoever watches."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._processes: list[PartProcess] = []
        self._watches: list[asyncio.Task[None]] = []

    async def start(self, *parts: Part) -> None:
        """Start parts side by side, wait until each is ready, in order, and watch them from then on. Raises PartFailed."""
        started = []
        for part in parts:
            self._processes.append(await PartProcess.start(part))
            started.append(len(self._processes) - 1)
        for place in started:
            await self._processes[place].wait_ready()
            self._report(f"{self._processes[place].part.name} is ready")
            self._watches.append(asyncio.create_task(self._watch(place)))

    async def stop(self, hurry: asyncio.Event) -> None:
        """Stop all, last started first. `hurry` ends the patience with those that take their time."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        for process in reversed(self._processes):
            await process.stop(hurry)
            self._report(f"{process.part.name} is stopped")

    async def _watch(self, place: int) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            process = self._processes[place]
            began = time.monotonic()
            end = await process.wait()
            if time.monotonic() - began > _HEALTHY_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            self._report(f"{process.part.name} ended ({end}); it is started again in {pause:g} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            await self._start_again(place)

    async def _start_again(self, place: int) -> None:
        old = self._processes[place]
        await old.stop(asyncio.Event())  # whatever it left behind in its group
        try:
            self._processes[place] = await PartProcess.start(old.part)
            await self._processes[place].wait_ready()
            self._report(f"{old.part.name} is ready again")
        except PartFailed as error:
            self._report(str(error))
            await self._processes[place].stop(asyncio.Event())
