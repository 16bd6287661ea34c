"""The whole service for a benchmark: on free ports, in a directory of its own, given versions without training, its processes watched."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import psycopg
from modeltraining.v1 import inference_service_pb2 as pb
from modeltraining.v1.generation_pb2 import GenerationParameters
from modeltraining.v1.inference_service_pb2_grpc import InferenceServiceStub

from examples.run_demo import find_free_ports
from server.domain.ids import JOB, MODEL, new_id
from server.storage.artefacts import Artefact

START_SECONDS, STOP_SECONDS = 180.0, 60.0

INSERT_MODEL = """
    INSERT INTO models (organization, model_id, type, display_name, description, labels, state, base_model, technique, serving_version,
        create_time, update_time, last_version)
    VALUES ('default', %s, 'FINE_TUNED', 'benchmark', '', '{}', 'READY', %s, 'LORA', 1, now(), now(), 1)"""
INSERT_VERSION = """
    INSERT INTO model_versions (organization, model_id, version, job_id, base_model, base_revision, artifact_path, manifest_sha256,
        size_bytes, metrics, create_time, attempt, checkpoint_step, library_versions, template_sha256)
    VALUES ('default', %s, 1, %s, %s, '', %s, %s, %s, %s, now(), 1, 1, '{}', '')"""


@dataclass(frozen=True)
class Usage:
    """What a role's processes have used until now: processor seconds, and the peak memory of the first of them in bytes."""

    processor_seconds: float
    peak_bytes: int


class Service:
    """A running service. Its log lies in `directory`."""

    def __init__(self, directory: Path, cache: Path, variables: Mapping[str, str]) -> None:
        http_port, grpc_port = find_free_ports(2)
        self.target, self.storage, self._directory = f"127.0.0.1:{grpc_port}", directory / "models", directory
        own = {
            "DATA_DIRECTORY": str(directory / "data"),
            "MODEL_STORAGE_PATH": str(self.storage),
            "MODEL_CACHE_PATH": str(cache.resolve()),
            "HTTP_PORT": str(http_port),
            "GRPC_PORT": str(grpc_port),
            "LOG_LEVEL": "WARNING",
        }
        with (directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "server", "up"],
                env={**os.environ, **own, **variables},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_ready(self, model_id: str) -> None:
        """Wait until a model answers. Raises RuntimeError with the log's end where it does not."""
        end = time.monotonic() + START_SECONDS
        request = pb.GenerateRequest(model_id=model_id, prompt="A", parameters=GenerationParameters(max_tokens=1))
        with grpc.insecure_channel(self.target) as channel:
            generate = InferenceServiceStub(channel).Generate
            while time.monotonic() < end and self._process.poll() is None:
                try:
                    generate(request, timeout=START_SECONDS)
                    return
                except grpc.RpcError:
                    time.sleep(0.2)
        raise RuntimeError((self._directory / "log").read_text("utf-8", "replace")[-4000:])

    def stop(self) -> None:
        """Stop as Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_SECONDS)
        finally:
            self._process.kill()

    @property
    def sockets(self) -> Path:
        """Where the engines' sockets lie."""
        return self._directory / "data" / "run"

    def register(self, base_model: str, artefacts: Sequence[Artefact], count: int) -> Sequence[str]:
        """Make `count` fine-tuned models with a serving version each, over these artefacts in turn; give their ids."""
        names = [new_id(MODEL) for _ in range(count)]
        with psycopg.connect(f"postgresql://postgres@/postgres?host={self.sockets}/postgres") as connection:
            cursor = connection.cursor()
            cursor.executemany(INSERT_MODEL, [(name, base_model) for name in names])
            sealed = [(name, artefacts[place % len(artefacts)]) for place, name in enumerate(names)]
            cursor.executemany(
                INSERT_VERSION,
                [(name, new_id(JOB), base_model, each.path, each.manifest_sha256, each.size_bytes, "{}") for name, each in sealed],
            )
        return names

    def measure(self, role: str) -> Usage:
        """Say what a role (api, engine) has used, with everything that it started."""
        for process in psutil.Process(self._process.pid).children(recursive=True):
            if process.cmdline()[1:4] == ["-m", "server", role]:
                family = [process, *process.children(recursive=True)]
                times = [each.cpu_times() for each in family]
                return Usage(sum(used.user + used.system for used in times), _read_peak(process.pid))
        raise RuntimeError(f"no process of the role {role}")


@contextmanager
def run_service(directory: Path, cache: Path, model_id: str, variables: Mapping[str, str]) -> Iterator[Service]:
    """Give a service that has a model loaded, and runs until the end of the block."""
    service = Service(directory, cache, variables)
    try:
        service.wait_ready(model_id)
        yield service
    finally:
        service.stop()


def _read_peak(pid: int) -> int:
    """Read the largest resident size that a process ever had, in bytes (proc(5), VmHWM)."""
    lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
