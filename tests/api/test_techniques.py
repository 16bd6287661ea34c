"""Every technique crosses the wire whole, both ways."""

import pytest
from modeltraining.v1 import fine_tuning_pb2, model_service_pb2

from server.api.mappers import techniques
from server.domain.techniques import (
    AdaLora,
    ComputeType,
    FullTechnique,
    Ia3,
    LayerNormTuning,
    LoraInitialization,
    LoraTechnique,
    Oft,
    PrefixTuning,
    PromptTuning,
    PTuning,
    QloraTechnique,
    Quantization,
    Technique,
    Vera,
)
from server.services.validation import Violations


def named(found: Violations) -> list[str]:
    return [violation.field for violation in found.found]


EVERY_TECHNIQUE: tuple[Technique, ...] = (
    FullTechnique(),
    LoraTechnique(8, 4.0, 0.1, ("q_proj",), rank_stabilized=True, dora=True),
    LoraTechnique(initialization=LoraInitialization.PISSA),
    QloraTechnique(LoraTechnique(4), Quantization.FP4, False, ComputeType.FLOAT32),
    QloraTechnique(LoraTechnique(initialization=LoraInitialization.LOFTQ)),
    PromptTuning(7, "Be brief."),
    PTuning(8, 64),
    PTuning(),
    PrefixTuning(9),
    Ia3(),
    AdaLora(12, 6),
    Vera(32),
    Oft(16),
    LayerNormTuning(),
)


@pytest.mark.parametrize("technique", EVERY_TECHNIQUE, ids=str)
def test_every_technique_reads_back_as_it_was_written(technique: Technique) -> None:
    config = fine_tuning_pb2.FineTuneConfig()
    techniques.technique_to_proto(technique, config)
    name = config.WhichOneof("technique")
    assert name is not None
    request = model_service_pb2.CreateFineTunedModelRequest()
    getattr(request, name).CopyFrom(getattr(config, name))
    getattr(request, name).SetInParent()
    found = Violations()
    assert techniques.technique_from_proto(request, found) == technique
    assert named(found) == []


def test_a_peft_technique_without_a_method_is_refused() -> None:
    found = Violations()
    request = model_service_pb2.CreateFineTunedModelRequest()
    request.peft.SetInParent()
    assert techniques.technique_from_proto(request, found) is None
    assert named(found) == ["peft.method"]
