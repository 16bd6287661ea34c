"""Tiny random encoders made on the spot as a hub download would lie on disk: XLM-R with a Unigram tokenizer (bge-m3's architecture)."""

# ruff: noqa: S106 -- tokens of a tokenizer, not of a door

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
CORPUS = (
    "The river town keeps its maps in a blue house near the old bridge.",
    "Who keeps the maps? The keeper of the blue house keeps them, every day but Friday.",
    "في المدينة بيت أزرق تحفظ فيه الخرائط قرب الجسر القديم، ومن يحفظها؟ حارس البيت.",
)
POSITIONS = 66  # 64 readable ones: the table begins behind the padding index


def build_tiny_xlm_roberta(directory: Path, pooling: str = "cls", modules: bool = True) -> Path:
    """Save a one-layer XLM-R; with `modules` as a Sentence Transformers directory with this pooling, else bare."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _build_tokenizer()
    tokenizer.save_pretrained(directory)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=POSITIONS, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        initializer_range=0.5,  # far from the usual 0.02, so that the first token's vector tells texts apart
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        XLMRobertaModel(config).save_pretrained(directory)
    if modules:
        write_modules(directory, ["Transformer", "Pooling", "Normalize"], {"pooling_mode_cls_token": True} if pooling == "cls" else {})
    return directory


def write_modules(directory: Path, kinds: list[str], pooling: dict[str, bool]) -> None:
    """Write the files that make a directory with a transformer one of Sentence Transformers."""
    rows = [
        {"idx": place, "name": str(place), "path": f"{place}_{kind}" if place else "", "type": f"sentence_transformers.models.{kind}"}
        for place, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(rows))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))
    for row in rows[1:]:
        (directory / str(row["path"])).mkdir(exist_ok=True)
    settings = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": not pooling, **pooling}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(settings))


def _build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL_TOKENS, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=tokenizer, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>", pad_token="<pad>",
        unk_token="<unk>",
    )  # fmt: skip
