"""Resource identifiers: opaque, prefixed, sortable by creation time, and safe to stand in a path."""

import re
import secrets
import time

MODEL = "mdl"
JOB = "job"
DATASET = "ds"
DOCUMENT = "doc"
CHUNK = "chk"

# Crockford's base 32 in lower case: no i, l, o, u; sorts as the number does.
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_TIME_CHARACTERS = 10  # 50 bits of milliseconds since 1970, as in ULID
_RANDOM_CHARACTERS = 14  # 70 random bits
_PATTERN = re.compile(rf"[a-z]{{2,3}}_[{_ALPHABET}]{{{_TIME_CHARACTERS + _RANDOM_CHARACTERS}}}")


def new_id(prefix: str) -> str:
    """Make an id such as `job_01k9...`, greater than those made in earlier milliseconds."""
    number = (time.time_ns() // 1_000_000) << (5 * _RANDOM_CHARACTERS) | secrets.randbits(5 * _RANDOM_CHARACTERS)
    length = _TIME_CHARACTERS + _RANDOM_CHARACTERS
    return f"{prefix}_" + "".join(_ALPHABET[number >> 5 * (length - 1 - place) & 31] for place in range(length))


def is_id(text: str, prefix: str) -> bool:
    """Tell whether `text` has the form of an id of this kind (anything else cannot exist)."""
    return text.startswith(f"{prefix}_") and _PATTERN.fullmatch(text) is not None
