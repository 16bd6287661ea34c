"""Every deploy-time knob: read once from the environment, checked, frozen. A senseless value stops the start and names its variable."""

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from server.variables import (
    integer,
    number,
    parse_arguments,
    parse_database_url,
    parse_directories,
    parse_directory,
    parse_engine,
    parse_file,
    parse_import_roots,
    parse_names,
    parse_routes,
    parse_storage,
    word,
)

# Linux allows 108 bytes for the path of a unix socket, its closing zero included.
_MAX_SOCKET_PATH_BYTES = 107


class SettingsError(ValueError):
    """One or more variables make no sense; the message has a line for each."""


def _variable(name: str, parse: Callable[[str], object], default: str, description: str, *, unset: object = None) -> Any:
    """Declare a field that is read from variable `name`. The default stands as it would in the environment; "" becomes `unset`."""
    return field(metadata={"name": name, "parse": parse, "default": default, "description": description, "unset": unset})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The deployment's configuration. Each field's metadata holds its variable, default and description."""

    data_directory: Path = _variable(
        "DATA_DIRECTORY", parse_directory, ".data", "Everything that this machine keeps: database, storage, cache, logs."
    )
    storage: Path | str = _variable(
        "MODEL_STORAGE_PATH",
        parse_storage,
        "{data}/storage",
        "Datasets, checkpoints and finished models: a directory, or s3://bucket/prefix or gs://bucket/prefix.",
    )
    cache_path: Path = _variable(
        "MODEL_CACHE_PATH", parse_directory, "{data}/cache", "Base models, downloaded and converted; can be deleted at any time."
    )
    storage_cache_bytes: int = _variable(
        "STORAGE_CACHE_BYTES",
        integer(1, 1 << 50),
        str(64 << 30),
        "With remote storage: bytes of copies of it that are kept under MODEL_CACHE_PATH.",
    )
    local_models_paths: tuple[Path, ...] = _variable(
        "LOCAL_MODELS_PATH",
        parse_directories,
        "{data}/models",
        "Directories (separated by `:`) whose models may be named by absolute path.",
    )
    max_training_jobs: int = _variable("MAX_TRAINING_JOBS", integer(1, 1000), "1", "Fine-tuning jobs that run at once, over all workers.")
    max_index_jobs: int = _variable(
        "MAX_INDEX_JOBS",
        integer(1, 1000),
        "1",
        "RAG index jobs that run at once, over all workers, and besides as many that build an index anew.",
    )
    max_batch_jobs: int = _variable(
        "MAX_BATCH_JOBS",
        integer(1, 1000),
        "1",
        "Batch generations that run at once, over all workers; each asks the engine for at most half of its places.",
    )
    default_batch_size: int = _variable(
        "DEFAULT_BATCH_SIZE", integer(1, 4096), "16", "Records per optimiser step where a request names none."
    )
    default_learning_rate: float | None = _variable(
        "DEFAULT_LEARNING_RATE",
        number(0.0, 1.0),
        "",
        "Peak learning rate where a request names none; unset: what suits the technique (LoRA and QLoRA 0.001, full 0.00005).",
    )
    database_url: str | None = _variable(
        "DATABASE_URL", parse_database_url, "", "An outside PostgreSQL with pgvector; unset: the embedded one."
    )
    bind_address: str = _variable("BIND_ADDRESS", str, "127.0.0.1", "Address that the HTTP and gRPC ports listen on.")
    http_port: int = _variable("HTTP_PORT", integer(1, 65535), "8003", "REST and gRPC, through Envoy.")
    grpc_port: int = _variable("GRPC_PORT", integer(1, 65535), "50051", "gRPC, without Envoy.")
    engine_socket: Path = _variable("ENGINE_SOCKET", parse_file, "{run}/engine.sock", "Unix socket between api and engine.")
    engine: str = _variable(
        "ENGINE",
        parse_engine,
        "embedded",
        "What generates: `embedded`, `vllm` (here), or the URL of an OpenAI-compatible server (vLLM, SGLang, Ray Serve LLM, llm-d).",
    )
    engine_routes: tuple[tuple[str, str], ...] = _variable(
        "ENGINE_ROUTES",
        parse_routes,
        "",
        "Other engines for some base models: `base_model=engine`, separated by spaces or commas.",
        unset=(),
    )
    engine_api_key: str | None = _variable("ENGINE_API_KEY", str, "", "Key that is sent to the servers that ENGINE and ENGINE_ROUTES name.")
    engine_dialect: str | None = _variable(
        "ENGINE_DIALECT",
        word("VLLM", "SGLANG", "OPENAI"),
        "",
        "What those servers take beyond OpenAI's completions: VLLM (Ray Serve LLM, too), SGLANG, OPENAI (nothing); unset: they are asked.",
    )
    engine_silence_seconds: float = _variable(
        "ENGINE_SILENCE_SECONDS", number(0.0, 86_400.0), "300", "A server that sends nothing for so long during an answer has failed."
    )
    vllm_python: Path = _variable(
        "VLLM_PYTHON",
        parse_file,
        ".venv-vllm/bin/python",
        "For the engine `vllm`: the Python that has it; `make test-vllm` makes this one.",
    )
    vllm_arguments: tuple[str, ...] = _variable(
        "VLLM_ARGUMENTS",
        parse_arguments,
        "",
        "More arguments for its server, as in a shell: `--tensor-parallel-size 2 --max-model-len 8192`.",
        unset=(),
    )
    lease_seconds: float = _variable(
        "LEASE_SECONDS", number(1.0, 3600.0), "20", "A worker that is silent for so long loses its job to another."
    )
    heartbeat_seconds: float = _variable(
        "HEARTBEAT_SECONDS", number(0.0, 600.0), "1", "How often a worker renews its lease and asks whether the job was cancelled."
    )
    max_job_attempts: int = _variable(
        "MAX_JOB_ATTEMPTS", integer(1, 100), "5", "A job fails as CRASH_LOOP at so many crashes without getting further."
    )
    training_memory_bytes: int | None = _variable(
        "TRAINING_MEMORY_BYTES",
        integer(1 << 20, 1 << 50),
        "",
        "Memory that one training job may take; what needs more is refused. Unset: nine tenths of this machine's.",
    )
    max_dataset_bytes: int = _variable(
        "MAX_DATASET_BYTES", integer(1, 1 << 40), str(2 << 30), "Largest dataset that may be uploaded, in bytes."
    )
    max_document_bytes: int = _variable(
        "MAX_DOCUMENT_BYTES", integer(1, 1 << 30), str(100 << 20), "Largest file that may be uploaded or imported as a document, in bytes."
    )
    dataset_import_roots: tuple[str, ...] = _variable(
        "DATASET_IMPORT_ROOTS",
        parse_import_roots,
        "",
        "Places (between spaces or commas) below which files may be imported: directories, s3://…, gs://…, hf://…; unset: none.",
        unset=(),
    )
    embedding_backend: str = _variable(
        "EMBEDDING_BACKEND",
        word("FLOAT32", "BFLOAT16", "INT8"),
        "FLOAT32",
        "In which numbers new RAG models embed: FLOAT32, BFLOAT16 (half the memory; faster where the processor multiplies it) or INT8"
        " (a quarter; needs VNNI or AMX).",
    )
    max_concurrent_generations: int = _variable(
        "MAX_CONCURRENT_GENERATIONS", integer(1, 1024), "16", "Generations that the engine computes together."
    )
    max_queued_generations: int = _variable(
        "MAX_QUEUED_GENERATIONS", integer(0, 100_000), "256", "Generations that may wait for a place; more are refused."
    )
    kv_cache_tokens: int = _variable(
        "KV_CACHE_TOKENS", integer(256, 1 << 30), "32768", "Tokens of context that the engine keeps over all running generations."
    )
    engine_memory_bytes: int | None = _variable(
        "ENGINE_MEMORY_BYTES",
        integer(1 << 20, 1 << 50),
        "",
        "Memory that the engine's models and adapters may take together; a larger model is refused. Unset: two fifths of this machine's.",
    )
    model_idle_seconds: float = _variable(
        "MODEL_IDLE_SECONDS",
        number(0.0, 1e9),
        "3600",
        "A model or adapter that the engine has loaded and that nobody asks for so long is unloaded.",
    )
    preload_models: tuple[str, ...] = _variable(
        "PRELOAD_MODELS",
        parse_names,
        "",
        "Models (ids or names, separated by spaces or commas) that the engine loads at its start.",
        unset=(),
    )
    pinned_models: tuple[str, ...] = _variable(
        "PINNED_MODELS", parse_names, "", "The same, and they stay loaded: neither idle time nor other models make them leave.", unset=()
    )
    torch_threads: int = _variable("TORCH_THREADS", integer(0, 1024), "0", "Threads of each computing process; 0: one per core.")
    hub_token: str | None = _variable("HF_TOKEN", str, "", "Token for gated models of the Hugging Face hub.")
    hub_endpoint: str | None = _variable("HF_ENDPOINT", str, "", "A mirror of the Hugging Face hub; unset: the hub itself.")
    log_level: str = _variable("LOG_LEVEL", word("DEBUG", "INFO", "WARNING", "ERROR"), "INFO", "DEBUG, INFO, WARNING or ERROR.")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """Read all variables. Raises SettingsError naming every one that makes no sense."""
        problems: list[str] = []
        values: dict[str, Any] = {}
        for item in fields(cls):
            try:
                # The first one is the data directory, below which others lie by default.
                values[item.name] = _read(item.metadata, environment, values.get("data_directory", Path()))
            except ValueError as error:
                problems.append(f"{item.metadata['name']} {error}.")
        if not problems:
            problems += _check_together(values)
        if problems:
            raise SettingsError("\n".join(problems))
        return cls(**values)

    @property
    def storage_path(self) -> Path:
        """The storage's directory on this machine; of remote storage the copies, and what belongs to running jobs."""
        return self.storage if isinstance(self.storage, Path) else self.cache_path / "storage"

    @property
    def storage_url(self) -> str | None:
        """The remote storage; None where it is a directory."""
        return self.storage if isinstance(self.storage, str) else None

    @property
    def run_directory(self) -> Path:
        """Sockets, locks and rendered configuration of the running stack."""
        return _run_directory(self.data_directory)


