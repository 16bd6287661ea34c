"""What a server is known to serve: its base models, how it is spoken to, and the adapters that it was given."""

import asyncio
import secrets
from collections.abc import Sequence
from pathlib import Path

from server.domain.errors import Unavailable
from server.inference.openai.connection import Connection, ModelGone
from server.inference.openai.dialects import Dialect, recognise
from server.inference.openai.messages import Card


class Served:
    """Asked for at first use, and again after the server was lost. `instance` changes whenever it was: it may be another one."""

    def __init__(self, connection: Connection, dialect: Dialect | None) -> None:
        self._connection, self._set_dialect = connection, dialect
        self._cards: Sequence[Card] = ()
        self._adapters: dict[str, str] = {}  # names, and the models that they belong to
        self._loads: dict[str, asyncio.Lock] = {}
        self.instance = secrets.token_hex(8)

    @property
    def dialect(self) -> Dialect:
        """How the server is spoken to."""
        return self._set_dialect or recognise(self._cards)

    async def refresh(self) -> Sequence[Card]:
        """Ask what is served now. Raises Unavailable."""
        try:
            self._cards = await self._connection.list_models()
        except Unavailable:
            self.lose()
            raise
        return self._cards

    def lose(self) -> None:
        """Forget what was known of a server that is gone."""
        if self._cards:
            self.instance = secrets.token_hex(8)
        self._cards = ()
        self._adapters.clear()

    async def find(self, base_model: str) -> Card:
        """Give the served model that a base model is, by its name or by where its files lie. Raises ModelGone."""
        card = _find(base_model, self._cards) or _find(base_model, await self.refresh())
        if card is None:
            names = ", ".join(card.id for card in self._cards if card.parent is None) or "none"
            raise ModelGone(f"The server for {base_model} does not serve it. It serves: {names}.")
        return card

    async def give_adapter(self, model_id: str, name: str, directory: Path) -> None:
        """Let the server load an adapter that it was not given yet. Raises FailedPrecondition where it cannot."""
        if name in self._adapters:
            return
        async with self._loads.setdefault(name, asyncio.Lock()):
            if name not in self._adapters:
                await self._connection.load_adapter(name, directory)
                self._adapters[name] = model_id
        self._loads.pop(name, None)

    async def take_adapter(self, name: str) -> None:
        """Let the server forget an adapter. Requests that run with it end undisturbed."""
        if self._adapters.pop(name, None) is not None:
            await self._connection.unload_adapter(name)

    async def take_adapters(self, model_id: str) -> None:
        """Let the server forget all adapters of a model."""
        for name in [name for name, owner in self._adapters.items() if owner == model_id]:
            await self.take_adapter(name)


def _find(base_model: str, cards: Sequence[Card]) -> Card | None:
    return next((card for card in cards if card.parent is None and base_model in (card.id, card.root)), None)
