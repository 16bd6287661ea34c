"""A whole fine-tuning with datasets, checkpoints and result in a bucket: killed on one machine, ended on another, the same to the bit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from server.diskfiles import hash_file
from server.domain.events import CheckpointSaved, ChildEvent, ResultReady
from server.storage.mirror import Mirror
from server.storage.objects import RemoteObjects
from server.storage.remote import RemoteArtefactStore
from tests.remote_storage import make_bucket, run_s3
from tests.training.building import Workplace


class Killed(BaseException):
    """The process ends here, without a chance to clear up."""


@dataclass(slots=True)
class Machine(Workplace):
    """A workplace whose storage is a bucket, with copies of its own."""

    name: str
    objects: RemoteObjects

    @property
    def store(self) -> RemoteArtefactStore:
        """The artefacts in the bucket, as this machine sees them."""
        (self.root / self.name).mkdir(exist_ok=True)
        return RemoteArtefactStore(Mirror(self.root / self.name, self.objects, 1 << 30))


@pytest.fixture(scope="module")
def objects() -> Iterator[RemoteObjects]:
    with run_s3():
        yield RemoteObjects(make_bucket())


def test_a_job_killed_on_one_machine_ends_on_another_with_the_same_weights(tmp_path: Path, objects: RemoteObjects) -> None:
    local = Workplace.build(tmp_path)
    (expected,) = [event for event in local.train() if isinstance(event, ResultReady)]
    weights = load_file(local.store.open(expected.artifact_path).directory / "adapter_model.safetensors")
    dataset = local.order.dataset.path
    objects.upload(local.store.locate(dataset), dataset)

    saved: list[CheckpointSaved] = []

    def kill(event: ChildEvent) -> None:
        if isinstance(event, CheckpointSaved):
            saved.append(event)
            if event.step == 4:
                raise Killed

    here = Machine(local.root, local.order, "here", objects)
    with pytest.raises(Killed):
        here.train(emit=kill)
    elsewhere = Machine(local.root, local.order, "elsewhere", objects)
    elsewhere.order = replace(elsewhere.order, lease_epoch=2, checkpoint_path=saved[-1].path, artifact_path="default/models/mdl_1/job_1-2")
    (result,) = [event for event in elsewhere.train() if isinstance(event, ResultReady)]

    opened = Machine(local.root, local.order, "third", objects).store.open(result.artifact_path, result.manifest_sha256)
    again = load_file(opened.directory / "adapter_model.safetensors")
    assert again.keys() == weights.keys()
    assert all((again[name] == weights[name]).all() for name in weights)
    assert (opened.directory / "README.md").read_text() == (local.store.open(expected.artifact_path).directory / "README.md").read_text()
    # The dataset came by way of the bucket, and none of it lay at hand before.
    assert hash_file(tmp_path / "elsewhere" / dataset) == local.order.dataset.sha256
    keys = {entry.key.rpartition("/")[0] for entry in objects.list()}
    assert {"default/models/mdl_1/job_1-2", saved[-1].path, str(Path(dataset).parent)} <= keys
    assert "default/models/mdl_1/job_1-1" not in keys
