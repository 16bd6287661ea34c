"""Where base models come from: aliases, packaged weights, local directories, the hub; and what is refused."""

import json
import pickle
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from server.basemodels.errors import BaseModelRefused, BaseModelUnavailable
from server.basemodels.packaged import PACKAGED_MODELS, PackagedModel
from server.basemodels.sources import BaseModelSource, SourceKind
from server.domain.errors import NotFound
from tests.tiny_cross_encoders import build_tiny_cross_encoder
from tests.tiny_models import build_tiny_causal_model, build_tiny_embedding_model

MINI_LM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def source(tmp_path: Path, models: Path) -> BaseModelSource:
    return BaseModelSource(tmp_path / "cache", allowed_local_roots=[models], aliases={"mini": MINI_LM}, offline=True)


def test_packaged_weights_answer_to_their_hub_name_and_alias(source: BaseModelSource) -> None:
    resolved = source.resolve(MINI_LM)
    assert resolved.kind is SourceKind.PACKAGED
    assert resolved.revision == "sha256:53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert source.resolve("mini") == resolved
    assert source.is_present("mini")


def test_packaged_weights_that_are_not_the_pinned_ones_are_not_used() -> None:
    real = PACKAGED_MODELS[MINI_LM]
    tampered = PackagedModel(MINI_LM, real.distribution, real.path, {"model.safetensors": "0" * 64})
    with pytest.raises(BaseModelUnavailable, match="not the pinned ones"):
        tampered.verify()


def test_weights_of_a_package_that_is_not_installed_are_unavailable() -> None:
    with pytest.raises(BaseModelUnavailable, match="not installed"):
        PackagedModel("some/model", "no-such-distribution", "x.gguf", {"": "0"}).verify()


def test_a_cross_encoder_is_told_from_other_models_by_its_configuration(source: BaseModelSource, models: Path) -> None:
    source.check_cross_encoder(str(build_tiny_cross_encoder(models / "ranks")))
    for other in (build_tiny_cross_encoder(models / "two", labels=2), build_tiny_embedding_model(models / "embeds")):
        with pytest.raises(BaseModelRefused, match="no cross-encoder") as refused:
            source.check_cross_encoder(str(other))
        assert refused.value.reason == "NOT_A_CROSS_ENCODER"
    with pytest.raises(NotFound):
        source.check_cross_encoder(str(models / "nowhere"))


def test_a_local_directory_resolves_and_its_revision_follows_its_weights(source: BaseModelSource, models: Path) -> None:
    directory = build_tiny_causal_model(models / "llama", seed=1)
    first = source.resolve(str(directory))
    assert (first.kind, first.directory) == (SourceKind.LOCAL, directory)
    assert source.resolve(str(directory)).revision == first.revision
    build_tiny_causal_model(directory, seed=2)
    assert source.resolve(str(directory)).revision != first.revision


def test_a_sentence_transformers_directory_resolves(source: BaseModelSource, models: Path) -> None:
    assert source.resolve(str(build_tiny_embedding_model(models / "embedding"))).kind is SourceKind.LOCAL


def test_a_directory_outside_the_allowed_roots_looks_like_none(source: BaseModelSource, tmp_path: Path, models: Path) -> None:
    outside = build_tiny_causal_model(tmp_path / "outside")
    models.mkdir()
    (models / "link").symlink_to(outside)
    for name in (str(outside), f"{models}/../outside", str(models / "link"), str(models / "missing")):
        with pytest.raises(NotFound):
            source.resolve(name)
        with pytest.raises(NotFound):
            source.check(name)


@pytest.mark.parametrize("name", ["", "x", "../x", "a/b/c", "a/..", "a b/c", "a/b\n", "-a/b", "a//b", "a--b/c", "é/b"])
def test_a_name_of_no_known_form_is_not_found(source: BaseModelSource, name: str) -> None:
    with pytest.raises(NotFound):
        source.resolve(name)
    with pytest.raises(NotFound):
        source.check(name)


def test_a_hub_model_that_is_not_cached_is_unavailable_when_the_hub_is_switched_off(source: BaseModelSource) -> None:
    assert not source.is_present("mistralai/Mistral-7B-v0.3")
    with pytest.raises(BaseModelUnavailable, match="switched off"):
        source.resolve("mistralai/Mistral-7B-v0.3")


