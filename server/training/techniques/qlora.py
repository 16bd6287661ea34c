"""LoRA on weights held in 4 bits (Dettmers et al. 2023). Serving and merging use the weights that 4 bits keep of the base's."""

import torch
from torch import nn
from transformers import PreTrainedModel

from server.basemodels.quantization import QuantizedLinear, quantize
from server.domain.jobs import FailureReason, JobFailure
from server.domain.techniques import ComputeType, LoraInitialization, QloraTechnique
from server.training.techniques.factors import Factors
from server.training.techniques.initialization import factor_principal
from server.training.techniques.lora import Probe, lora_layers, make_config, set_factors, start_from_inputs
from server.training.techniques.targets import add_adapter
from server.training.techniques.trained import Trained

COMPUTE_DTYPES = {None: None, ComputeType.BFLOAT16: torch.bfloat16, ComputeType.FLOAT32: torch.float32}


def train_qlora(model: PreTrainedModel, technique: QloraTechnique, probe: Probe, seed: int) -> Trained:
    """Hold the linear layers in 4 bits and put adapters beside them."""
    lora = technique.lora
    errors: dict[str, Factors] = {}

    def note_error(name: str, layer: nn.Linear, quantized: QuantizedLinear) -> None:
        """LoftQ (Li et al. 2023) with one iteration: the adapter starts as the best approximation of what 4 bits lose."""
        error = layer.weight.detach().float() - quantized.dequantize().float()
        scaling = lora.alpha / (lora.rank**0.5 if lora.rank_stabilized else lora.rank)
        errors[name] = factor_principal(error, lora.rank, scaling)

    note = note_error if lora.initialization is LoraInitialization.LOFTQ else None
    try:
        quantize(model, technique.quantization, technique.double_quantization, COMPUTE_DTYPES[technique.compute_type], note)
    except ValueError as error:
        raise JobFailure(FailureReason.BASE_MODEL_UNAVAILABLE, str(error), "Choose lora, or another base model.") from error
    adapted = add_adapter(model, make_config(lora), lora.target_modules)
    for name, layer in lora_layers(adapted).items():
        if name in errors:
            set_factors(layer, errors[name])
    if lora.initialization is LoraInitialization.EVA:
        start_from_inputs(adapted, lora.rank, probe(), seed)
    trained = Trained(adapted)
    trained.quantization, trained.double_quantization = technique.quantization, technique.double_quantization
    return trained
