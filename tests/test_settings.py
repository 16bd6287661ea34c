"""Settings: the promised variables do what they say, and a senseless value stops the start and names its variable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.settings import Settings, SettingsError


def read(**variables: str) -> Settings:
    return Settings.from_environment(variables)


def test_without_any_variable_the_promised_defaults_hold() -> None:
    settings = read()
    assert (settings.http_port, settings.grpc_port, settings.database_url) == (8003, 50051, None)
    assert settings.storage_path == Path.cwd() / ".data" / "storage"
    assert settings.cache_path == Path.cwd() / ".data" / "cache"


def test_the_promised_variables_are_read() -> None:
    settings = read(
        MODEL_STORAGE_PATH="/srv/s", MODEL_CACHE_PATH="/srv/c", MAX_TRAINING_JOBS="3", DEFAULT_BATCH_SIZE="7", DEFAULT_LEARNING_RATE="3e-4"
    )
    assert (settings.storage_path, settings.cache_path) == (Path("/srv/s"), Path("/srv/c"))
    assert (settings.max_training_jobs, settings.default_batch_size, settings.default_learning_rate) == (3, 7, 3e-4)


def test_models_to_load_ahead_are_named_one_after_the_other() -> None:
    settings = read(PRELOAD_MODELS="smollm2, mdl_1  mdl_2", PINNED_MODELS="mdl_3", MODEL_IDLE_SECONDS="60")
    assert (settings.preload_models, settings.pinned_models, settings.model_idle_seconds) == (("smollm2", "mdl_1", "mdl_2"), ("mdl_3",), 60)
    assert read(PRELOAD_MODELS="smollm2, mdl_1,").preload_models == ("smollm2", "mdl_1"), "a comma at the end names no model"
    assert (read().preload_models, read().engine_memory_bytes) == ((), None)
    assert read(ENGINE_MEMORY_BYTES=str(8 << 30)).engine_memory_bytes == 8 << 30


def test_engines_are_named_or_lie_behind_a_url_and_may_differ_by_base_model() -> None:
    assert (read().engine, read().engine_routes) == ("embedded", ())
    settings = read(ENGINE="http://gpu-1:8000/v1/", ENGINE_ROUTES="smollm2=embedded, meta/Llama=https://gpu-2", ENGINE_DIALECT="vllm")
    assert (settings.engine, settings.engine_dialect) == ("http://gpu-1:8000/v1", "VLLM")
    assert settings.engine_routes == (("smollm2", "embedded"), ("meta/Llama", "https://gpu-2"))


def test_vllm_needs_a_python_that_has_it(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="VLLM_PYTHON must name a Python"):
        read(ENGINE_ROUTES="llama=vllm", VLLM_PYTHON=str(tmp_path / "python"))
    (tmp_path / "python").touch()
    settings = read(ENGINE="vllm", VLLM_PYTHON=str(tmp_path / "python"), VLLM_ARGUMENTS="--dtype 'b f'")
    assert (settings.engine, settings.vllm_arguments) == ("vllm", ("--dtype", "b f"))
    with pytest.raises(SettingsError, match="VLLM_ARGUMENTS cannot be read"):
        read(VLLM_ARGUMENTS="'")


@pytest.mark.parametrize("value", ["torch", "gpu-1:8000", "ftp://gpu-1", "http://user:secret@gpu-1", "http://gpu-1:8000?x=1"])
def test_an_engine_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(SettingsError, match="ENGINE must be embedded"):
        read(ENGINE=value)


@pytest.mark.parametrize(
    ("value", "problem"), [("llama", "base_model=engine"), ("llama=torch", "an engine for llama"), ("a=embedded a=embedded", "a once only")]
)
def test_a_route_that_leads_nowhere_is_refused_by_its_base_model(value: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=rf"ENGINE_ROUTES.*{problem}"):
        read(ENGINE_ROUTES=value)


def test_the_storage_may_be_a_bucket_with_copies_in_the_cache() -> None:
    settings = read(MODEL_STORAGE_PATH="s3://models-1/some/place/", MODEL_CACHE_PATH="/srv/c")
    assert (settings.storage_url, settings.storage_path) == ("s3://models-1/some/place", Path("/srv/c/storage"))
    assert read(MODEL_STORAGE_PATH="gs://models").storage_url == "gs://models"
    local = read(MODEL_STORAGE_PATH="file:///srv/s")
    assert (local.storage_url, local.storage_path) == (None, Path("/srv/s"))


@pytest.mark.parametrize("scheme", ["memory", "http", "ftp", "github", "s4"])
def test_a_storage_of_another_kind_is_refused_by_the_name_of_its_scheme(scheme: str) -> None:
    with pytest.raises(SettingsError, match=rf"MODEL_STORAGE_PATH must be a directory or begin with s3:// or gs://, not with {scheme}://"):
        read(MODEL_STORAGE_PATH=f"{scheme}://bucket")


@pytest.mark.parametrize("place", ["", "/", "key:secret@bucket", "bucket/../other", "bucket?x=1", "Bucket Name"])
def test_a_storage_url_that_names_no_bucket_or_more_than_that_is_refused(place: str) -> None:
    with pytest.raises(SettingsError, match="MODEL_STORAGE_PATH must name a bucket"):
        read(MODEL_STORAGE_PATH=f"s3://{place}")


def test_a_start_without_credentials_for_the_storage_stops_with_the_reason() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"MODEL_STORAGE_PATH": "s3://bucket", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null"}
    environment["AWS_SHARED_CREDENTIALS_FILE"] = "/dev/null"
    done = subprocess.run([sys.executable, "-m", "server", "up"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "MODEL_STORAGE_PATH: The storage s3://bucket cannot be used: this server has no credentials" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_empty_value_means_unset_as_in_a_compose_file() -> None:
    assert read(MAX_TRAINING_JOBS="", DATABASE_URL="").max_training_jobs == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_TRAINING_JOBS", "0"), ("MAX_TRAINING_JOBS", "-1"), ("MAX_TRAINING_JOBS", "two"), ("MAX_TRAINING_JOBS", "1.5"),
        ("DEFAULT_BATCH_SIZE", "0"), ("DEFAULT_BATCH_SIZE", "1000000"),
        ("DEFAULT_LEARNING_RATE", "nan"), ("DEFAULT_LEARNING_RATE", "inf"),
        ("DEFAULT_LEARNING_RATE", "0"), ("DEFAULT_LEARNING_RATE", "-1e-3"),
        ("MODEL_STORAGE_PATH", "/etc/passwd"), ("MODEL_CACHE_PATH", "/etc/passwd/below"),
        ("DATABASE_URL", "mysql://x"), ("HTTP_PORT", "70000"), ("GRPC_PORT", "0"), ("LOG_LEVEL", "LOUD"), ("LEASE_SECONDS", "2"),
    ],
)  # fmt: skip
def test_a_senseless_value_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        read(**{name: value})


def test_all_senseless_values_are_named_at_once() -> None:
    with pytest.raises(SettingsError) as refusal:
        read(MAX_TRAINING_JOBS="-1", DEFAULT_LEARNING_RATE="x", HTTP_PORT="y")
    assert all(name in str(refusal.value) for name in ("MAX_TRAINING_JOBS", "DEFAULT_LEARNING_RATE", "HTTP_PORT"))


def test_one_port_for_two_servers_is_refused() -> None:
    with pytest.raises(SettingsError, match="HTTP_PORT and GRPC_PORT must differ"):
        read(HTTP_PORT="9000", GRPC_PORT="9000")


def test_a_deep_data_directory_still_has_sockets_that_fit(tmp_path: Path) -> None:
    settings = read(DATA_DIRECTORY=str(tmp_path / ("deep" * 30)))
    assert len(bytes(settings.engine_socket)) <= 107


def test_a_socket_whose_path_is_longer_than_linux_allows_is_refused() -> None:
    with pytest.raises(SettingsError, match="ENGINE_SOCKET must have at most 107 bytes"):
        read(ENGINE_SOCKET=f"/{'long' * 30}")


def test_a_relative_path_is_the_same_place_for_roles_that_start_elsewhere() -> None:
    assert read(ENGINE_SOCKET="engine.sock").engine_socket == Path.cwd() / "engine.sock"


def test_the_command_line_stops_with_the_name_of_the_variable() -> None:
    environment = {**os.environ, "MAX_TRAINING_JOBS": "none"}
    done = subprocess.run([sys.executable, "-m", "server", "up"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "MAX_TRAINING_JOBS" in done.stderr
    assert "Traceback" not in done.stderr
