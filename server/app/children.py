"""A job's child: it reads its order, and only what that order needs is imported."""

import asyncio
from typing import TYPE_CHECKING

from server.app.parts import WEIGHT_HASHES, make_source, open_artefacts, open_files, prepare_torch
from server.settings import Settings

if TYPE_CHECKING:
    from server.childprocess import Emit, Signals
    from server.domain.orders import BatchOrder, ExportOrder, FineTuneOrder, IndexOrder, Order

TOKEN_CACHE_BYTES = 4 << 30  # some 500 million tokens of datasets that were trained on, oldest use dropped first


def run_child_role(role: str, settings: Settings, events_fd: int) -> int:
    """Do the job of the order on standard input, events going to `events_fd`; return the exit code."""
    from server.childprocess import run_child
    from server.domain.orders import BatchOrder, ExportOrder, FineTuneOrder, IndexOrder

    if role != "batch":
        prepare_torch(settings)

    def work(order: "Order", emit: "Emit", signals: "Signals") -> None:
        match role, order:
            case "train", FineTuneOrder():
                _fine_tune(settings, order, emit, signals)
            case "train", ExportOrder():
                _export(settings, order, emit, signals)
            case "index", IndexOrder():
                _index(settings, order, emit, signals)
            case "batch", BatchOrder():
                asyncio.run(_answer_batch(settings, order, emit, signals))
            case _:
                raise ValueError(f"the role {role} does not take an order of kind {order.kind}")

    return run_child(work, events_fd)


def _fine_tune(settings: Settings, order: "FineTuneOrder", emit: "Emit", signals: "Signals") -> None:
    from server.datafiles.tokencache import TokenCache
    from server.training.run import run_fine_tune

    cache = TokenCache(settings.cache_path / "tokens", TOKEN_CACHE_BYTES)
    run_fine_tune(order, open_artefacts(settings), make_source(settings), emit, signals, cache)


def _export(settings: Settings, order: "ExportOrder", emit: "Emit", signals: "Signals") -> None:
    from server.training.export import run_export

    run_export(order, open_artefacts(settings), make_source(settings), emit, signals)


def _index(settings: Settings, order: "IndexOrder", emit: "Emit", signals: "Signals") -> None:
    from server.rag.embedding import Embedder
    from server.rag.index_child import run_index
    from server.rag.parsing.document import Limits

    files, source = open_files(settings), make_source(settings)
    embedder = Embedder(lambda name: source.resolve(name).directory, hashes_path=settings.cache_path / WEIGHT_HASHES)
    limits = Limits(file_bytes=settings.max_document_bytes)
    run_index(
        order, settings.storage_path, embedder, emit, signals.should_stop,
        fetch=lambda path: asyncio.run(files.fetch(path)), limits=limits,
    )  # fmt: skip


async def _answer_batch(settings: Settings, order: "BatchOrder", emit: "Emit", signals: "Signals") -> None:
    from server.batches.batch_child import BatchParts, run_batch
    from server.inference.client import EngineClient

    engine = EngineClient(settings.engine_socket)
    # People's requests come first where there is a queue; where there is none they find half of the places free.
    concurrency = max(1, settings.max_concurrent_generations // 2)
    try:
        parts = BatchParts(open_artefacts(settings), open_files(settings).fetch, engine, concurrency)
        await run_batch(order, parts, emit, signals)
    finally:
        await engine.close()
