"""DATABASE_URL is read in its usual forms, and refused without telling the password."""

import pytest

from server.db.address import parse_database_url


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_the_usual_schemes_are_read(scheme: str) -> None:
    url = parse_database_url(f"{scheme}://ann:p%40ss@db.example.org:5433/training")
    assert (url.drivername, url.username, url.password) == ("postgresql+psycopg", "ann", "p@ss")
    assert (url.host, url.port, url.database) == ("db.example.org", 5433, "training")


def test_a_socket_directory_is_read() -> None:
    url = parse_database_url("postgresql://postgres:@/training?host=/run/data")
    assert (url.host, url.database, dict(url.query)) == (None, "training", {"host": "/run/data"})


@pytest.mark.parametrize(
    "wrong", ["", "secret", "mysql://ann:secret@host/name", "postgresql://ann:secret@host", "postgresql://ann:secret@host:none/name"]
)
def test_anything_else_is_refused_without_the_password(wrong: str) -> None:
    with pytest.raises(ValueError, match="DATABASE_URL") as caught:
        parse_database_url(wrong)
    assert "secret" not in str(caught.value)
