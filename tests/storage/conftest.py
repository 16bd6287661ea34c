"""A bucket for each test that asks for one."""

from collections.abc import Iterator

import pytest

from server.storage.objects import RemoteObjects
from tests.remote_storage import make_bucket, run_s3


@pytest.fixture(scope="module")
def s3() -> Iterator[pytest.MonkeyPatch]:
    """A running S3 server; the environment leads to it."""
    with run_s3() as environment:
        yield environment


@pytest.fixture
def objects(s3: pytest.MonkeyPatch) -> RemoteObjects:
    """An empty place in a bucket."""
    return RemoteObjects(make_bucket())
