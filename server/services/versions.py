"""Versions of fine-tuned models: listing, serving, deleting, exporting and downloading them."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from server.domain.errors import FailedPrecondition, InvalidInput, NotFound, Unavailable
from server.domain.ids import JOB, new_id
from server.domain.jobs import Job, JobKind, JobState
from server.domain.models import Model, ModelFile, ModelState, ModelVersion
from server.domain.specs import ExportFormat, ExportSpec
from server.domain.techniques import LoraTechnique, PrefixTuning, PromptTuning, PTuning, Technique, TechniqueFamily
from server.services.idempotency import find_issued, hash_body, remember
from server.services.model_ports import Engine
from server.services.paging import close_page, open_numbered_page
from server.services.ports import Artefacts, Database, Files, Transaction
from server.services.requests import ExportVersion, Listed, ListVersions
from server.services.validation import MAX_REQUEST_ID_CHARACTERS, Violations

METHOD = "ExportModelVersion"


@dataclass(frozen=True, slots=True)
class ShownVersion:
    """A version, and whether it answers."""

    version: ModelVersion
    serving: bool


@dataclass(frozen=True, slots=True)
class FilesOf:
    """Whose files are wanted: a version's own, or those of an export of it."""

    model_id: str
    version: int
    format: ExportFormat | None = None


class Versions:
    """Use cases of versions."""

    def __init__(self, database: Database, files: Files, artefacts: Artefacts, engine: Engine) -> None:
        self._database = database
        self._files = files
        self._artefacts = artefacts
        self._engine = engine

    async def list(self, organization: str, request: ListVersions) -> Listed[ShownVersion]:
        """List a model's versions, newest first. Raises NotFound."""
        page, before = open_numbered_page(request.page, request.model_id)
        async with self._database.transaction(organization) as transaction:
            model = await transaction.models.get(request.model_id)
            items = await transaction.models.list_versions(request.model_id, page.size, before)
        shown = [ShownVersion(version, version.version == model.serving_version) for version in items]
        return close_page(shown, page, request.model_id, lambda item: str(item.version.version))

    async def get(self, organization: str, model_id: str, version: int) -> ShownVersion:
        """Read a version. Raises NotFound."""
        async with self._database.transaction(organization) as transaction:
            model = await transaction.models.get(model_id)
            found = await transaction.models.get_version(model_id, version)
        return ShownVersion(found, found.version == model.serving_version)

    async def promote(self, organization: str, model_id: str, version: int) -> Model:
        """Let a version answer from the next request on; again is harmless. Raises NotFound, FailedPrecondition."""
        async with self._database.transaction(organization) as transaction:
            model = await _lock(transaction, model_id)
            found = await transaction.models.get_version(model_id, version)
            promoted = replace(model, serving_version=found.version, technique=_technique(found).family)
            if promoted != model:
                await transaction.models.save(promoted)
            return await transaction.models.get(model_id)

    async def delete(self, organization: str, model_id: str, version: int) -> None:
        """Remove a version with its files and exports. Raises NotFound, FailedPrecondition while it answers or a job uses it."""
        async with self._database.transaction(organization) as transaction:
            model = await _lock(transaction, model_id)
            found = await transaction.models.get_version(model_id, version)
            metadata = {"model_id": model_id, "version": str(version)}
            if model.serving_version == version:
                raise FailedPrecondition(
                    "The version answers. Promote another one first, or delete the model.", reason="VERSION_SERVING", metadata=metadata
                )
            if users := await transaction.models.list_version_users(model_id, version):
                raise FailedPrecondition(
                    f"The version is in use by {', '.join(users)}. Cancel the job or wait for its end.",
                    reason="VERSION_IN_USE",
                    metadata={**metadata, "job_id": users[0]},
                )
            await transaction.models.delete_version(model_id, version)
        # The rows are gone, so nobody finds the files any more; what a crash leaves here the worker's sweep removes.
        with suppress(Unavailable):  # an engine that is down holds nothing
            await self._engine.forget(model_id)
        for path in (found.artifact_path, *(export.artifact_path for export in found.exports)):
            await self._files.delete_tree(path)

    async def export(self, organization: str, request: ExportVersion) -> Job:
        """Store the job that writes a version as files to download.

        A version is exported once in each format: where that was done, or is being done, the answer is the job that does it.
        """
        found, body = Violations(), hash_body(request)
        found.text("request_id", request.request_id, MAX_REQUEST_ID_CHARACTERS)
        found.raise_if_any()
        async with self._database.transaction(organization) as transaction:
            if issued := await find_issued(transaction, METHOD, request.request_id, body):
                return await transaction.jobs.get(issued["job_id"])
            await _lock(transaction, request.model_id)
            version = await transaction.models.get_version(request.model_id, request.version)
            form = resolve_format(request.format, _technique(version))
            known = await _find_export_job(transaction, version, form)
            job = known or _new_job(version, form)
            if request.validate_only:
                return job if known else replace(job, job_id="")
            if known is None:
                await transaction.jobs.insert(job)
            await remember(transaction, METHOD, request.request_id, body, {"job_id": job.job_id})
            return await transaction.jobs.get(job.job_id)

    async def list_files(self, organization: str, wanted: FilesOf) -> Sequence[ModelFile]:
        """List the files of a version or export. Raises NotFound."""
        return await self._artefacts.list_files(*await self._find_artefact(organization, wanted))

    async def read_file(self, organization: str, wanted: FilesOf, path: str) -> AsyncGenerator[bytes, None]:
        """Stream a file, its hash checked before. Raises NotFound, InvalidInput, FailedPrecondition for a damaged one."""
        if not path:
            raise InvalidInput.field("path", "is required")
        artefact, seal = await self._find_artefact(organization, wanted)
        async for piece in self._artefacts.read_file(artefact, seal, path):
            yield piece

    async def read_archive(self, organization: str, wanted: FilesOf) -> AsyncGenerator[bytes, None]:
        """Stream all files as a tar archive, their hashes checked before. Raises NotFound, FailedPrecondition for a damaged one."""
        artefact, seal = await self._find_artefact(organization, wanted)
        name = "-".join((wanted.model_id, str(wanted.version), *([wanted.format.lower()] if wanted.format else [])))
        async for piece in self._artefacts.read_archive(artefact, seal, name):
            yield piece

    async def _find_artefact(self, organization: str, wanted: FilesOf) -> tuple[str, str]:
        """Give the path and the manifest's hash. No transaction is open while bytes flow."""
        async with self._database.transaction(organization) as transaction:
            version = await transaction.models.get_version(wanted.model_id, wanted.version)
        if wanted.format is None:
            return version.artifact_path, version.manifest_sha256
        for export in version.exports:
            if export.format is wanted.format:
                return export.artifact_path, export.manifest_sha256
        raise NotFound.of("export", f"{wanted.model_id} version {wanted.version} as {wanted.format.value}")


