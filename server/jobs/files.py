"""Where a job's files lie under MODEL_STORAGE_PATH, and how they go away again: at the job's end, and orphans by a sweep.

Knows directory names, not what is in checkpoints or artefacts.
"""

import logging
import time
from collections.abc import AsyncIterator, Collection, Iterator
from pathlib import Path, PurePosixPath

from server.domain.generation import ModelReference
from server.domain.orders import BatchOrder, DatasetFile, ExportOrder, FineTuneOrder, IndexOrder, Order, StagedDocument
from server.domain.specs import BatchSpec, ExportSpec, FineTuneSpec, IndexSpec
from server.jobs.trees import DiskTree, ObjectTree, Tree, remove_objects
from server.services.codec import Codec
from server.services.job_queue import Claim
from server.storage.objects import RemoteObjects, StorageUnavailable

_logger = logging.getLogger(__name__)
_STAGED_DOCUMENT = Codec[StagedDocument](StagedDocument)

_PARTIAL = ".partial"  # what is written aside, before it is renamed
# Longer than any step between a file's creation and its row; a sweep must never race a writer.
_ORPHAN_AGE_SECONDS = 24 * 3600.0
_LOG_AGE_SECONDS = 7 * 24 * 3600.0  # logs of failed jobs, for whoever runs the service


