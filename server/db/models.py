"""Rows of models and their versions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, and_, cast, delete, exists, func, insert, or_, select, true, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.document_tables import IndexKey, documents, rag_indexes
from server.db.failures import violated_constraint
from server.db.rag_indexes import INDEX_COLUMNS, PLACE_REVISION, index_from_row, insert_index
from server.db.tables import IS_ACTIVE, jobs, model_exports, model_versions, models
from server.domain.errors import ErrorData, FailedPrecondition, NotFound
from server.domain.ids import MODEL, is_id
from server.domain.jobs import JobKind
from server.domain.models import Model, ModelExport, ModelState, ModelType, ModelVersion, RagConfiguration
from server.domain.retrieval import FIRST_INDEX, Chunking
from server.domain.specs import ExportFormat, FineTuneSpec
from server.services.codec import Codec
from server.services.ports import ModelFilter, Page

MAX_INTEGER = 2**31 - 1

ERROR = Codec[ErrorData | None](ErrorData | None)
_FINE_TUNE = Codec[FineTuneSpec | None](FineTuneSpec | None)
_RAG = Codec[RagConfiguration | None](RagConfiguration | None)


class PostgresModels:
    """The Models of one organization, on an open transaction."""

    def __init__(self, connection: AsyncConnection, organization: str) -> None:
        self._connection = connection
        self._organization = organization

    async def insert(self, model: Model) -> None:
        """Add a model. Raises NotFound where the generator is a model of ours that is not there (any more)."""
        row = insert(models).values(
            organization=self._organization,
            model_id=model.model_id,
            type=model.type,
            base_model=model.base_model,
            create_time=model.create_time,
            update_time=model.update_time,
            last_version=0,
            serving_index=FIRST_INDEX if model.rag else None,
            **_changeable(model),
        )
        await self._write(row, model)
        if model.rag:
            index = IndexKey(self._organization, model.model_id, FIRST_INDEX)
            await insert_index(self._connection, index, model.rag.embedding_model, model.rag.chunking)

    async def get(self, model_id: str, *, lock: bool = False) -> Model:
        """Read a model with its counts; `lock` holds the row until the transaction ends. Raises NotFound."""
        if not is_id(model_id, MODEL):
            raise NotFound.of("model", model_id)
        if lock:
            await self._connection.execute(select(models.c.model_id).where(*self._own(model_id)).with_for_update())
        row = (await self._connection.execute(_with_counts(select(models).where(*self._own(model_id))))).one_or_none()
        if row is None:
            raise NotFound.of("model", model_id)
        return model_from_row(row)

    async def read_rag(self, model_id: str) -> tuple[ModelState, RagConfiguration | None]:
        """Read how a model searches and answers, and where; None where it is no RAG model. Counts nothing. Raises NotFound."""
        if not is_id(model_id, MODEL):
            raise NotFound.of("model", model_id)
        serving = and_(
            rag_indexes.c.organization == models.c.organization,
            rag_indexes.c.model_id == models.c.model_id,
            rag_indexes.c.index_number == models.c.serving_index,
        )
        columns = (models.c.state, models.c.rag, *INDEX_COLUMNS, PLACE_REVISION)
        query = select(*columns).select_from(models.outerjoin(rag_indexes, serving)).where(*self._own(model_id))
        row = (await self._connection.execute(query)).one_or_none()
        if row is None:
            raise NotFound.of("model", model_id)
        return ModelState(row.state), _rag_from_row(row)

    async def list(self, where: ModelFilter, page: Page) -> Sequence[Model]:
        """List models, newest first."""
        conditions = [models.c.organization == self._organization]
        conditions += [models.c.type == where.type] if where.type else []
        conditions += [models.c.state == where.state] if where.state else []
        conditions += [models.c.base_model == where.base_model] if where.base_model else []
        conditions += [models.c.model_id < page.before_id] if page.before_id is not None else []
        chosen = select(models).where(*conditions).order_by(models.c.model_id.desc()).limit(page.size)
        return [model_from_row(row) for row in await self._connection.execute(_with_counts(chosen))]

    async def save(self, model: Model) -> None:
        """Write the fields that may change: names, labels, state, error, serving_version, technique, rag. Sets update_time.

        Raises NotFound.
        """
        row = update(models).where(*self._own(model.model_id)).values(update_time=func.clock_timestamp(), **_changeable(model))
        if not await self._write(row, model):
            raise NotFound.of("model", model.model_id)

    async def delete(self, model_id: str) -> None:
        """Remove the model with its versions, documents, chunks and finished jobs.

        Raises NotFound, and FailedPrecondition where something began to use the model since the caller looked.
        """
        await self.get(model_id, lock=True)
        mine = (jobs.c.organization == self._organization, jobs.c.model_id == model_id)
        using = (jobs.c.organization == self._organization, IS_ACTIVE, uses_model(self._organization, model_id))
        if await self._connection.scalar(select(exists().where(*using))):
            raise FailedPrecondition("A job that uses the model is not finished.", reason="MODEL_IN_USE", metadata={"model_id": model_id})
        await self._connection.execute(delete(jobs).where(*mine))
        try:
            await self._connection.execute(delete(models).where(*self._own(model_id)))
        except IntegrityError as error:
            raise FailedPrecondition("Another model uses it.", reason="MODEL_IN_USE", metadata={"model_id": model_id}) from error

    async def list_users(self, model_id: str) -> Sequence[str]:
        """Give the ids of RAG models that generate with this model."""
        if not is_id(model_id, MODEL):
            return []
        query = select(models.c.model_id).where(models.c.organization == self._organization, models.c.generator_model_id == model_id)
        return list(await self._connection.scalars(query.order_by(models.c.model_id)))

    async def add_index(self, model_id: str, embedding_model: str, chunking: Chunking) -> int:
        """Add an index that does not answer yet; give its number. The model's row must be locked. Raises NotFound."""
        of_model = (rag_indexes.c.organization == self._organization, rag_indexes.c.model_id == model_id)
        latest = await self._connection.scalar(select(func.max(rag_indexes.c.index_number)).where(*of_model))
        index = IndexKey(self._organization, model_id, (latest or 0) + 1)
        try:
            await insert_index(self._connection, index, embedding_model, chunking)
        except IntegrityError as error:
            raise NotFound.of("model", model_id) from error
        return index.index_number

    async def get_version(self, model_id: str, version: int) -> ModelVersion:
        """Read one version. Raises NotFound."""
        if not is_id(model_id, MODEL):
            raise NotFound.of("model", model_id)
        if not 1 <= version <= MAX_INTEGER:
            raise NotFound.of("model version", f"{model_id} version {version}")
        conditions = (*self._versions_of(model_id), model_versions.c.version == version)
        row = (await self._connection.execute(select(model_versions).where(*conditions))).one_or_none()
        if row is None:
            raise NotFound.of("model version", f"{model_id} version {version}")
        return version_from_row(row, await self._read_exports(model_id, [version]))

    async def list_versions(self, model_id: str, size: int, before: int | None = None) -> Sequence[ModelVersion]:
        """List the versions with their exports, newest first: at most `size`, below the number `before`."""
        if not is_id(model_id, MODEL):
            return []
        conditions = [*self._versions_of(model_id)]
        conditions += [model_versions.c.version < min(before, MAX_INTEGER)] if before is not None else []
        query = select(model_versions).where(*conditions).order_by(model_versions.c.version.desc()).limit(size)
        rows = (await self._connection.execute(query)).all()
        exports = await self._read_exports(model_id, [row.version for row in rows])
        return [version_from_row(row, exports) for row in rows]

    async def list_version_users(self, model_id: str, version: int) -> Sequence[str]:
        """Give the ids of jobs that are not finished and export this version, generate with it or start from it."""
        if not is_id(model_id, MODEL):
            return []
        start = jobs.c.spec["warm_start_from"]
        kinds = (JobKind.EXPORT, JobKind.BATCH_GENERATION)
        using = and_(jobs.c.kind.in_(kinds), jobs.c.model_id == model_id, jobs.c.spec["version"] == cast(version, JSONB))
        starting = and_(start["model_id"].astext == model_id, start["version"] == cast(version, JSONB))
        query = select(jobs.c.job_id).where(jobs.c.organization == self._organization, IS_ACTIVE, or_(using, starting))
        return list(await self._connection.scalars(query.order_by(jobs.c.job_id)))

    async def delete_version(self, model_id: str, version: int) -> None:
        """Remove a version with its exports. Raises NotFound."""
        await self.get_version(model_id, version)
        await self._connection.execute(delete(model_versions).where(*self._versions_of(model_id), model_versions.c.version == version))

    async def _read_exports(self, model_id: str, versions: Sequence[int]) -> Sequence[Row[Any]]:
        of_model = (model_exports.c.organization == self._organization, model_exports.c.model_id == model_id)
        query = select(model_exports).where(*of_model, model_exports.c.version.in_(versions)).order_by(model_exports.c.format)
        return (await self._connection.execute(query)).all() if versions else []

    async def _write(self, statement: Any, model: Model) -> bool:
        try:
            result = await self._connection.execute(statement)
        except IntegrityError as error:
            if violated_constraint(error) == "models_generator":
                raise NotFound.of("model", model.rag.generator_model_id if model.rag else "") from error
            raise
        return bool(result.rowcount)

    def _own(self, model_id: str) -> tuple[ColumnElement[bool], ...]:
        return models.c.organization == self._organization, models.c.model_id == model_id

    def _versions_of(self, model_id: str) -> tuple[ColumnElement[bool], ...]:
        return model_versions.c.organization == self._organization, model_versions.c.model_id == model_id


