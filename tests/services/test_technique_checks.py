"""Techniques that make no sense are refused at creation, alone or together with parameters, with the reason."""

import pytest

from server.domain.specs import ParametersRequest
from server.domain.techniques import (
    AdaLora,
    FullTechnique,
    Ia3,
    LoraInitialization,
    LoraTechnique,
    Oft,
    PrefixTuning,
    PromptTuning,
    PTuning,
    QloraTechnique,
    Technique,
    Vera,
)
from server.services.technique_checks import check_technique
from server.services.validation import Violations

START = LoraInitialization


def violations(technique: Technique, **parameters: int) -> dict[str, str]:
    found = Violations()
    check_technique(found, technique, ParametersRequest(**parameters))  # type: ignore[arg-type]  # plain test data
    return {violation.field: violation.description for violation in found.found}


@pytest.mark.parametrize(
    "technique",
    [FullTechnique(), LoraTechnique(), QloraTechnique(), PromptTuning(), PTuning(), PrefixTuning(), Ia3(), AdaLora(), Vera(), Oft()],
)
def test_defaults_are_fine(technique: Technique) -> None:
    assert violations(technique) == {}


@pytest.mark.parametrize(
    ("technique", "field"),
    [
        (LoraTechnique(rank=0), "lora.rank"),
        (LoraTechnique(target_modules=("q_proj",) * 65), "lora.target_modules"),
        (QloraTechnique(LoraTechnique(alpha=0)), "qlora.lora.alpha"),
        (PromptTuning(0), "peft.prompt_tuning.virtual_tokens"),
        (PTuning(encoder_hidden_size=0), "peft.p_tuning.encoder_hidden_size"),
        (PrefixTuning(513), "peft.prefix_tuning.virtual_tokens"),
        (AdaLora(initial_rank=4, target_rank=8), "peft.adalora.target_rank"),
        (Vera(0), "peft.vera.rank"),
        (Oft(1), "peft.oft.block_size"),
    ],
)
def test_a_number_out_of_range_is_named_by_its_path(technique: Technique, field: str) -> None:
    assert list(violations(technique)) == [field]


@pytest.mark.parametrize(
    ("technique", "reason"),
    [
        (LoraTechnique(initialization=START.LOFTQ), "qlora"),
        (QloraTechnique(LoraTechnique(initialization=START.PISSA)), "4 bits"),
        (QloraTechnique(LoraTechnique(initialization=START.OLORA)), "4 bits"),
        (LoraTechnique(dora=True, initialization=START.EVA), "dora"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(technique: Technique, reason: str) -> None:
    ((field, description),) = violations(technique).items()
    assert field.endswith("lora.initialization")
    assert reason in description


def test_virtual_tokens_leave_room_for_records() -> None:
    assert "records need room" in violations(PrefixTuning(32), max_sequence_tokens=32)["peft.prefix_tuning.virtual_tokens"]
    assert violations(PrefixTuning(31), max_sequence_tokens=32) == {}
