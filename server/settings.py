"""Every deploy-time knob: read once from the environment, checked, frozen. A senseless value stops the start and names its variable."""

import hashlib
import importlib.util
import math
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

# Linux allows 108 bytes for the path of a unix socket, its closing zero included.
_MAX_SOCKET_PATH_BYTES = 107
# Engines that have a name; all others are servers behind a URL.
ENGINES = ("embedded", "vllm")
# Schemes of remote storage, and the package that each needs.
REMOTE_STORAGE = {"s3": "s3fs", "gs": "gcsfs"}


class SettingsError(ValueError):
    """One or more variables make no sense; the message has a line for each."""


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"must be a whole number, not {text!r}") from None
        if not low <= value <= high:
            raise ValueError(f"must be from {low} to {high}, not {value}")
        return value

    return parse


def _number(above: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"must be a number, not {text!r}") from None
        if not (math.isfinite(value) and above < value <= high):
            raise ValueError(f"must be above {above:g} and at most {high:g}, not {text!r}")
        return value

    return parse


def _path(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if not nearest.is_dir():
        raise ValueError(f"must name a directory, but {str(nearest)!r} is a file")
    return path


def _storage(text: str) -> Path | str:
    """Read a directory, or a URL of remote storage as it stands."""
    scheme, separator, place = text.partition("://")
    if not separator:
        return _path(text)
    if scheme == "file":
        return _path(place)
    if scheme not in REMOTE_STORAGE:
        raise ValueError(
            f"must be a directory or begin with {' or '.join(f'{known}://' for known in REMOTE_STORAGE)}, not with {scheme}://"
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]+(/[\w.=-]+)*/?", place) or ".." in place:
        raise ValueError(f"must name a bucket and perhaps a prefix, as {scheme}://bucket/prefix does, without credentials")
    if importlib.util.find_spec(REMOTE_STORAGE[scheme]) is None:
        raise ValueError(f"needs the package {REMOTE_STORAGE[scheme]}, which is not installed, for {scheme}://")
    return text.rstrip("/")


def _paths(text: str) -> tuple[Path, ...]:
    return tuple(_path(part) for part in text.split(":") if part)


def _database_url(text: str) -> str:
    if not text.startswith(("postgresql://", "postgres://", "postgresql+psycopg://")):
        raise ValueError("must begin with postgresql://")
    return text


def _import_roots(text: str) -> tuple[str, ...]:
    roots = tuple(re.split(r"[\s,]+", text))
    for root in roots:
        if not re.fullmatch(r"(file://)?/[^?#*]*|(s3|gs|hf)://[^/?#*]+(/[^?#*]*)?", root) or "/.." in root:
            raise ValueError(f"must name directories, s3://bucket/…, gs://bucket/… or hf://datasets/…, not {root!r}")
    return roots


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(re.split(r"[\s,]+", text)))


