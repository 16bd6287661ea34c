"""Learned factors on keys, values and feed-forward activations (Liu et al. 2022)."""

from peft import IA3Config
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING, TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
from transformers import PreTrainedModel

from server.training.techniques.targets import add_adapter, list_linears
from server.training.techniques.trained import Trained

# How families name what gives keys and values, and the last layer of a feed-forward block.
KEY_VALUE_NAMES = ("k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv")
FEED_FORWARD_NAMES = ("down_proj", "dense_4h_to_h", "fc2", "fc_out", "c_proj", "w2")


def train_ia3(model: PreTrainedModel) -> Trained:
    """Scale what peft knows to scale in this family, else layers with the usual names."""
    family = model.config.get_text_config().model_type
    targets = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(family)
    feed_forward = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(family)
    if targets is None or feed_forward is None:
        names = {name.rpartition(".")[2] for name in list_linears(model)}
        feed_forward = [name for name in FEED_FORWARD_NAMES if name in names]
        targets = [name for name in KEY_VALUE_NAMES if name in names] + feed_forward
    config = IA3Config(target_modules=list(targets), feedforward_modules=list(feed_forward), task_type="CAUSAL_LM")
    return Trained(add_adapter(model, config, tuple(targets)))