def _read(variable: Mapping[str, Any], environment: Mapping[str, str], data: Path) -> object:
    """Read a field's variable, or its default. An empty value means unset, as `VARIABLE=` in a compose file does."""
    default = variable["default"].replace("{data}", str(data)).replace("{run}", str(_run_directory(data)))
    text = environment.get(variable["name"], "").strip() or default
    return variable["parse"](text) if text else variable["unset"]


def _run_directory(data: Path) -> Path:
    """Keep sockets below the data directory where their paths fit, else in a directory of the system's own, named by its hash."""
    run = data / "run"
    if len(bytes(run / "postgres" / ".s.PGSQL.5432")) <= _MAX_SOCKET_PATH_BYTES:
        return run
    return Path(tempfile.gettempdir()) / f"model-training-{hashlib.sha256(bytes(data)).hexdigest()[:16]}"


def _check_together(values: Mapping[str, Any]) -> list[str]:
    problems = []
    if values["http_port"] == values["grpc_port"]:
        problems.append(f"HTTP_PORT and GRPC_PORT must differ, both are {values['http_port']}.")
    if values["lease_seconds"] < 3 * values["heartbeat_seconds"]:
        problems.append("LEASE_SECONDS must be at least three times HEARTBEAT_SECONDS, or one late heartbeat loses a job.")
    if len(bytes(values["engine_socket"])) > _MAX_SOCKET_PATH_BYTES:
        problems.append(f"ENGINE_SOCKET must have at most {_MAX_SOCKET_PATH_BYTES} bytes.")
    engines = {values["engine"], *(engine for _, engine in values["engine_routes"])}
    if "vllm" in engines and not values["vllm_python"].is_file():
        problems.append(f"VLLM_PYTHON must name a Python for the engine vllm; there is no {values['vllm_python']}.")
    return problems
