"""Models that are loaded before anybody asks: as soon as the engine runs, again after its restart, and after a promotion."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress

from server.domain.engines import EngineStatus
from server.domain.errors import ServiceError
from server.domain.generation import ModelReference
from server.services.model_ports import Engine
from server.services.references import References

LOOK_SECONDS = 5.0  # how often it is looked at whether a new engine or a promotion calls for loading

logger = logging.getLogger(__name__)


class Preloader:
    """Keeps the named models loaded: those of `preloaded` until something else needs their memory, those of `pinned` for good."""

    def __init__(self, engine: Engine, references: References, preloaded: Sequence[str], pinned: Sequence[str]) -> None:
        self._engine, self._references = engine, references
        self._pins = {name: name in pinned for name in (*pinned, *preloaded)}
        self._instance = ""
        self._loaded: dict[str, ModelReference] = {}

    async def run(self, organization: str) -> None:
        """Go on for ever; ends at once where no model is named."""
        while self._pins:
            with suppress(ServiceError):  # an engine that is down is asked again
                await self.follow(organization, await self._engine.describe())
            await asyncio.sleep(LOOK_SECONDS)

    async def follow(self, organization: str, status: EngineStatus) -> None:
        """Load what this engine has not been told to load yet, and another version where another serves now.

        What fails is logged and tried again by the next call; the others are loaded all the same.
        """
        if status.instance != self._instance:
            self._instance, self._loaded = status.instance, {}
        for name, is_pinned in self._pins.items():
            try:
                await self._load(organization, name, is_pinned)
            except ServiceError as error:
                logger.warning("%s cannot be loaded ahead: %s", name, error)

    async def _load(self, organization: str, name: str, is_pinned: bool) -> None:
        reference = await self._references.resolve(organization, name)
        before = self._loaded.get(name)
        if before == reference:
            return
        await self._engine.load(reference, pinned=is_pinned)
        self._loaded[name] = reference
        if before is not None:
            await self._engine.unload(before)
        logger.info("%s is loaded%s", name, " and pinned" if is_pinned else "")
