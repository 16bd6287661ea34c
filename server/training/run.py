"""One fine-tuning job from order to result. Knows files, models and events; no database, no worker."""

import gc
import time
from collections.abc import Callable

import torch

from server.basemodels.errors import BaseModelRefused, BaseModelUnavailable
from server.basemodels.sources import BaseModelSource
from server.childprocess import Signals, measure_peak_memory
from server.datafiles.tokencache import TokenCache
from server.domain.errors import NotFound
from server.domain.events import ChildEvent, Finalizing, Paused, ResultReady, Warned
from server.domain.jobs import FailureReason, JobFailure
from server.domain.orders import FineTuneOrder
from server.storage.artefacts import ArtefactInvalid, ArtefactStore, DiskFull
from server.training.artefact import describe_libraries, save_result, try_result
from server.training.card import CardFacts, CardForm
from server.training.checkpoint import Position
from server.training.loop import train
from server.training.preparation import Attempt, Prepared, prepare
from server.training.signals import PauseAsked, Stopped
from server.training.state import Run


def run_fine_tune(
    order: FineTuneOrder,
    store: ArtefactStore,
    source: BaseModelSource,
    emit: Callable[[ChildEvent], None],
    signals: Signals,
    cache: TokenCache | None = None,
) -> None:
    """Do the job of the order; returns early once a signal says so. Raises JobFailure for what cannot work.

    Told to stop it saves nothing; told to pause it saves what it has trained and says Paused.
    """
    began = time.perf_counter()
    try:
        attempt = Attempt(order, store, source.resolve(order.spec.base_model), emit, signals, cache)
        prepared = prepare(attempt)
        train(prepared.run, prepared.position)
        _warn_without_gain(prepared.position, emit)
        emit(Finalizing())
        emit(_finish(attempt, prepared, began))
    except Stopped:
        return
    except PauseAsked:
        emit(Paused())
    except (BaseModelUnavailable, BaseModelRefused, NotFound) as error:
        raise JobFailure(
            FailureReason.BASE_MODEL_UNAVAILABLE, str(error), "Choose another base model, or make this one loadable here."
        ) from error
    except DiskFull as error:
        raise JobFailure(FailureReason.DISK_FULL, str(error), "Free space under MODEL_STORAGE_PATH, then start the job again.") from error
    except ArtefactInvalid as error:
        raise JobFailure(FailureReason.ARTIFACT_INVALID, str(error), "Start the job again; look at the disk if this repeats.") from error


def _warn_without_gain(position: Position, emit: Callable[[ChildEvent], None]) -> None:
    start, best = position.start_loss, position.best_loss
    if start is not None and best is not None and best >= start:
        emit(Warned("NO_IMPROVEMENT", f"No evaluation was better than the one before training ({start:.4g}); the best was {best:.4g}."))


def _finish(attempt: Attempt, prepared: Prepared, began: float) -> ResultReady:
    """Write the result, of the best weights where the job keeps them, and try it."""
    order, base = attempt.order, attempt.base
    run, position = prepared.run, prepared.position
    step = prepared.checkpoints.restore_best(position) if order.spec.parameters.keep_best else position.step
    metrics = _collect_metrics(position)
    card = _describe(attempt, run, position, step, metrics)
    facts = {"technique": order.spec.technique.kind, "steps": step, "tokens": position.tokens, **describe_libraries()}
    artefact = save_result(attempt.store, order.artifact_path, run.trained, prepared.tokenizer, base, facts, card)
    # The trial loads the base model afresh: two of them need not fit into memory.
    dtype, device = prepared.dtype, prepared.device
    del run, prepared.run, prepared.checkpoints
    gc.collect()
    effect = try_result(artefact, base.directory, dtype, device)
    return ResultReady(
        artifact_path=order.artifact_path,
        manifest_sha256=artefact.manifest_sha256,
        size_bytes=artefact.size_bytes,
        base_revision=base.revision,
        metrics=metrics | {"effect_largest_logit_difference": effect.largest, "effect_mean_logit_difference": effect.mean},
        compute_seconds=time.perf_counter() - began,
        peak_memory_bytes=measure_peak_memory(),
        peak_device_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        checkpoint_step=step,
        library_versions=card.library_versions,
        template_sha256=str(artefact.description["template_sha256"]),
    )


def _collect_metrics(position: Position) -> dict[str, float]:
    """Give what training measured, by name; what it did not measure is left out."""
    measured = {
        "train_loss": position.loss,
        "start_eval_loss": position.start_loss,
        "best_eval_loss": position.best_loss,
        "best_eval_step": float(position.best_step) if position.best_loss is not None else None,
        "steps": float(position.step),
        "tokens": float(position.tokens),
        "trained_tokens": float(position.trained_tokens),
    }
    return {name: value for name, value in measured.items() if value is not None}


def _describe(attempt: Attempt, run: Run, position: Position, step: int, metrics: dict[str, float]) -> CardFacts:
    """Gather what the model card tells."""
    return CardFacts(
        form=CardForm.ADAPTER if run.trained.kind == "adapter" else CardForm.MODEL,
        spec=attempt.order.spec,
        job_id=attempt.order.job_id,
        base_revision=attempt.base.revision,
        checkpoint_step=step,
        train_records=len(run.examples),
        eval_records=len(run.held_out),
        trained_tokens=position.trained_tokens,
        metrics=metrics,
        library_versions={name.removesuffix("_version"): str(version) for name, version in describe_libraries().items()},
    )