class JobFiles:
    """The files of jobs below one storage root. Methods that touch much are blocking: call them in a thread.

    With `remote` checkpoints and results lie there, with copies here; documents and logs of running jobs lie here alone.
    """

    def __init__(self, storage_path: Path, remote: RemoteObjects | None = None) -> None:
        self._root = storage_path
        self._disk = DiskTree(storage_path)
        self._remote = remote

    def job_path(self, claim: Claim) -> str:
        """Name the job's own directory: checkpoints, documents, logs. Relative, as all paths that leave this class."""
        return f"{claim.lease.organization}/jobs/{claim.job.job_id}"

    def artifact_path(self, claim: Claim) -> str:
        """Name the directory of the result. It carries the epoch, so that a worker that lost its lease overwrites nothing.

        What is no version belongs to no model, and lies with its job.
        """
        of_job = isinstance(claim.job.spec, BatchSpec)
        room = self.job_path(claim) if of_job else f"{claim.lease.organization}/models/{claim.job.model_id}"
        return f"{room}/{claim.job.job_id}-{claim.lease.epoch}"

    def log_path(self, claim: Claim) -> Path:
        """Name the log of this attempt, absolute."""
        return self._root / self.job_path(claim) / f"attempt-{claim.job.attempt}.log"

    async def write_order(self, claim: Claim, documents: AsyncIterator[StagedDocument]) -> Order:
        """Make the child's order; for an index job this writes its documents file first."""
        job = claim.job
        if isinstance(job.spec, IndexSpec):
            path = f"{self.job_path(claim)}/documents-{claim.lease.epoch}.jsonl"
            count = await self._write_documents(path, documents)
            return IndexOrder(job.job_id, claim.lease.epoch, job.spec, path, count, claim.calibrated_fingerprint)
        if isinstance(job.spec, ExportSpec):
            return self._order_export(claim, job.spec)
        if claim.dataset is None:
            raise ValueError(f"job {job.job_id} was claimed without its dataset")
        if isinstance(job.spec, BatchSpec):
            return self._order_batch(claim, job.spec, claim.dataset)
        if isinstance(job.spec, FineTuneSpec) and job.spec.warm_start_from is not None and claim.version is None:
            # Or it would quietly start from the base model.
            raise ValueError(f"job {job.job_id} was claimed without the version that it starts from")
        return FineTuneOrder(
            job_id=job.job_id,
            lease_epoch=claim.lease.epoch,
            spec=job.spec,
            dataset=claim.dataset,
            job_path=self.job_path(claim),
            artifact_path=self.artifact_path(claim),
            eval_dataset=claim.eval_dataset,
            checkpoint_path=claim.checkpoint.path if claim.checkpoint else None,
            best_checkpoint_path=claim.best_checkpoint.path if claim.best_checkpoint else None,
            warm_start_path=claim.version.artifact_path if claim.version else None,
            warm_start_manifest_sha256=claim.version.manifest_sha256 if claim.version else None,
        )

    def _order_export(self, claim: Claim, spec: ExportSpec) -> ExportOrder:
        if claim.version is None:
            raise ValueError(f"job {claim.job.job_id} was claimed without its version")
        return ExportOrder(
            job_id=claim.job.job_id,
            lease_epoch=claim.lease.epoch,
            spec=spec,
            version_path=claim.version.artifact_path,
            version_manifest_sha256=claim.version.manifest_sha256,
            artifact_path=self.artifact_path(claim),
        )

    def _order_batch(self, claim: Claim, spec: BatchSpec, dataset: DatasetFile) -> BatchOrder:
        version = claim.version
        if spec.version is not None and version is None:
            # Or the base model would quietly answer.
            raise ValueError(f"job {claim.job.job_id} was claimed without its version")
        adapter = (version.version, version.artifact_path, version.manifest_sha256) if version else (None, None, None)
        return BatchOrder(
            job_id=claim.job.job_id,
            lease_epoch=claim.lease.epoch,
            spec=spec,
            model=ModelReference(claim.job.model_id, spec.base_model, *adapter),
            dataset=dataset,
            job_path=self.job_path(claim),
            artifact_path=self.artifact_path(claim),
            part_paths=tuple(part.path for part in claim.checkpoints),
        )

    async def _write_documents(self, path: str, documents: AsyncIterator[StagedDocument]) -> int:
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        count = 0
        with target.open("wb") as file:
            async for document in documents:
                file.write(_STAGED_DOCUMENT.encode(document) + b"\n")
                count += 1
        return count

    def delete(self, path: str) -> None:
        """Remove a file or directory and what was being written beside it. Missing is fine, outside the root is not."""
        target = (self._root / path).resolve()
        if self._root.resolve() not in target.parents:
            raise ValueError(f"{path!r} does not lie in the storage")
        if self._remote is not None:
            remove_objects(self._remote, path)
        for found in (path, path + _PARTIAL):
            self._disk.remove(found)

    def delete_results(self, claim: Claim, keep: str | None) -> None:
        """Remove what this attempt and earlier ones wrote as the job's result, but for `keep`. A later attempt's is not ours to touch."""
        room, start = str(PurePosixPath(self.artifact_path(claim)).parent), f"{claim.job.job_id}-"
        for tree in self._trees(room):
            for name in tree.list(room):
                epoch = name.removeprefix(start).removesuffix(_PARTIAL)
                written = name.startswith(start) and epoch.isdecimal() and int(epoch) <= claim.lease.epoch
                if written and f"{room}/{name}" != keep:
                    tree.remove(f"{room}/{name}")

    def delete_job(self, claim: Claim, *, for_retry: bool, keep: str | None = None) -> None:
        """Remove the job's own directory and the checkpoints that it began from; for a retry its logs and checkpoints stay.

        A result that lies in the directory stays, too: `keep`.
        """
        inherited = [] if for_retry else [each.path for each in claim.checkpoints]
        job = self.job_path(claim)
        for tree in self._trees(job):
            for name in tree.list(job):
                if f"{job}/{name}" != keep and not (for_retry and (_is_log(name) or _is_checkpoint(name))):
                    tree.remove(f"{job}/{name}")
        for path in inherited:
            self.delete(path)
        if not for_retry and not self._disk.list(job):
            self._disk.remove(job)

    def sweep(self, live: Collection[str], now: float | None = None) -> list[str]:
        """Remove what crashes left behind and give their paths: old files of jobs, and old results of models in `live`, that no row names.

        A model or dataset of which `live` knows nothing is left alone: it may belong to another database that uses this storage.
        """
        moment = time.time() if now is None else now
        known = {str(parent) for path in live for parent in PurePosixPath(path).parents}
        removed = []
        for tree in self._trees():
            for path in _list_candidates(tree, known):
                if path in live or path in known or any(str(parent) in live for parent in PurePosixPath(path).parents):
                    continue
                if tree.newest_change(path) < moment - (_LOG_AGE_SECONDS if _holds_only_logs(tree, path) else _ORPHAN_AGE_SECONDS):
                    tree.remove(path)
                    removed.append(path)
        return removed

    def _trees(self, prefix: str = "") -> Iterator[Tree]:
        yield self._disk
        if self._remote is not None:
            try:
                yield ObjectTree(self._remote, prefix)
            except StorageUnavailable as error:
                _logger.warning("nothing is removed from the remote storage now: %s", error)


def _list_candidates(tree: Tree, known: Collection[str]) -> Iterator[str]:
    for organization in tree.list(""):
        if organization.endswith(_PARTIAL):
            yield organization
        for job in _list_paths(tree, f"{organization}/jobs"):
            # The directory of a live job is not to be removed, but something in it may be.
            yield from _list_paths(tree, job) if job in known else (job,)
        for model in _list_paths(tree, f"{organization}/models"):
            if model in known:
                yield from _list_paths(tree, model)
        for model in _list_paths(tree, f"{organization}/documents"):
            if model in known:
                yield from _list_paths(tree, model)
        for room in ("models", "datasets"):
            yield from (path for path in _list_paths(tree, f"{organization}/{room}") if path.endswith(_PARTIAL))


def _list_paths(tree: Tree, path: str) -> list[str]:
    return [f"{path}/{name}" for name in tree.list(path)]


def _is_log(path: str) -> bool:
    return path.endswith((".log", ".log.old"))


def _is_checkpoint(path: str) -> bool:
    return path.startswith("checkpoint-") and not path.endswith(_PARTIAL)


def _holds_only_logs(tree: Tree, path: str) -> bool:
    names = tree.list(path)
    return _is_log(path) or (bool(names) and all(_is_log(name) for name in names))
