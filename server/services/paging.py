"""Page tokens: opaque, bound to the filters that they were made for, and naming the last row seen (keyset, never an offset)."""

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TypeVar

from server.domain.errors import InvalidInput
from server.services.ports import Page
from server.services.requests import Listed, PageRequest
from server.services.validation import Violations

T = TypeVar("T")

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1_000
_MAX_TOKEN_CHARACTERS = 512
_MAX_NUMBER_DIGITS = 9  # an INTEGER in every database


def open_page(request: PageRequest, filters: object) -> Page:
    """Read a page request. The page has room for one row more than asked: it tells whether another page follows. Raises InvalidInput."""
    found = Violations()
    found.number("page_size", request.page_size, 1, MAX_PAGE_SIZE)
    found.raise_if_any()
    before = _read_token(request.page_token, filters) if request.page_token else None
    return Page((request.page_size or DEFAULT_PAGE_SIZE) + 1, before)


def open_numbered_page(request: PageRequest, filters: object) -> tuple[Page, int | None]:
    """Read a page request of a list whose rows are told apart by a number; give the last one seen, too. Raises InvalidInput."""
    page = open_page(request, filters)
    if page.before_id is None:
        return page, None
    if not page.before_id.isdecimal() or len(page.before_id) > _MAX_NUMBER_DIGITS:
        raise _wrong_token()
    return page, int(page.before_id)


def close_page(items: Sequence[T], page: Page, filters: object, identify: Callable[[T], str]) -> Listed[T]:
    """Drop the extra row, and make the token of the next page where there was one."""
    if len(items) < page.size:
        return Listed(items, "")
    kept = items[: page.size - 1]
    content = json.dumps([identify(kept[-1]), _fingerprint(filters)]).encode()
    return Listed(kept, base64.urlsafe_b64encode(content).decode().rstrip("="))


def _read_token(token: str, filters: object) -> str:
    wrong = _wrong_token()
    try:
        if len(token) > _MAX_TOKEN_CHARACTERS:
            raise wrong
        before, fingerprint = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    except (binascii.Error, ValueError, TypeError, RecursionError):
        raise wrong from None
    if not isinstance(before, str):
        raise wrong
    if fingerprint != _fingerprint(filters):
        raise InvalidInput.field("page_token", "was made for other filters; leave it out to begin anew", "PAGE_TOKEN_INVALID")
    return before


def _wrong_token() -> InvalidInput:
    return InvalidInput.field("page_token", "is not a token that this list gave; leave it out to begin anew", "PAGE_TOKEN_INVALID")


def _fingerprint(filters: object) -> str:
    return hashlib.sha256(repr(filters).encode()).hexdigest()[:16]
