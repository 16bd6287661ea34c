"""Which request ids were used, so that a repeated creation answers with its first result."""

import hashlib

from sqlalchemy import func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.tables import requests
from server.services.ports import IssuedRequest


class PostgresRequests:
    """The Requests of one organization, on an open transaction."""

    def __init__(self, connection: AsyncConnection, organization: str) -> None:
        self._connection = connection
        self._organization = organization

    async def find(self, method: str, request_id: str) -> IssuedRequest | None:
        """Read what this id was used for; holds a lock on it until the transaction ends, so that two at once cannot both find nothing."""
        await self._connection.execute(select(func.pg_advisory_xact_lock(_lock_key(self._organization, method, request_id))))
        # A statement of its own: it must see what the holder before us committed.
        conditions = (requests.c.organization == self._organization, requests.c.method == method, requests.c.request_id == request_id)
        query = select(requests.c.body_sha256, requests.c.resource_ids).where(*conditions)
        row = (await self._connection.execute(query)).one_or_none()
        return IssuedRequest(row.body_sha256, row.resource_ids) if row else None

    async def insert(self, method: str, request_id: str, issued: IssuedRequest) -> None:
        """Remember it."""
        row = {
            "organization": self._organization,
            "method": method,
            "request_id": request_id,
            "body_sha256": issued.body_sha256,
            "resource_ids": dict(issued.resource_ids),
            "create_time": func.clock_timestamp(),
        }
        await self._connection.execute(insert(requests).values(row))


def _lock_key(organization: str, method: str, request_id: str) -> int:
    """Hash to the 64 signed bits of an advisory lock; that two ids share one costs nothing but a wait."""
    text = "\0".join(("request", organization, method, request_id))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], signed=True)