def uses_model(organization: str, model_id: str) -> ColumnElement[bool]:
    """Tell of a row of jobs whether its result, base, start or generator is this model."""
    starting = jobs.c.spec["warm_start_from"]["model_id"].astext == model_id
    generating = select(models.c.model_id).where(models.c.organization == organization, models.c.generator_model_id == model_id)
    return or_(jobs.c.model_id == model_id, jobs.c.base_model == model_id, starting, jobs.c.model_id.in_(generating))


def model_from_row(row: Row[Any]) -> Model:
    """Read a row of `models` with its counts."""
    return Model(
        model_id=row.model_id,
        type=ModelType(row.type),
        display_name=row.display_name,
        state=ModelState(row.state),
        base_model=row.base_model,
        create_time=row.create_time,
        update_time=row.update_time,
        description=row.description,
        labels=row.labels,
        technique=row.technique,
        serving_version=row.serving_version,
        version_count=row.version_count,
        rag=_rag_from_row(row),
        document_count=row.document_count,
        chunk_count=row.chunk_count,
        error=ERROR.from_json(row.error),
    )


def _rag_from_row(row: Row[Any]) -> RagConfiguration | None:
    rag = _RAG.from_json(row.rag)
    return replace(rag, index=index_from_row(row)) if rag else None


