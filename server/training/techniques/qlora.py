"""LoRA on weights held in 4 bits (Dettmers et al. 2023). Serving and merging use the weights that 4 bits keep of the base's."""

from functools import partial
from typing import cast

import torch
from transformers import PreTrainedModel

from server.basemodels.quantization import FourBits, QuantizedLinear, is_quantized, quantize
from server.domain.jobs import FailureReason, JobFailure
from server.domain.techniques import ComputeType, LoraInitialization, LoraTechnique, QloraTechnique
from server.training.techniques.factors import Factors
from server.training.techniques.initialization import factor_principal
from server.training.techniques.lora import Probe, lora_layers, make_config, set_factors, start_from_inputs
from server.training.techniques.targets import add_adapter
from server.training.techniques.trained import Trained

COMPUTE_DTYPES = {None: None, ComputeType.BFLOAT16: torch.bfloat16, ComputeType.FLOAT32: torch.float32}


def hold_in_four_bits(technique: QloraTechnique) -> FourBits:
    """Say how the technique holds the base model's layers."""
    compute_dtype = COMPUTE_DTYPES[technique.compute_type]
    note = partial(_note_error, technique.lora) if technique.lora.initialization is LoraInitialization.LOFTQ else None
    return FourBits(technique.quantization, technique.double_quantization, compute_dtype, note)


def _note_error(lora: LoraTechnique, _: str, weight: torch.Tensor, quantized: QuantizedLinear) -> None:
    """LoftQ (Li et al. 2023) with one iteration: the adapter starts as the best approximation of what 4 bits lose."""
    error = weight.float() - quantized.dequantize().float()
    scaling = lora.alpha / (lora.rank**0.5 if lora.rank_stabilized else lora.rank)
    quantized.noted = factor_principal(error, lora.rank, scaling)


def train_qlora(model: PreTrainedModel, technique: QloraTechnique, probe: Probe, seed: int) -> Trained:
    """Put adapters beside the linear layers in 4 bits, into which those of a model that was loaded whole are brought first."""
    lora = technique.lora
    if not is_quantized(model):
        try:
            quantize(model, hold_in_four_bits(technique))
        except ValueError as error:
            raise JobFailure(FailureReason.BASE_MODEL_UNAVAILABLE, str(error), "Choose lora, or another base model.") from error
    adapted = add_adapter(model, make_config(lora), lora.target_modules)
    for layer in lora_layers(adapted).values():
        quantized = layer.get_base_layer()
        if isinstance(quantized, QuantizedLinear) and quantized.noted is not None:
            set_factors(layer, cast(Factors, quantized.noted))
            quantized.noted = None
    if lora.initialization is LoraInitialization.EVA:
        start_from_inputs(adapted, lora.rank, probe(), seed)
    trained = Trained(adapted)
    trained.quantization, trained.double_quantization = technique.quantization, technique.double_quantization
    return trained
