"""Loads a model whose linear layers go into 4 bits as they are read, tensor by tensor: its 16-bit weights are never in memory as a whole.

transformers reads the files, with its renamings and checks; this tells it, through its port for quantizers, what becomes of each weight.
"""

import ctypes
import mmap
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from server.basemodels.quantization import FourBits, QuantizedLinear, replace_linears

METHOD = "held_in_four_bits"
_MADV_DONTNEED = 4  # <sys/mman.h>


class FourBitLoading(QuantizationConfigMixin):
    """What from_pretrained takes as its quantization_config: how weights are held, and where."""

    def __init__(self, held: FourBits, device: torch.device) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' own ones are an enumeration
        self.held = held
        self.device = device


class _FourBitQuantizer(HfQuantizer):
    """Has each linear layer's weight quantised when it is read."""

    quantization_config: FourBitLoading
    is_trainable = True

    def is_serializable(self) -> bool:
        """Nothing is saved in this form."""
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: object) -> PreTrainedModel:
        replace_linears(model, self.quantization_config.held)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: object) -> bool:
        """Tell whether it is such a weight."""
        path = param_name.rpartition(".")[0]
        return param_name.endswith(".weight") and isinstance(model.get_submodule(path), QuantizedLinear)

    def get_quantize_ops(self) -> ConversionOps:
        """Give what is done with the weight."""
        return _Quantize(self.quantization_config)


class _Quantize(ConversionOps):
    def __init__(self, config: FourBitLoading) -> None:
        self._config = config

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **others: Any
    ) -> dict[str, list[torch.Tensor]]:
        """Let the layers take their weights; give what is kept of them."""
        model = cast(PreTrainedModel, others["model"])
        kept: dict[str, list[torch.Tensor]] = {}
        for name, found in input_dict.items():
            weight = found[0] if isinstance(found, list) else found
            path = name.rpartition(".")[0]
            layer = model.get_submodule(path)
            assert isinstance(layer, QuantizedLinear)
            layer.take(path, weight.to(self._config.device), self._config.held)
            layer._is_hf_initialized = True  # type: ignore[assignment]  # transformers' mark, without which it would draw random weights
            kept[name] = [layer.weight]
            _release_pages(weight)
        return kept


def _release_pages(weight: torch.Tensor) -> None:
    """Let go of the pages of a weight that is not needed any more: those of a mapped file would stay until the last of its tensors goes.

    Whole pages only: what is beside it may be needed.
    """
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return
    first = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (weight.data_ptr() + weight.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_DONTNEED)


def four_bit_loading(held: FourBits, device: torch.device) -> FourBitLoading:
    """Give the quantization_config for a model that is loaded in 4 bits onto a device."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, FourBitLoading)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, _FourBitQuantizer)
    return FourBitLoading(held, device)


def forget_quantizer(model: PreTrainedModel) -> None:
    """Take transformers' marks of a quantised model off: how the layers are held is their own affair."""
    cast(_FourBitQuantizer, model.hf_quantizer).remove_quantization_config(model)  # type: ignore[no-untyped-call]  # transformers'
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False