def _file(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _arguments(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"cannot be read as a shell would: {error}") from None


def _engine(text: str) -> str:
    """Read which engine: `embedded`, or the URL of a server."""
    if text.lower() in ENGINES:
        return text.lower()
    if not re.fullmatch(r"https?://[\w.-]+(:\d{1,5})?(/[\w./-]*)?|https?://\[[\da-fA-F:]+\](:\d{1,5})?(/[\w./-]*)?", text):
        raise ValueError(f"must be {', '.join(ENGINES)} or the URL of a server (http://host:port), without credentials, not {text!r}")
    return text.rstrip("/")


def _routes(text: str) -> tuple[tuple[str, str], ...]:
    routes: dict[str, str] = {}
    for entry in re.split(r"[\s,]+", text):
        base_model, separator, engine = entry.partition("=")
        if not (base_model and separator and engine):
            raise ValueError(f"must have the form base_model=engine, not {entry!r}")
        if base_model in routes:
            raise ValueError(f"must name {base_model} once only")
        try:
            routes[base_model] = _engine(engine)
        except ValueError as error:
            raise ValueError(f"names an engine for {base_model} that {error}") from None
    return tuple(routes.items())


def _word(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.upper() not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}, not {text!r}")
        return text.upper()

    return parse


def _variable(name: str, parse: Callable[[str], object], default: str, description: str) -> Any:
    """Declare a field that is read from variable `name`. The default stands as it would in the environment ("": unset)."""
    return field(metadata={"name": name, "parse": parse, "default": default, "description": description})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The deployment's configuration. Each field's metadata holds its variable, default and description."""

    data_directory: Path = _variable(
        "DATA_DIRECTORY", _path, ".data", "Everything that this machine keeps: database, storage, cache, logs."
    )
    storage: Path | str = _variable(
        "MODEL_STORAGE_PATH",
        _storage,
        "{data}/storage",
        "Datasets, checkpoints and finished models: a directory, or s3://bucket/prefix or gs://bucket/prefix.",
    )
    cache_path: Path = _variable(
        "MODEL_CACHE_PATH", _path, "{data}/cache", "Base models, downloaded and converted; can be deleted at any time."
    )
    storage_cache_bytes: int = _variable(
        "STORAGE_CACHE_BYTES",
        _integer(1, 1 << 50),
        str(64 << 30),
        "With remote storage: bytes of copies of it that are kept under MODEL_CACHE_PATH.",
    )
    local_models_paths: tuple[Path, ...] = _variable(
        "LOCAL_MODELS_PATH", _paths, "{data}/models", "Directories (separated by `:`) whose models may be named by absolute path."
    )
    max_training_jobs: int = _variable("MAX_TRAINING_JOBS", _integer(1, 1000), "1", "Fine-tuning jobs that run at once, over all workers.")
    max_index_jobs: int = _variable(
        "MAX_INDEX_JOBS",
        _integer(1, 1000),
        "1",
        "RAG index jobs that run at once, over all workers, and besides as many that build an index anew.",
    )
    max_batch_jobs: int = _variable(
        "MAX_BATCH_JOBS",
        _integer(1, 1000),
        "1",
        "Batch generations that run at once, over all workers; each asks the engine for at most half of its places.",
    )
    default_batch_size: int = _variable(
        "DEFAULT_BATCH_SIZE", _integer(1, 4096), "16", "Records per optimiser step where a request names none."
    )
    default_learning_rate: float | None = _variable(
        "DEFAULT_LEARNING_RATE",
        _number(0.0, 1.0),
        "",
        "Peak learning rate where a request names none; unset: what suits the technique (LoRA and QLoRA 0.001, full 0.00005).",
    )
    database_url: str | None = _variable("DATABASE_URL", _database_url, "", "An outside PostgreSQL with pgvector; unset: the embedded one.")
    bind_address: str = _variable("BIND_ADDRESS", str, "127.0.0.1", "Address that the HTTP and gRPC ports listen on.")
    http_port: int = _variable("HTTP_PORT", _integer(1, 65535), "8003", "REST and gRPC, through Envoy.")
    grpc_port: int = _variable("GRPC_PORT", _integer(1, 65535), "50051", "gRPC, without Envoy.")
    engine_socket: Path = _variable("ENGINE_SOCKET", Path, "{run}/engine.sock", "Unix socket between api and engine.")
    engine: str = _variable(
        "ENGINE",
        _engine,
        "embedded",
        "What generates: `embedded`, `vllm` (here), or the URL of an OpenAI-compatible server (vLLM, SGLang, Ray Serve LLM, llm-d).",
    )
    engine_routes: tuple[tuple[str, str], ...] | None = _variable(
        "ENGINE_ROUTES", _routes, "", "Other engines for some base models: `base_model=engine`, separated by spaces or commas."
    )
    engine_api_key: str | None = _variable("ENGINE_API_KEY", str, "", "Key that is sent to the servers that ENGINE and ENGINE_ROUTES name.")
    engine_dialect: str | None = _variable(
        "ENGINE_DIALECT",
        _word("VLLM", "SGLANG", "OPENAI"),
        "",
        "What those servers take beyond OpenAI's completions: VLLM (Ray Serve LLM, too), SGLANG, OPENAI (nothing); unset: they are asked.",
    )
    engine_silence_seconds: float = _variable(
        "ENGINE_SILENCE_SECONDS", _number(0.0, 86_400.0), "300", "A server that sends nothing for so long during an answer has failed."
    )
    vllm_python: Path = _variable(
        "VLLM_PYTHON",
        _file,
        ".venv-vllm/bin/python",
        "For the engine `vllm`: the Python that has it; `make test-vllm` makes this one.",
    )
    vllm_arguments: tuple[str, ...] | None = _variable(
        "VLLM_ARGUMENTS", _arguments, "", "More arguments for its server, as in a shell: `--tensor-parallel-size 2 --max-model-len 8192`."
    )
    lease_seconds: float = _variable(
        "LEASE_SECONDS", _number(1.0, 3600.0), "20", "A worker that is silent for so long loses its job to another."
    )
    heartbeat_seconds: float = _variable(
        "HEARTBEAT_SECONDS", _number(0.0, 600.0), "1", "How often a worker renews its lease and asks whether the job was cancelled."
    )
    max_job_attempts: int = _variable(
        "MAX_JOB_ATTEMPTS", _integer(1, 100), "5", "A job fails as CRASH_LOOP at so many crashes without getting further."
    )
    training_memory_bytes: int | None = _variable(
        "TRAINING_MEMORY_BYTES",
        _integer(1 << 20, 1 << 50),
        "",
        "Memory that one training job may take; what needs more is refused. Unset: nine tenths of this machine's.",
    )
    max_dataset_bytes: int = _variable(
        "MAX_DATASET_BYTES", _integer(1, 1 << 40), str(2 << 30), "Largest dataset that may be uploaded, in bytes."
    )
    max_document_bytes: int = _variable(
        "MAX_DOCUMENT_BYTES", _integer(1, 1 << 30), str(100 << 20), "Largest file that may be uploaded or imported as a document, in bytes."
    )
    dataset_import_roots: tuple[str, ...] | None = _variable(
        "DATASET_IMPORT_ROOTS",
        _import_roots,
        "",
        "Places (between spaces or commas) below which files may be imported: directories, s3://…, gs://…, hf://…; unset: none.",
    )
    embedding_backend: str = _variable(
        "EMBEDDING_BACKEND",
        _word("FLOAT32", "BFLOAT16", "INT8"),
        "FLOAT32",
        "In which numbers new RAG models embed: FLOAT32, BFLOAT16 (half the memory; faster where the processor multiplies it) or INT8"
        " (a quarter; needs VNNI or AMX).",
    )
    max_concurrent_generations: int = _variable(
        "MAX_CONCURRENT_GENERATIONS", _integer(1, 1024), "16", "Generations that the engine computes together."
    )
    max_queued_generations: int = _variable(
        "MAX_QUEUED_GENERATIONS", _integer(0, 100_000), "256", "Generations that may wait for a place; more are refused."
    )
    kv_cache_tokens: int = _variable(
        "KV_CACHE_TOKENS", _integer(256, 1 << 30), "32768", "Tokens of context that the engine keeps over all running generations."
    )
    engine_memory_bytes: int | None = _variable(
        "ENGINE_MEMORY_BYTES",
        _integer(1 << 20, 1 << 50),
        "",
        "Memory that the weights of the engine's models may take together; a larger model is refused. Unset: two fifths of this machine's.",
    )
    model_idle_seconds: float = _variable(
        "MODEL_IDLE_SECONDS", _number(0.0, 1e9), "3600", "A model that the engine has loaded and that nobody asks for so long is unloaded."
    )
    preload_models: tuple[str, ...] | None = _variable(
        "PRELOAD_MODELS", _names, "", "Models (ids or names, separated by spaces or commas) that the engine loads at its start."
    )
    pinned_models: tuple[str, ...] | None = _variable(
        "PINNED_MODELS", _names, "", "The same, and they stay loaded: neither idle time nor other models make them leave."
    )
    torch_threads: int = _variable("TORCH_THREADS", _integer(0, 1024), "0", "Threads of each computing process; 0: one per core.")
    hub_token: str | None = _variable("HF_TOKEN", str, "", "Token for gated models of the Hugging Face hub.")
    hub_endpoint: str | None = _variable("HF_ENDPOINT", str, "", "A mirror of the Hugging Face hub; unset: the hub itself.")
    log_level: str = _variable("LOG_LEVEL", _word("DEBUG", "INFO", "WARNING", "ERROR"), "INFO", "DEBUG, INFO, WARNING or ERROR.")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """Read all variables. Raises SettingsError naming every one that makes no sense."""
        problems: list[str] = []
        data = _parse_data_directory(environment, problems)
        places = {"{data}": str(data), "{run}": str(_run_directory(data))}
        values: dict[str, object] = {}
        for item in fields(cls):
            name, default = item.metadata["name"], item.metadata["default"]
            for place, path in places.items():
                default = default.replace(place, path)
            # An empty value means unset, as `VARIABLE=` in a compose file does.
            text = environment.get(name, "").strip() or default
            try:
                values[item.name] = item.metadata["parse"](text) if text else None
            except ValueError as error:
                problems.append(f"{name} {error}.")
        if not problems:
            problems += _check_together(values)
        if problems:
            raise SettingsError("\n".join(problems))
        return cls(**values)  # type: ignore[arg-type]  # each value came from its own field's parser

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


def _parse_data_directory(environment: Mapping[str, str], problems: list[str]) -> Path:
    try:
        return _path(environment.get("DATA_DIRECTORY", "").strip() or ".data")
    except ValueError:
        return Path(tempfile.gettempdir())  # reported with the other fields


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
    engines = {values["engine"], *(engine for _, engine in values["engine_routes"] or ())}
    if "vllm" in engines and not values["vllm_python"].is_file():
        problems.append(f"VLLM_PYTHON must name a Python for the engine vllm; there is no {values['vllm_python']}.")
    return problems
