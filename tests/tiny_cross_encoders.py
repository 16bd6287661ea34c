"""Tiny cross-encoders made on the spot: BERT and XLM-R with one label, random ones or one that counts a word."""

# ruff: noqa: S106 -- tokens of a tokenizer, not of a door

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from tests.tiny_models import CORPUS

MAX_TOKENS = 64
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def build_tiny_cross_encoder(
    directory: Path, family: str = "bert", *, labels: int = 1, activation: str = "", counted_word: str = "", seed: int = 0
) -> Path:
    """Save a one-layer cross-encoder. With `counted_word` (BERT only) the score grows with the word's share of the pair's tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _build_tokenizer(family)
    tokenizer.save_pretrained(directory)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _build_model(family, len(tokenizer), labels)
    if counted_word:
        assert isinstance(model, BertForSequenceClassification)
        _count(model, tokenizer.get_vocab()[counted_word])
    model.save_pretrained(directory)
    if activation:
        config = json.loads((directory / "config.json").read_text())
        config["sentence_transformers"] = {"activation_fn": activation}
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def _build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1" if family == "bert" else "[CLS] $A [SEP] [SEP] $B [SEP]"
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if family == "bert" else [])]
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=MAX_TOKENS, model_input_names=names,
    )  # fmt: skip


def _build_model(family: str, vocabulary: int, labels: int) -> BertForSequenceClassification | XLMRobertaForSequenceClassification:
    names = {place: f"LABEL_{place}" for place in range(labels)}
    if family == "bert":
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=vocabulary, id2label=names, max_position_embeddings=MAX_TOKENS, initializer_range=0.5,
                hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            )
        )  # fmt: skip
    config = XLMRobertaConfig(
        vocab_size=vocabulary, id2label=names, max_position_embeddings=MAX_TOKENS + 1, pad_token_id=0, type_vocab_size=1,
        initializer_range=0.5, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
    )  # fmt: skip
    return XLMRobertaForSequenceClassification(config)


@torch.no_grad()
def _count(model: BertForSequenceClassification, token_id: int) -> None:
    """Set weights by hand: equal attention gives the first token the mean of all, of which the first number marks the word."""
    for weight in model.parameters():
        weight.zero_()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.fill_(1.0)
        if name.endswith(("attention.self.value", "attention.output.dense", "pooler.dense")):
            module.weight.copy_(torch.eye(32))
    words = model.bert.embeddings.word_embeddings.weight
    words[:, 1] = 1.0  # all words alike but for this one, and none all zero, which LayerNorm could not tell apart
    words[token_id] = 0.0
    words[token_id, 0] = 1.0
    model.classifier.weight[0, 0] = 1.0
