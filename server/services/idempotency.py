"""Repeated creations: the same request_id with the same body answers with the first result, with another body it is refused."""

import hashlib
from collections.abc import Mapping

from server.domain.errors import AlreadyExists
from server.services.ports import IssuedRequest, Transaction


def hash_body(request: object) -> str:
    """Hash a request by the values of its fields (dataclasses of plain values: their repr names each)."""
    return hashlib.sha256(repr(request).encode("utf-8", "surrogatepass")).hexdigest()


async def find_issued(transaction: Transaction, method: str, request_id: str, body_sha256: str) -> Mapping[str, str] | None:
    """Give the ids that this request made the first time, or None. Raises AlreadyExists when the body differs."""
    if not request_id:
        return None
    issued = await transaction.requests.find(method, request_id)
    if issued is None:
        return None
    if issued.body_sha256 != body_sha256:
        raise AlreadyExists(
            "This request_id was used with another body. Take a new one, or repeat the first request as it was.",
            metadata={"request_id": request_id},
        )
    return issued.resource_ids


async def remember(transaction: Transaction, method: str, request_id: str, body_sha256: str, resource_ids: Mapping[str, str]) -> None:
    """Keep what a request made, if it carried a request_id."""
    if request_id:
        await transaction.requests.insert(method, request_id, IssuedRequest(body_sha256, dict(resource_ids)))