def resolve_format(asked: ExportFormat | None, technique: Technique) -> ExportFormat:
    """Give the format of an export; left out, the version as it is. Raises InvalidInput for what a technique's weights cannot be."""
    if technique.family is TechniqueFamily.FULL:
        if asked is ExportFormat.ADAPTER:
            raise InvalidInput.field("format", "ADAPTER cannot be: every weight was trained, so there is a whole model and no adapter")
        return ExportFormat.MERGED
    if asked is ExportFormat.MERGED and isinstance(technique, PromptTuning | PTuning | PrefixTuning):
        raise InvalidInput.field(
            "format",
            f"MERGED cannot be: {technique.kind} puts learned tokens before the prompt and leaves the weights as they are, "
            "so there is nothing to merge; export the ADAPTER",
        )
    return asked or ExportFormat.ADAPTER


async def _lock(transaction: Transaction, model_id: str) -> Model:
    model = await transaction.models.get(model_id, lock=True)
    if model.state is ModelState.DELETING:
        raise FailedPrecondition("The model is being deleted.", reason="MODEL_DELETING", metadata={"model_id": model_id})
    return model


async def _find_export_job(transaction: Transaction, version: ModelVersion, form: ExportFormat) -> Job | None:
    """Find the job that has exported the version so, or is about to."""
    for export in version.exports:
        if export.format is form:
            return await transaction.jobs.get(export.job_id)
    for job_id in await transaction.models.list_version_users(version.model_id, version.version):
        job = await transaction.jobs.get(job_id)
        if isinstance(job.spec, ExportSpec) and job.spec.format is form and job.state is not JobState.CANCELLING:
            return job
    return None


def _new_job(version: ModelVersion, form: ExportFormat) -> Job:
    now = datetime.now(UTC)
    return Job(
        job_id=new_id(JOB),
        kind=JobKind.EXPORT,
        model_id=version.model_id,
        state=JobState.QUEUED,
        spec=ExportSpec(version.base_model, version.version, form),
        create_time=now,
        update_time=now,
    )


def _technique(version: ModelVersion) -> Technique:
    return version.spec.technique if version.spec else LoraTechnique()
