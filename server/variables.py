"""How the text of an environment variable becomes a value: a parser per kind, which raises ValueError saying what the variable must be."""

import importlib.util
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path

# Engines that have a name; all others are servers behind a URL.
ENGINES = ("embedded", "vllm")
# Schemes of remote storage, and the package that each needs.
REMOTE_STORAGE = {"s3": "s3fs", "gs": "gcsfs"}


def integer(low: int, high: int) -> Callable[[str], int]:
    """Make a parser of whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"must be a whole number, not {text!r}") from None
        if not low <= value <= high:
            raise ValueError(f"must be from {low} to {high}, not {value}")
        return value

    return parse


def number(above: float, high: float) -> Callable[[str], float]:
    """Make a parser of numbers above `above` and up to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"must be a number, not {text!r}") from None
        if not (math.isfinite(value) and above < value <= high):
            raise ValueError(f"must be above {above:g} and at most {high:g}, not {text!r}")
        return value

    return parse


def word(*allowed: str) -> Callable[[str], str]:
    """Make a parser of one of some words, which are in capitals however they were written."""

    def parse(text: str) -> str:
        if text.upper() not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}, not {text!r}")
        return text.upper()

    return parse


def parse_file(text: str) -> Path:
    """Read the path of a file, which need not exist yet."""
    return Path(text).expanduser().absolute()


def parse_directory(text: str) -> Path:
    """Read a directory, which need not exist yet."""
    path = parse_file(text)
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if not nearest.is_dir():
        raise ValueError(f"must name a directory, but {str(nearest)!r} is a file")
    return path


def parse_storage(text: str) -> Path | str:
    """Read a directory, or a URL of remote storage as it stands."""
    scheme, separator, place = text.partition("://")
    if not separator:
        return parse_directory(text)
    if scheme == "file":
        return parse_directory(place)
    if scheme not in REMOTE_STORAGE:
        raise ValueError(
            f"must be a directory or begin with {' or '.join(f'{known}://' for known in REMOTE_STORAGE)}, not with {scheme}://"
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]+(/[\w.=-]+)*/?", place) or ".." in place:
        raise ValueError(f"must name a bucket and perhaps a prefix, as {scheme}://bucket/prefix does, without credentials")
    if importlib.util.find_spec(REMOTE_STORAGE[scheme]) is None:
        raise ValueError(f"needs the package {REMOTE_STORAGE[scheme]}, which is not installed, for {scheme}://")
    return text.rstrip("/")


def parse_directories(text: str) -> tuple[Path, ...]:
    """Read directories between colons."""
    return tuple(parse_directory(part) for part in text.split(":") if part)


def parse_database_url(text: str) -> str:
    """Read the URL of a PostgreSQL."""
    if not text.startswith(("postgresql://", "postgres://", "postgresql+psycopg://")):
        raise ValueError("must begin with postgresql://")
    return text


def parse_import_roots(text: str) -> tuple[str, ...]:
    """Read directories and URLs between spaces or commas."""
    roots = _split(text)
    for root in roots:
        if not re.fullmatch(r"(file://)?/[^?#*]*|(s3|gs|hf)://[^/?#*]+(/[^?#*]*)?", root) or "/.." in root:
            raise ValueError(f"must name directories, s3://bucket/…, gs://bucket/… or hf://datasets/…, not {root!r}")
    return roots


def parse_names(text: str) -> tuple[str, ...]:
    """Read names between spaces or commas, each once."""
    return tuple(dict.fromkeys(_split(text)))


def parse_arguments(text: str) -> tuple[str, ...]:
    """Read arguments as a shell would."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"cannot be read as a shell would: {error}") from None


def parse_engine(text: str) -> str:
    """Read which engine: `embedded`, or the URL of a server."""
    if text.lower() in ENGINES:
        return text.lower()
    if not re.fullmatch(r"https?://[\w.-]+(:\d{1,5})?(/[\w./-]*)?|https?://\[[\da-fA-F:]+\](:\d{1,5})?(/[\w./-]*)?", text):
        raise ValueError(f"must be {', '.join(ENGINES)} or the URL of a server (http://host:port), without credentials, not {text!r}")
    return text.rstrip("/")


def parse_routes(text: str) -> tuple[tuple[str, str], ...]:
    """Read pairs `base_model=engine` between spaces or commas."""
    routes: dict[str, str] = {}
    for entry in _split(text):
        base_model, separator, engine = entry.partition("=")
        if not (base_model and separator and engine):
            raise ValueError(f"must have the form base_model=engine, not {entry!r}")
        if base_model in routes:
            raise ValueError(f"must name {base_model} once only")
        try:
            routes[base_model] = parse_engine(engine)
        except ValueError as error:
            raise ValueError(f"names an engine for {base_model} that {error}") from None
    return tuple(routes.items())


def _split(text: str) -> tuple[str, ...]:
    """Part a list at its spaces and commas, wherever those stand."""
    return tuple(part for part in re.split(r"[\s,]+", text) if part)
