"""Starting a fine-tuning from the weights of a version: which one, whether it fits, and that it stays until the job has it."""

from dataclasses import asdict, replace

from server.domain.errors import FailedPrecondition, NotFound
from server.domain.specs import VersionReference
from server.domain.techniques import LoraInitialization, LoraTechnique, PromptTuning, QloraTechnique, Technique
from server.services.ports import Transaction
from server.services.validation import Violations

FIELD = "warm_start_from"


async def find_warm_start(
    transaction: Transaction, found: Violations, asked: VersionReference | None, base_model: str, technique: Technique
) -> VersionReference | None:
    """Resolve a reference to a concrete version, that which serves where none is named. Notes what does not fit under its field."""
    if asked is None:
        return None
    if not asked.model_id:
        found.add(f"{FIELD}.model_id", "is required")
        return None
    try:
        model = await transaction.models.get(asked.model_id)
        if asked.version is None and model.serving_version is None:
            found.add(f"{FIELD}.model_id", "has no version to start from yet")
            return None
        version = await transaction.models.get_version(asked.model_id, asked.version or model.serving_version or 0)
    except NotFound as error:
        found.add(f"{FIELD}.{'version' if error.data.reason == 'MODEL_VERSION_NOT_FOUND' else 'model_id'}", str(error))
        return None
    if base_model and version.base_model != base_model:
        found.add(FIELD, f"was trained from {version.base_model}, not from {base_model}: its weights fit no other base model")
    trained = version.spec.technique if version.spec else LoraTechnique()
    if difference := _compare(trained, technique):
        found.add(FIELD, f"was trained in another way, so its weights do not fit: {difference}")
    return VersionReference(version.model_id, version.version)


async def hold_warm_start(transaction: Transaction, start: VersionReference | None, target_id: str | None) -> None:
    """Lock the start's model, and the target's with it, so that the version stays until the job that uses it is stored.

    Raises FailedPrecondition where it is gone.
    """
    if start is None:
        return
    try:
        # Always in the same order, or two that start from one another would wait for ever.
        for model_id in sorted({start.model_id, target_id or start.model_id}):
            await transaction.models.get(model_id, lock=True)
        await transaction.models.get_version(start.model_id, start.version or 0)
    except NotFound as error:
        raise FailedPrecondition(
            "The version to start from was deleted.", reason="WARM_START_GONE", metadata={"model_id": start.model_id}
        ) from error


def _compare(trained: Technique, asked: Technique) -> str:
    """Tell how two techniques differ in what their weights mean; empty where they do not."""
    if trained.kind != asked.kind:
        return f"by {trained.kind}, not by {asked.kind}"
    before, now = asdict(_shape(trained)), asdict(_shape(asked))
    if isinstance(trained, QloraTechnique):
        before, now = {**before, **before.pop("lora")}, {**now, **now.pop("lora")}
    return ", ".join(f"{name} {_show(before[name])}, not {_show(now[name])}" for name in before if before[name] != now[name])


def _shape(technique: Technique) -> Technique:
    """Leave out what decides neither the weights' shapes nor what they mean."""
    match technique:
        case LoraTechnique():
            return replace(technique, dropout=0.0, initialization=LoraInitialization.STANDARD)
        case QloraTechnique():
            lora = replace(technique.lora, dropout=0.0, initialization=LoraInitialization.STANDARD)
            return replace(technique, lora=lora, compute_type=None)
        case PromptTuning():
            return replace(technique, initial_text="")
        case _:
            return technique


def _show(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
