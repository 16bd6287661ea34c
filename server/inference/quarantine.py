"""Versions whose files failed lately: for a while only the error is given again, so that they slow nobody else's loads."""

import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from server.basemodels.errors import BaseModelUnavailable
from server.domain.errors import ErrorData, FailedPrecondition, Unimplemented, error_from_data
from server.domain.generation import ModelReference
from server.inference.plans import name_version

# A version that failed is not read again before: hashing gigabytes for each of its requests would slow everybody's loads.
QUARANTINE_SECONDS = 60.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Entry:
    model_id: str
    until: float
    error: ErrorData


class Quarantine:
    """The versions that failed, by their names."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def check(self, name: str) -> None:
        """Raise what a version failed with, while that is not long ago."""
        entry = self._entries.get(name)
        if entry is not None and entry.until > time.monotonic():
            raise error_from_data(entry.error)

    @asynccontextmanager
    async def guard(self, reference: ModelReference) -> AsyncIterator[None]:
        """Quarantine the version whose files fail in this block, and release it where they do not."""
        name = name_version(reference)
        try:
            yield
        except (FailedPrecondition, Unimplemented) as error:
            # A base model that cannot be had now is not the version's fault.
            if reference.adapter_path is not None and not isinstance(error, BaseModelUnavailable):
                logger.warning("version %s of %s is quarantined: %s", reference.version, reference.model_id, error)
                self._entries[name] = _Entry(reference.model_id, time.monotonic() + QUARANTINE_SECONDS, error.data)
            raise
        self._entries.pop(name, None)

    def forget(self, model_id: str) -> None:
        """Release all versions of a model."""
        self._entries = {name: entry for name, entry in self._entries.items() if entry.model_id != model_id}

    def list_models(self) -> Sequence[str]:
        """Give the ids of the models one of whose versions failed lately."""
        now = time.monotonic()
        return sorted({entry.model_id for entry in self._entries.values() if entry.until > now})