def version_from_row(row: Row[Any], exports: Sequence[Row[Any]] = ()) -> ModelVersion:
    """Read a row of `model_versions`, with those of its exports among `exports`."""
    return ModelVersion(
        model_id=row.model_id,
        version=row.version,
        job_id=row.job_id,
        base_model=row.base_model,
        base_revision=row.base_revision,
        artifact_path=row.artifact_path,
        manifest_sha256=row.manifest_sha256,
        size_bytes=row.size_bytes,
        create_time=row.create_time,
        metrics=row.metrics,
        attempt=row.attempt,
        checkpoint_step=row.checkpoint_step,
        spec=_FINE_TUNE.from_json(row.spec),
        library_versions=row.library_versions,
        template_sha256=row.template_sha256,
        exports=tuple(_export_from_row(each) for each in exports if each.version == row.version),
    )


def _export_from_row(row: Row[Any]) -> ModelExport:
    return ModelExport(
        format=ExportFormat(row.format),
        job_id=row.job_id,
        artifact_path=row.artifact_path,
        manifest_sha256=row.manifest_sha256,
        size_bytes=row.size_bytes,
        create_time=row.create_time,
        metrics=row.metrics,
    )


def _changeable(model: Model) -> dict[str, Any]:
    generator = model.rag.generator_model_id if model.rag else ""
    return {
        "display_name": model.display_name,
        "description": model.description,
        "labels": dict(model.labels),
        "state": model.state,
        "technique": model.technique,
        "serving_version": model.serving_version,
        "rag": _RAG.to_json(replace(model.rag, index=None) if model.rag else None),
        "generator_model_id": generator if is_id(generator, MODEL) else None,
        "error": ERROR.to_json(model.error),
    }


def _with_counts(chosen: Select[Any]) -> Select[Any]:
    """Count what belongs to each chosen model, so that no stored count can drift. The choice comes first: only its rows are counted."""
    rows = chosen.subquery("models")
    of_model = (documents.c.organization == rows.c.organization, documents.c.model_id == rows.c.model_id)
    chunk_sum = func.coalesce(func.sum(documents.c.chunk_count), 0).label("chunk_count")
    document_counts = select(func.count().label("document_count"), chunk_sum).where(*of_model).lateral("document_counts")
    versions = select(func.count().label("version_count")).select_from(model_versions)
    versions = versions.where(model_versions.c.organization == rows.c.organization, model_versions.c.model_id == rows.c.model_id)
    version_counts = versions.lateral("version_counts")
    of_model = (rag_indexes.c.organization == rows.c.organization, rag_indexes.c.model_id == rows.c.model_id)
    serving = select(*INDEX_COLUMNS).where(*of_model, rag_indexes.c.index_number == rows.c.serving_index)
    # The limit keeps the planner from joining all indexes of all models.
    index = serving.limit(1).lateral("serving")
    joined = rows.join(document_counts, true()).join(version_counts, true()).outerjoin(index, true())
    return select(rows, document_counts, version_counts, index).select_from(joined).order_by(rows.c.model_id.desc())
