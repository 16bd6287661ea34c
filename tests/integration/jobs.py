"""Jobs as a REST user makes and follows them, and what the database knows about them."""

import json
from collections.abc import Iterator
from typing import Any

import httpx

from tests.e2e.stack import Stack

TERMINAL = {"STATE_SUCCEEDED", "STATE_FAILED", "STATE_CANCELLED"}
RECORDS = [
    {"prompt": f"Who keeps map {number}?", "completion": f" The keeper of house {number}, near the old bridge."} for number in range(40)
]


class TrainingJobs:
    """The jobs of one stack."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def create(self, max_steps: int, checkpoint_every_steps: int = 20, batch_size: int = 8) -> dict[str, Any]:
        """Start a fine-tuning of the tiny model; give its model and job."""
        body = {
            "display_name": "Keeper of maps",
            "base_model": self.stack.make_tiny_model(),
            "inline_records": RECORDS,
            "eval_fraction": 0.1,
            "lora": {"rank": 4},
            "parameters": {
                "max_steps": max_steps,
                "batch_size": batch_size,
                "checkpointing": {"every_steps": checkpoint_every_steps},
                "evaluation": {"every_steps": checkpoint_every_steps},
            },
        }
        return self._post("/models/fine-tune", body)

    def create_job(self, max_steps: int) -> str:
        """Start one; give the job's id."""
        return str(self.create(max_steps)["training_job"]["job_id"])

    def create_index_job(self, documents: int, words: int) -> str:
        """Start to index so many documents; give the job's id."""
        texts = [
            {"text": f"Document {number}. " + "The keeper of the blue house keeps the maps. " * (words // 9)} for number in range(documents)
        ]
        body = {
            "display_name": "Maps",
            "generator_model_id": self.stack.make_tiny_model(),
            "embedding_model": "sentence-transformers/all-MiniLM-L6-v2",
            "documents": texts,
        }
        return str(self._post("/models/rag", body)["training_job"]["job_id"])

    def read(self, job_id: str) -> dict[str, Any]:
        """Read a job."""
        response = httpx.get(f"{self.stack.api}/training-jobs/{job_id}", timeout=30)
        response.raise_for_status()
        job: dict[str, Any] = response.json()
        return job

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel a job; give it as it stands then."""
        return self._post(f"/training-jobs/{job_id}/cancel", {})

    def pause(self, job_id: str) -> dict[str, Any]:
        """Pause a job; give it as it stands then."""
        return self._post(f"/training-jobs/{job_id}/pause", {})

    def resume(self, job_id: str) -> dict[str, Any]:
        """Resume a job; give it as it stands then."""
        return self._post(f"/training-jobs/{job_id}/resume", {})

    def retry(self, job_id: str) -> dict[str, Any]:
        """Try a job again; give the job that does."""
        return self._post(f"/training-jobs/{job_id}/retry", {})

    def list_attempts(self, job_id: str) -> list[dict[str, Any]]:
        """List the attempts at a job, latest first."""
        return self._list(job_id, "attempts")

    def list_checkpoints(self, job_id: str) -> list[dict[str, Any]]:
        """List a job's checkpoints, latest first."""
        return self._list(job_id, "checkpoints")

    def _list(self, job_id: str, what: str) -> list[dict[str, Any]]:
        response = httpx.get(f"{self.stack.api}/training-jobs/{job_id}/{what}", timeout=30)
        assert response.is_success, response.text
        found: list[dict[str, Any]] = response.json().get(what, [])
        return found

    def wait_for_state(self, job_id: str, *states: str, seconds: float = 240) -> dict[str, Any]:
        """Wait until the job is in one of the states."""
        self.stack.wait_until(lambda: self._is_in(job_id, states), seconds)
        return self.read(job_id)

    def wait_for_end(self, job_id: str, seconds: float = 240) -> dict[str, Any]:
        """Wait until the job is finished."""
        return self.wait_for_state(job_id, *TERMINAL, seconds=seconds)

    def wait_for_step(self, job_id: str, step: int) -> None:
        """Wait until a step is logged."""

        def is_there() -> bool:
            # From the database: the api may be away, and the job goes on meanwhile.
            [(state, done)] = self.stack.query("SELECT state, (progress->>'step')::int FROM jobs WHERE job_id = %s", job_id)
            assert f"STATE_{state}" not in TERMINAL, f"{job_id} was {state} before it was seen at step {step}"
            return bool(done >= step)

        self.stack.wait_until(is_there)

    def _is_in(self, job_id: str, states: tuple[str, ...]) -> bool:
        job = self._try_read(job_id)
        assert job is None or job["state"] not in TERMINAL - set(states), job
        return job is not None and job["state"] in states

    def _try_read(self, job_id: str) -> dict[str, Any] | None:
        """Read a job; None while the api is away."""
        try:
            return self.read(job_id)
        except httpx.HTTPError:
            return None

    def watch(self, job_id: str, after_sequence: int = 0) -> Iterator[dict[str, Any]]:
        """Follow a job through REST to the end of the stream."""
        url, parameters = f"{self.stack.api}/training-jobs/{job_id}/watch", {"after_sequence": after_sequence}
        with httpx.stream("GET", url, params=parameters, timeout=120) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def assert_whole_log(self, job_id: str, steps: int) -> None:
        """Demand that the stored log has no gap and each step once, in order."""
        rows = self.stack.query("SELECT sequence, kind, step FROM job_events WHERE job_id = %s ORDER BY sequence", job_id)
        assert [row[0] for row in rows] == list(range(1, len(rows) + 1))
        assert [row[2] for row in rows if row[1] == "step"] == list(range(1, steps + 1))
        for kind in ("evaluation", "checkpoint"):
            logged = [row[2] for row in rows if row[1] == kind]
            assert logged == sorted(set(logged)), f"{kind}: {logged}"

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = httpx.post(self.stack.api + path, json=body, timeout=60)
        assert response.is_success, response.text
        answer: dict[str, Any] = response.json()
        return answer
