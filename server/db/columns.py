"""What tables are made of: the one MetaData, and columns of the kinds that are stored here, NOT NULL unless said otherwise."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import BigInteger, Column, DateTime, Integer, MetaData, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import UserDefinedType

metadata = MetaData()

_ID = Text(collation="C")
_TIME = DateTime(timezone=True)


class HalfVector(UserDefinedType[str]):
    """pgvector's halfvec: float16 numbers, here without a fixed dimension. Values travel as text: `[0.5,-0.25]`."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        """Name the type in SQL."""
        return "halfvec"

    def bind_processor(self, dialect: object) -> Callable[[Any], Any] | None:
        """Send texts as they are."""
        return None


class SparseVector(UserDefinedType[str]):
    """pgvector's sparsevec: float32 numbers by their places. Values travel as text: `{1:0.5,7:-0.25}/10`."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        """Name the type in SQL."""
        return "sparsevec"

    def bind_processor(self, dialect: object) -> Callable[[Any], Any] | None:
        """Send texts as they are."""
        return None


def identifier(name: str, *, nullable: bool = False) -> Column[str]:
    """Make a column of ids, which sort by bytes ("C"), as they were made to."""
    return Column(name, _ID, nullable=nullable)


def string(name: str) -> Column[str]:
    """Make a column of text."""
    return Column(name, Text, nullable=False)


def number(name: str, *, nullable: bool = False) -> Column[int]:
    """Make a column of numbers that fit 32 bits."""
    return Column(name, Integer, nullable=nullable)


def size(name: str) -> Column[int]:
    """Make a column of numbers that may outgrow 32 bits: bytes, counts of records."""
    return Column(name, BigInteger, nullable=False)


def json(name: str, *, nullable: bool = False) -> Column[Any]:
    """Make a column of JSON; None is SQL NULL."""
    return Column(name, JSONB(none_as_null=True), nullable=nullable)


def time(name: str, *, nullable: bool = False) -> Column[Any]:
    """Make a column of times with their zone."""
    return Column(name, _TIME, nullable=nullable)