def test_a_hub_model_in_the_cache_resolves_without_the_hub(source: BaseModelSource, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "hub" / "models--some--model"
    build_tiny_causal_model(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    resolved = source.resolve("some/model")
    assert (resolved.revision, resolved.kind) == (commit, SourceKind.HUB)
    assert source.is_present("some/model")


def test_a_hub_model_stays_at_the_commit_that_was_taken_first(source: BaseModelSource, tmp_path: Path) -> None:
    first, second = "0" * 40, "1" * 40
    repository = tmp_path / "cache" / "hub" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    for seed, commit in enumerate((first, second)):
        build_tiny_causal_model(repository / "snapshots" / commit, seed=seed)
        (repository / "refs" / "main").write_text(commit)
        assert source.resolve("some/model").revision == first, "the newest commit is taken once"
    assert source.resolve("some/model", second).revision == second
    assert source.resolve("some/model").revision == first
    with pytest.raises(BaseModelUnavailable):
        source.resolve("some/model", "2" * 40)


def test_a_model_that_has_changed_is_not_taken_for_the_old_one(source: BaseModelSource, models: Path) -> None:
    directory = build_tiny_causal_model(models / "llama", seed=1)
    revision = source.resolve(str(directory)).revision
    assert source.resolve(str(directory), revision).revision == revision
    build_tiny_causal_model(directory, seed=2)
    with pytest.raises(BaseModelUnavailable, match="changed"):
        source.resolve(str(directory), revision)


def refuse(source: BaseModelSource, directory: Path) -> BaseModelRefused:
    with pytest.raises(BaseModelRefused) as refused:
        source.resolve(str(directory))
    with pytest.raises(BaseModelRefused):
        source.check(str(directory))
    return refused.value


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "weights.pkl"])
def test_pickled_weights_are_refused(source: BaseModelSource, models: Path, name: str) -> None:
    directory = build_tiny_causal_model(models / "pickled")
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(pickle.dumps({"weight": 1}))
    assert refuse(source, directory).reason == "PICKLED_WEIGHTS"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_the_models_own_is_refused_and_never_run(source: BaseModelSource, models: Path, name: str) -> None:
    directory = build_tiny_causal_model(models / "code")
    config = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (directory / "evil.py").write_text("raise SystemExit('ran')")
    assert refuse(source, directory).reason == "REMOTE_CODE"


def test_a_foreign_module_of_a_sentence_transformers_directory_is_refused(source: BaseModelSource, models: Path) -> None:
    directory = build_tiny_embedding_model(models / "embedding")
    (directory / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "evil.Module"}]))
    assert refuse(source, directory).reason == "REMOTE_CODE"


@pytest.mark.parametrize(
    ("break_it", "why"),
    [("no config", "has no config.json"), ("no weights", "has no safetensors weights"), ("broken config", "that is no JSON")],
)
def test_a_directory_that_is_no_model_is_refused_with_what_it_lacks(source: BaseModelSource, models: Path, break_it: str, why: str) -> None:
    directory = build_tiny_causal_model(models / "broken")
    assert source.resolve(str(directory)).directory == directory, "it was a model before"
    if break_it == "no weights":
        (directory / "model.safetensors").unlink()
    else:
        (directory / "config.json").unlink()
    if break_it == "broken config":
        (directory / "config.json").write_text("{")
    assert why in str(refuse(source, directory))


def test_refusals_name_the_model_as_the_caller_did(source: BaseModelSource, models: Path) -> None:
    aliased = BaseModelSource(models / "cache", allowed_local_roots=[models])
    directory = build_tiny_causal_model(models / "code")
    (models / "alias").symlink_to(directory)
    (directory / "model.safetensors").unlink()
    assert str(directory) not in str(refuse(aliased, models / "alias"))


def test_asking_about_models_loads_no_torch() -> None:
    import subprocess

    code = (
        "import sys; from pathlib import Path; from server.basemodels.sources import BaseModelSource;"
        f"s = BaseModelSource(Path('/nowhere')); s.check('{MINI_LM}'); s.is_present('{MINI_LM}'); s.resolve('{MINI_LM}');"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Hub(BaseHTTPRequestHandler):
    """A hub of our own, which answers as the real one does to models that are missing or gated."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").split("?")[0]
        code, header = {"nobody/none": (404, "RepoNotFound"), "somebody/gated": (403, "GatedRepo")}.get(name, (200, ""))
        self.send_response(code)
        self.send_header("X-Error-Code", header)
        self.end_headers()
        self.wfile.write(json.dumps({"id": name, "siblings": []}).encode())

    def log_message(self, *arguments: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_check_asks_the_hub_about_a_model_that_is_not_cached(tmp_path: Path, hub: str) -> None:
    source = BaseModelSource(tmp_path, hub_endpoint=hub)
    source.check("somebody/open")
    with pytest.raises(NotFound, match="nobody/none"):
        source.check("nobody/none")
    with pytest.raises(BaseModelUnavailable, match="HF_TOKEN"):
        source.check("somebody/gated")


def test_a_hub_out_of_reach_is_named_as_the_reason(tmp_path: Path) -> None:
    with pytest.raises(BaseModelUnavailable, match="hub cannot be reached"):
        BaseModelSource(tmp_path, hub_endpoint="http://127.0.0.1:9").check("nobody/none")
