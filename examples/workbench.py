"""What the demo's chapters share: uploading, starting and following jobs, and remembering what was made so that all of it is deleted."""

import time
from contextlib import suppress

from examples.rest import DemoFailure, Json, Rest
from examples.screen import Screen, duration

RECONNECTS = 5
# A model may be deleted once its cancelled job has let go of it.
LET_GO_SECONDS = 20.0


class Workbench:
    """One run's resources."""

    def __init__(self, rest: Rest, screen: Screen) -> None:
        self.rest = rest
        self.screen = screen
        self._made: list[str] = []
        self._open_jobs: set[str] = set()

    def upload(self, name: str, body: bytes) -> str:
        """Upload JSONL records, demand that each one was taken, and give the dataset's id."""
        dataset = self.rest.upload("/datasets", body, display_name=f"Sanmara {name}")
        self._made.append(f"/datasets/{dataset['dataset_id']}")
        lines = body.count(b"\n")
        if dataset["record_count"] != lines or dataset["invalid_record_count"]:
            raise DemoFailure(f"Of the {lines} records in {name}.jsonl the service took {dataset['record_count']}: {dataset['findings']}")
        self.screen.line(f"{name:<14} {lines:>4} records   {dataset['dataset_id']}")
        return str(dataset["dataset_id"])

    def create(self, path: str, body: Json) -> tuple[str, str]:
        """Create a model with its job. Give the ids of both."""
        created = self.rest.post(path, body)
        model_id, job_id = str(created["model"]["model_id"]), str(created["training_job"]["job_id"])
        self._made.append(f"/models/{model_id}")
        self._open_jobs.add(job_id)
        self.screen.line(f"model {model_id}   job {job_id}")
        return model_id, job_id

    def watch(self, job_id: str, expected_state: str, after_sequence: int = 0) -> Json:
        """Follow a job to its end, taking up a cut stream after the last event seen. Give the job as it ended."""
        seen = after_sequence
        for _ in range(RECONNECTS):
            for event in self.rest.stream("GET", f"/training-jobs/{job_id}/watch", after_sequence=str(seen)):
                seen = max(seen, event["sequence"])
                self._show(event)
                if "finished" in event:
                    return self._finish(event["finished"]["job"], expected_state)
        raise DemoFailure(f"The stream of job {job_id} was cut {RECONNECTS} times before it said `finished`.")

    def wait_for_first_step(self, job_id: str) -> None:
        """Return once the job has done a step."""
        for event in self.rest.stream("GET", f"/training-jobs/{job_id}/watch"):
            if "step" in event:
                self.screen.line(f"RUNNING, step {event['step']['step']} of {event['step']['total_steps']}")
                return
            if "finished" in event:
                raise DemoFailure(f"The job {job_id} ended {event['finished']['job']['state']} before it could be cancelled.")
        raise DemoFailure(f"The stream of job {job_id} ended before its first step.")

    def delete_everything(self) -> None:
        """Delete what was made, the last first, and demand that it is gone."""
        while self._made:
            path = self._made.pop()
            self.rest.delete(path)
            if not self.rest.is_missing(path):
                raise DemoFailure(f"{path} was deleted and is still there.")
            self.screen.line(f"gone: {path}")

    def abandon(self) -> None:
        """After a failure, stop what runs and delete what can be deleted; the failure itself is what is reported."""
        for job_id in self._open_jobs:
            with suppress(DemoFailure):
                self.rest.post(f"/training-jobs/{job_id}/cancel", {})
        deadline = time.monotonic() + LET_GO_SECONDS
        for path in reversed(self._made):
            while not self._deleted(path) and time.monotonic() < deadline:
                time.sleep(0.5)

    def _deleted(self, path: str) -> bool:
        with suppress(DemoFailure):
            self.rest.delete(path)
            return True
        return False

    def _finish(self, job: Json, expected_state: str) -> Json:
        self._open_jobs.discard(job["job_id"])
        if job["state"] != expected_state:
            why = (job.get("error") or {}).get("message") or job["state_reason"] or "no reason given"
            raise DemoFailure(f"The job {job['job_id']} ended {job['state']}, not {expected_state}: {why}")
        return job

    def _show(self, event: Json) -> None:
        if step := event.get("step"):
            done = f"step {step['step']}/{step['total_steps']}  loss {step['loss']:.3f}  {step['tokens_per_second']:.0f} tokens/s"
            self.screen.bar(step["step"] / step["total_steps"], f"{done}  {duration(step['eta_seconds'])} left")
        elif evaluation := event.get("evaluation"):
            self.screen.line(f"held-out loss after step {evaluation['step']}: {evaluation['eval_loss']:.3f}")
        elif document := event.get("document_indexed"):
            done, total = document["documents_done"], document["documents_total"]
            self.screen.bar(done / total, f"{done} of {total} documents")
        elif change := event.get("state_changed"):
            self.screen.line(f"{change['to_state'].removeprefix('STATE_')} {change['reason']}".rstrip())
        elif warning := event.get("warning"):
            self.screen.line(f"warning: {warning['message']}")
