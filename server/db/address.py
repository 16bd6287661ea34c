"""Reads DATABASE_URL."""

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

SCHEMES = frozenset({"postgresql", "postgres", "postgresql+psycopg"})


def parse_database_url(database_url: str) -> URL:
    """Read `postgresql://user:password@host:port/name`, also with `?host=/socket/directory`. Raises ValueError, which tells no password."""
    scheme, separator, rest = database_url.partition("://")
    if not separator or scheme not in SCHEMES:
        raise ValueError("DATABASE_URL must begin with postgresql:// (or postgres://)")
    try:
        url = make_url(f"postgresql+psycopg://{rest}")
    except (ArgumentError, ValueError):
        raise ValueError("DATABASE_URL is not of the form postgresql://user:password@host:port/name") from None
    if not url.database:
        raise ValueError("DATABASE_URL names no database")
    return url
