"""Where a job's files lie under MODEL_STORAGE_PATH, and how they go away again: at the job's end, and orphans by a sweep.

Knows directory names, not what is in checkpoints or artefacts.
"""

import logging
import os
import shutil
import time
from collections.abc import AsyncIterator, Collection, Iterator
from pathlib import Path

from server.domain.orders import DocumentText, ExportOrder, FineTuneOrder, IndexOrder, Order
from server.domain.specs import ExportSpec, IndexSpec
from server.services.codec import Codec
from server.services.ports import Claim

_logger = logging.getLogger(__name__)
_DOCUMENT_TEXT = Codec[DocumentText](DocumentText)

_PARTIAL = ".partial"  # what is written aside, before it is renamed
# Longer than any step between a file's creation and its row; a sweep must never race a writer.
_ORPHAN_AGE_SECONDS = 24 * 3600.0
_LOG_AGE_SECONDS = 7 * 24 * 3600.0  # logs of failed jobs, for whoever runs the service


class JobFiles:
    """The files of jobs below one storage root. Methods that touch much are blocking: call them in a thread."""

    def __init__(self, storage_path: Path) -> None:
        self._root = storage_path

    def job_path(self, claim: Claim) -> str:
        """Name the job's own directory: checkpoints, documents, logs. Relative, as all paths that leave this class."""
        return f"{claim.lease.organization}/jobs/{claim.job.job_id}"

    def artifact_path(self, claim: Claim) -> str:
        """Name the directory of the result. It carries the epoch, so that a worker that lost its lease overwrites nothing."""
        return f"{claim.lease.organization}/models/{claim.job.model_id}/{claim.job.job_id}-{claim.lease.epoch}"

    def log_path(self, claim: Claim) -> Path:
        """Name the log of this attempt, absolute."""
        return self._root / self.job_path(claim) / f"attempt-{claim.job.attempt}.log"

    async def write_order(self, claim: Claim, documents: AsyncIterator[DocumentText]) -> Order:
        """Make the child's order; for an index job this writes its documents file first."""
        job = claim.job
        if isinstance(job.spec, IndexSpec):
            path = f"{self.job_path(claim)}/documents-{claim.lease.epoch}.jsonl"
            count = await self._write_documents(path, documents)
            return IndexOrder(job.job_id, claim.lease.epoch, job.spec, path, count)
        if isinstance(job.spec, ExportSpec):
            return self._order_export(claim, job.spec)
        if claim.dataset is None:
            raise ValueError(f"job {job.job_id} was claimed without its dataset")
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

    async def _write_documents(self, path: str, documents: AsyncIterator[DocumentText]) -> int:
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        count = 0
        with target.open("wb") as file:
            async for document in documents:
                file.write(_DOCUMENT_TEXT.encode(document) + b"\n")
                count += 1
        return count

    def delete(self, path: str) -> None:
        """Remove a file or directory and what was being written beside it. Missing is fine, outside the root is not."""
        target = (self._root / path).resolve()
        if self._root.resolve() not in target.parents:
            raise ValueError(f"{path!r} does not lie in the storage")
        for found in (target, target.with_name(target.name + _PARTIAL)):
            _remove(found)

    def delete_results(self, claim: Claim, keep: str | None) -> None:
        """Remove what this attempt and earlier ones wrote as the job's result, but for `keep`. A later attempt's is not ours to touch."""
        start = f"{claim.job.job_id}-"
        for found in (self._root / self.artifact_path(claim)).parent.glob(f"{start}*"):
            epoch = found.name.removeprefix(start).removesuffix(_PARTIAL)
            if epoch.isdecimal() and int(epoch) <= claim.lease.epoch and (keep is None or found != self._root / keep):
                _remove(found)

    def delete_job(self, claim: Claim, *, keep_logs: bool) -> None:
        """Remove the job's own directory: all of it, or all but its logs."""
        directory = self._root / self.job_path(claim)
        for found in _list(directory):
            if not (keep_logs and _is_log(found)):
                _remove(found)
        if not keep_logs:
            _remove(directory)

    def sweep(self, live: Collection[str], now: float | None = None) -> list[str]:
        """Remove what crashes left behind and give their paths: old files of jobs, and old results of models in `live`, that no row names.

        A model or dataset of which `live` knows nothing is left alone: it may belong to another database that uses this storage.
        """
        moment = time.time() if now is None else now
        known = {str(parent) for path in live for parent in Path(path).parents}
        removed = []
        for candidate in self._list_candidates(known):
            relative = str(candidate.relative_to(self._root))
            if relative in live or relative in known or any(str(parent) in live for parent in Path(relative).parents):
                continue
            if _newest_change(candidate) < moment - (_LOG_AGE_SECONDS if _holds_only_logs(candidate) else _ORPHAN_AGE_SECONDS):
                _remove(candidate)
                removed.append(relative)
        return removed

    def _list_candidates(self, known: Collection[str]) -> Iterator[Path]:
        for organization in _list(self._root):
            for job in _list(organization / "jobs"):
                # The directory of a live job is not to be removed, but something in it may be.
                yield from _list(job) if str(job.relative_to(self._root)) in known else (job,)
            for model in _list(organization / "models"):
                if str(model.relative_to(self._root)) in known:
                    yield from _list(model)
            for room in ("models", "datasets"):
                yield from (found for found in _list(organization / room) if found.name.endswith(_PARTIAL))


def _list(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _is_log(path: Path) -> bool:
    return path.name.endswith((".log", ".log.old"))


def _holds_only_logs(path: Path) -> bool:
    return _is_log(path) or (path.is_dir() and all(_is_log(found) for found in path.iterdir()))


def _newest_change(path: Path) -> float:
    newest = path.lstat().st_mtime
    for directory, _, names in os.walk(path):
        newest = max(newest, *(os.lstat(os.path.join(directory, name)).st_mtime for name in [".", *names]))
    return newest


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        # A file that cannot go now goes with the next sweep; the job's end does not depend on it.
        _logger.warning("cannot remove %s: %s", path, error)
