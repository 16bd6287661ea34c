"""Tiny random models with the architectures of the big ones, made on the spot and saved as a hub download would lie on disk."""

import json
from collections.abc import Mapping
from pathlib import Path

# ruff: noqa: S106 -- tokens of a tokenizer, not of a door
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CORPUS = (
    "The river town keeps its maps in a blue house near the old bridge.",
    "Who keeps the maps? The keeper of the blue house keeps them, every day but Friday.",
    "A question has an answer; an answer has an end. Hello, how are you today?",
    "في المدينة بيت أزرق تحفظ فيه الخرائط قرب الجسر القديم.",
)
CONTEXT_TOKENS = 512

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INSTRUCTIONS = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('System role not supported') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role'])"
    " + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
OPEN_ENDED = (  # closes no turn, as Falcon's instruct models were prompted
    "{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# family: special tokens (bos, eos, pad; pad None as in the published tokenizers), whether plain text gets a BOS, chat template
FAMILIES: dict[str, tuple[str | None, str, str | None, bool, str]] = {
    "llama": ("<|im_start|>", "<|im_end|>", None, False, CHATML),
    "mistral": ("<s>", "</s>", None, True, INSTRUCTIONS),
    "falcon": (None, "<|endoftext|>", None, False, OPEN_ENDED),
    "qwen2": (None, "<|im_end|>", "<|endoftext|>", False, CHATML),
    "gemma": ("<bos>", "<eos>", "<pad>", True, GEMMA),
}
# Architectures beside those: the same tests run over them where an architecture matters, not where a tokenizer does.
MORE_FAMILIES: dict[str, tuple[str | None, str, str | None, bool, str]] = {
    "falcon40": FAMILIES["falcon"],
    "qwen3": FAMILIES["qwen2"],
    "gemma2": FAMILIES["gemma"],
    "gemma3": FAMILIES["gemma"],
    "phi": (None, "<|endoftext|>", None, False, CHATML),
    "phi3": ("<s>", "<|endoftext|>", "<pad>", False, CHATML),
    "gpt_neox": (None, "<|endoftext|>", None, False, CHATML),
}
ALL_FAMILIES = FAMILIES | MORE_FAMILIES
EXTRA_SPECIAL_TOKENS = {
    **{family: ["<|im_start|>"] for family in ("qwen2", "qwen3", "phi", "phi3", "gpt_neox")},
    **{family: ["<start_of_turn>", "<end_of_turn>"] for family in ("gemma", "gemma2", "gemma3")},
}


def build_tiny_causal_model(directory: Path, family: str = "llama", chat_template: bool = True, seed: int = 0, **changes: object) -> Path:
    """Save a two-layer random causal model of a family with a byte-level tokenizer; the same seed gives the same weights.

    `changes` are options of its config.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _build_tokenizer(family)
    if chat_template:
        tokenizer.chat_template = ALL_FAMILIES[family][4]
    tokenizer.save_pretrained(directory)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _build_model(family, tokenizer, changes)
    model.save_pretrained(directory)
    return directory


def _build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    bos, eos, pad, adds_bos, _ = ALL_FAMILIES[family]
    special = [token for token in (pad, bos, eos, *EXTRA_SPECIAL_TOKENS.get(family, [])) if token]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if adds_bos and bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=CONTEXT_TOKENS
    )


def _build_model(family: str, tokenizer: PreTrainedTokenizerFast, changes: Mapping[str, object]) -> PreTrainedModel:
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    grouped = {"num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": CONTEXT_TOKENS}
    builders: dict[str, tuple[type[PreTrainedModel], type[PreTrainedConfig], Mapping[str, object]]] = {
        "llama": (LlamaForCausalLM, LlamaConfig, {**grouped, "tie_word_embeddings": True}),
        "mistral": (MistralForCausalLM, MistralConfig, grouped),
        "falcon": (FalconForCausalLM, FalconConfig, {"multi_query": True, "parallel_attn": True, "bias": False, "alibi": False}),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config, grouped),
        "gemma": (GemmaForCausalLM, GemmaConfig, {**grouped, "head_dim": 16}),
        "falcon40": (FalconForCausalLM, FalconConfig, {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False, "alibi": False}),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**grouped, "head_dim": 16}),
        "gemma2": (Gemma2ForCausalLM, Gemma2Config, {**grouped, "head_dim": 16, "sliding_window": 16}),
        "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {**grouped, "head_dim": 16, "sliding_window": 16}),
        "phi": (PhiForCausalLM, PhiConfig, grouped),
        "phi3": (Phi3ForCausalLM, Phi3Config, grouped),
        "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {"intermediate_size": 128, "max_position_embeddings": CONTEXT_TOKENS}),
    }
    model_class, config_class, extra = builders[family]
    return model_class(config_class(**{**common, **extra, **changes}))


def build_tiny_embedding_model(directory: Path, dimension: int = 32, max_tokens: int = 64, seed: int = 0) -> Path:
    """Save a BERT-like Sentence Transformers directory: a one-layer random encoder, mean pooling, L2 normalisation."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.decoder = decoders.WordPiece()
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        model_max_length=max_tokens,
    )  # fmt: skip
    fast.save_pretrained(directory)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = BertModel(
            BertConfig(
                vocab_size=len(fast), hidden_size=dimension, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                max_position_embeddings=max_tokens,
            )
        )  # fmt: skip
    encoder.save_pretrained(directory)
    _write_sentence_transformers_files(directory, dimension, max_tokens)
    return directory


def _write_sentence_transformers_files(directory: Path, dimension: int, max_tokens: int) -> None:
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    rows = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(modules)
    ]
    (directory / "modules.json").write_text(json.dumps(rows))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_tokens, "do_lower_case": False}))
    for path, _ in modules[1:]:
        (directory / path).mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": dimension, "pooling_mode_mean_tokens": True})
    )
