"""Versions over REST and gRPC: encoded with their lineage, downloaded through Envoy byte by byte, whatever the path is spelt like."""

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.api.httpbody_pb2 import HttpBody
from grpc import aio
from modeltraining.v1 import model_service_pb2 as pb
from modeltraining.v1 import model_service_pb2_grpc

from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.diskfiles import hash_file
from server.domain.jobs import JobState
from server.storage.artefacts import ArtefactStore
from tests.api.conftest import Api
from tests.db.samples import RESULT, add_job, add_model, claim, read_model

WEIGHTS = b"0123456789abcdef" * (5 << 16)  # 5 MiB, more than a connection's buffers
ODD = "a folder/naïve 100% file+1.json"


@dataclass(frozen=True)
class Made:
    """A model with one version, and its files."""

    model_id: str
    directory: Path

    @property
    def path(self) -> str:
        """The version's REST path."""
        return f"/models/{self.model_id}/versions/1"


@pytest.fixture
async def made(api: Api, database: PostgresDatabase, tmp_path: Path) -> Made:
    def fill(directory: Path) -> Mapping[str, str]:
        (directory / "weights.safetensors").write_bytes(WEIGHTS)
        (directory / ODD).parent.mkdir()
        (directory / ODD).write_text('{"odd": true}')
        (directory / "README.md").write_text("# Card")
        (directory / "empty.txt").touch()
        return {}

    queue, model = PostgresJobQueue(database), await add_model(database)
    await add_job(database, model)
    lease = (await claim(queue)).lease
    path = f"default/models/{model.model_id}/{lease.job_id}-1"
    artefact = ArtefactStore(tmp_path / "storage").write(path, fill)
    for state in (JobState.RUNNING, JobState.FINALIZING):
        await queue.change_state(lease, state, "")
    lineage = {"checkpoint_step": 7, "library_versions": {"torch": "2"}, "template_sha256": "ab" * 32}
    result = replace(RESULT, artifact_path=path, manifest_sha256=artefact.manifest_sha256, size_bytes=artefact.size_bytes, **lineage)  # type: ignore[arg-type]
    assert await queue.complete(lease, result)
    return Made(model.model_id, artefact.directory)


async def test_a_version_tells_all_that_it_came_from(rest: httpx.AsyncClient, made: Made) -> None:
    version = (await rest.get(made.path)).json()
    assert (version["version"], version["serving"], version["attempt"], version["checkpoint_step"]) == (1, True, 1, 7)
    assert (version["library_versions"], version["template_sha256"]) == ({"torch": "2"}, "ab" * 32)
    assert version["effective_config"]["lora"]["rank"] == 16
    assert version["effective_config"]["dataset_sha256"] == "a" * 64
    assert version["metrics"] == {"eval_loss": 1.5}
    assert version["exports"] == []
    listed = (await rest.get(f"/models/{made.model_id}/versions")).json()
    assert listed == {"versions": [version], "next_page_token": ""}


async def test_each_listed_file_is_downloaded_whole_with_its_type(rest: httpx.AsyncClient, made: Made) -> None:
    files = (await rest.get(f"{made.path}/files")).json()["files"]
    assert {file["path"]: file["sha256"] for file in files} == {
        str(path.relative_to(made.directory)): hash_file(path) for path in made.directory.rglob("*") if path.is_file()
    }
    types = {}
    for file in files:
        answer = await rest.get(f"{made.path}/files/{file['path']}")
        assert answer.content == (made.directory / file["path"]).read_bytes(), file["path"]
        assert len(answer.content) == file["size_bytes"]
        types[Path(file["path"]).suffix] = answer.headers["content-type"]
    assert types == {
        ".safetensors": "application/octet-stream",
        ".json": "application/json",
        ".md": "text/markdown; charset=utf-8",
        ".txt": "text/plain; charset=utf-8",
    }


@pytest.mark.parametrize("spelt", ["a%20folder/na%C3%AFve%20100%25%20file%2B1.json", "%61%20folder/na%c3%afve%20100%25%20file+1.json"])
async def test_a_percent_encoded_path_is_the_path_that_it_stands_for(rest: httpx.AsyncClient, made: Made, spelt: str) -> None:
    assert (await rest.get(httpx.URL(f"{rest.base_url}{made.path.lstrip('/')}/files/{spelt}"))).json() == {"odd": True}


