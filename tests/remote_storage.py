"""Object stores on this machine, S3 (moto's) and Google Cloud Storage (an emulator), for tests of whatever lies in remote storage."""

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from server.storage.objects import RemoteObjects

_numbers = itertools.count(1)


@contextmanager
def run_s3() -> Iterator[pytest.MonkeyPatch]:
    """Run a server and let the environment lead to it; gives the environment's patch, to change it further."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {
                "AWS_ENDPOINT_URL": f"http://{host}:{port}",
                "AWS_ACCESS_KEY_ID": "somebody",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }.items():
                patch.setenv(name, value)
            yield patch
    finally:
        server.stop()


@contextmanager
def run_gs() -> Iterator[str]:
    """Run a server of Google's JSON API and let the environment lead to it; gives the URL of a place in an empty bucket."""
    from gcp_storage_emulator.server import create_server

    name = f"models-{next(_numbers)}"
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=name)
    server.start()
    host, port = server._api._httpd.server_address
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
            yield f"gs://{name}/some/place"
    finally:
        server.stop()


def make_bucket() -> str:
    """Make an empty bucket and give the URL of a place in it."""
    name = f"models-{next(_numbers)}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    return f"s3://{name}/some/place"


def overwrite(objects: RemoteObjects, key: str, data: bytes) -> None:
    """Write an object as a fault would: behind the back of everybody."""
    objects._files.pipe_file(objects._locate(key), data)
