"""What several servicers need to decode: pages, and telling of all bad fields at once."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Literal, Protocol, TypeVar

from server.domain.errors import InvalidInput, ServiceError
from server.services.requests import AddDocuments, CreateBatchGeneration, CreateFineTunedModel, CreateRagModel, PageRequest
from server.services.validation import Violations

Creation = TypeVar("Creation", CreateFineTunedModel, CreateRagModel, AddDocuments, CreateBatchGeneration)
Created = TypeVar("Created")


class PagedRequest(Protocol):
    """A request for one page of a list."""

    page_size: int
    page_token: str

    def HasField(self, field_name: Literal["page_size"]) -> bool:  # noqa: N802  # protobuf's name
        """Tell whether the field was set."""


def page_from_proto(request: PagedRequest) -> PageRequest:
    """Read which page is wanted."""
    return PageRequest(request.page_size if request.HasField("page_size") else None, request.page_token)


async def refuse_all_bad(found: Violations, check: Callable[[], Awaitable[object]]) -> None:
    """Raise InvalidInput if decoding found bad fields, with what `check` (a run that creates nothing) finds besides; else do nothing."""
    if not found.found:
        return
    with suppress(ServiceError):  # other failures can wait until the fields are right
        try:
            await check()
        except InvalidInput as error:
            add_violations(found, error)
    found.raise_if_any()


async def create_or_refuse(wanted: Creation, found: Violations, create: Callable[[Creation], Awaitable[Created]]) -> Created:
    """Create what is wanted. Raises InvalidInput with all bad fields at once: those of decoding, and those that a trial run finds."""
    trial = replace(wanted, validate_only=True, request_id="")
    await refuse_all_bad(found, lambda: create(trial))
    return await create(wanted)


def add_violations(found: Violations, error: InvalidInput) -> None:
    """Add the bad fields of an error that are not named yet."""
    named = {violation.field for violation in found.found}
    found.found += [violation for violation in error.data.violations if violation.field not in named]
