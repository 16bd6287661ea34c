"""Learned orthogonal blocks that turn the inputs of linear layers (Qiu et al. 2023)."""

from peft import OFTConfig
from transformers import PreTrainedModel

from server.domain.techniques import ALL_LINEAR, Oft
from server.training.techniques.targets import add_adapter
from server.training.techniques.trained import Trained


def train_oft(model: PreTrainedModel, technique: Oft) -> Trained:
    """Turn blocks of `block_size` inputs; where a layer's inputs are no multiple of it, peft takes the nearest size that fits."""
    return Trained(add_adapter(model, OFTConfig(oft_block_size=technique.block_size, target_modules=ALL_LINEAR, task_type="CAUSAL_LM")))