@pytest.mark.parametrize(
    "spelt",
    [
        "../../../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/x",
        "a%20folder%2Fx",
        "x%00",
        "nothing",
        "/etc/passwd",
        "%5c..%5cx",
    ],
)
async def test_a_path_out_of_the_version_leads_nowhere(rest: httpx.AsyncClient, made: Made, spelt: str) -> None:
    target = httpx.URL(f"{rest.base_url}{made.path.lstrip('/')}/files/").copy_with(
        raw_path=httpx.URL(f"{rest.base_url}{made.path.lstrip('/')}/files/").raw_path + spelt.encode()
    )
    answer = await rest.get(target)
    assert answer.status_code in (400, 404), answer.text
    assert set(answer.json()) == {"code", "message", "details"}
    assert "root:" not in answer.text


async def test_the_archive_holds_the_same_files(rest: httpx.AsyncClient, made: Made) -> None:
    answer = await rest.get(f"{made.path}/archive")
    assert answer.headers["content-type"] == "application/x-tar"
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        members = {entry.name: archive.extractfile(entry) for entry in archive}
        weights = members[f"{made.model_id}-1/weights.safetensors"]
        assert weights is not None
        assert weights.read() == WEIGHTS
        assert f"{made.model_id}-1/{ODD}" in members
    assert (await rest.get(f"{made.path}/archive")).content == answer.content


async def test_a_damaged_file_is_named_instead_of_sent(rest: httpx.AsyncClient, made: Made) -> None:
    (made.directory / "weights.safetensors").write_bytes(WEIGHTS[:-1] + b"!")
    for path in ("files/weights.safetensors", "archive"):
        answer = await rest.get(f"{made.path}/{path}")
        assert answer.status_code == 400
        assert "weights.safetensors is not the one that was written" in answer.json()["message"]
        assert answer.json()["details"][0]["reason"] == "ARTIFACT_INVALID"
    assert (await rest.get(f"{made.path}/files/README.md")).text == "# Card"


async def test_a_reader_that_stops_holds_the_server_up_and_leaves_nothing_open(api: Api, made: Made) -> None:
    stub = model_service_pb2_grpc.ModelServiceStub(api.channel)
    call = stub.DownloadModelFile(pb.DownloadModelFileRequest(model_id=made.model_id, version=1, path="weights.safetensors"))
    first = await call.read()
    assert isinstance(first, HttpBody)
    assert len(first.data) == 1 << 20
    call.cancel()
    whole = stub.DownloadModelFile(pb.DownloadModelFileRequest(model_id=made.model_id, version=1, path="weights.safetensors"))
    assert b"".join([message.data async for message in whole]) == WEIGHTS


async def test_promoting_deleting_and_exporting_answer_with_what_the_contract_says(
    rest: httpx.AsyncClient, made: Made, database: PostgresDatabase
) -> None:
    promoted = (await rest.post(f"{made.path}/promote", json={})).json()
    assert (promoted["model_id"], promoted["serving_version"]) == (made.model_id, 1)
    exported = (await rest.post(f"{made.path}/export", json={"format": "EXPORT_FORMAT_MERGED"})).json()["training_job"]
    assert (exported["kind"], exported["state"]) == ("KIND_EXPORT", "STATE_QUEUED")
    assert exported["effective_config"]["export"] == {"version": 1, "format": "EXPORT_FORMAT_MERGED"}
    refused = (await rest.delete(made.path)).json()
    assert [detail["reason"] for detail in refused["details"] if "reason" in detail] == ["VERSION_SERVING"]
    assert (await read_model(database, made.model_id)).version_count == 1
    unknown = await rest.get(f"{made.path}/files", params={"format": "EXPORT_FORMAT_MERGED"})
    assert (unknown.status_code, json.loads(unknown.text)["details"][0]["reason"]) == (404, "EXPORT_NOT_FOUND")


async def test_a_format_that_the_contract_does_not_name_is_refused(api: Api, made: Made) -> None:
    stub = model_service_pb2_grpc.ModelServiceStub(api.channel)
    wanted: dict[str, Any] = {"model_id": made.model_id, "version": 1, "format": 9}
    for call in (
        stub.ListModelFiles(pb.ListModelFilesRequest(**wanted)),
        stub.DownloadModelFile(pb.DownloadModelFileRequest(**wanted, path="README.md")).read(),
        stub.DownloadModelArchive(pb.DownloadModelArchiveRequest(**wanted)).read(),
    ):
        with pytest.raises(aio.AioRpcError, match="format: has no value 9"):
            await call
