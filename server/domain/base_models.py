"""The causal language models that this service promises, with what each one needs to be used well. Facts only.

Whether one can be loaded here is known elsewhere. Dimensions are those of the published configurations: a test builds each on torch's
meta device and compares the count of weights. Licences and gates are those of the hub's model cards.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from server.domain.shapes import (
    Dimensions,
    ModelShape,
    shape_falcon,
    shape_gemma2,
    shape_llama,
    shape_phi3,
    shape_qwen2,
    shape_qwen3,
)

# Bytes of a weight in bf16, in which base models are held.
BF16_BYTES = 2
LLAMA_2_LICENSE = "Llama 2 Community License"
LLAMA_3_LICENSE = "Llama 3 Community License"
LLAMA_31_LICENSE = "Llama 3.1 Community License"
LLAMA_32_LICENSE = "Llama 3.2 Community License"
LLAMA_33_LICENSE = "Llama 3.3 Community License"
GEMMA_LICENSE = "Gemma Terms of Use"
QWEN_LICENSE = "Qwen License"
QWEN_RESEARCH_LICENSE = "Qwen Research License"

MISTRAL_GATE_NOTE = "The hub may ask an account to share its contact details before it hands the files out."
NO_CHAT_NOTE = "Not tuned to chat and without a chat template: fine-tune it, or continue a prompt."
NO_MISTRAL_13B_NOTE = "There is no public Mistral 13B: the name mistral-13b means this model, Mistral-Nemo with 12 billion weights."
SMOLLM_NOTE = "Installed with the service, from a 4-bit file: small enough for two CPU cores, made for trying things out."
REVISION_RULE = "the newest commit of the hub's main branch when it is first loaded here; kept from then on and named by every version"


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A causal language model. `languages` are BCP 47 codes; `revision` says which commit of the hub is taken."""

    base_model_id: str
    aliases: tuple[str, ...]
    display_name: str
    family: str
    shape: ModelShape
    context_tokens: int
    license: str
    gated: bool
    chat: bool
    languages: tuple[str, ...]
    note: str = ""
    revision: str = REVISION_RULE

    @property
    def parameter_count(self) -> int:
        """How many weights it has."""
        return self.shape.parameter_count

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Names of its linear layers, the head left out."""
        return tuple(linear.name for linear in self.shape.linears)

    @property
    def size_bytes(self) -> int:
        """The size of the weights in bf16."""
        return self.parameter_count * BF16_BYTES


@dataclass(frozen=True, slots=True)
class _Line:
    """What the models of one product line share."""

    family: str
    layout: Callable[[Dimensions], ModelShape]
    license: str
    gated: bool
    context_tokens: int
    languages: tuple[str, ...] = ("en",)

    def model(self, name: str, aliases: tuple[str, ...], shown: str, of: Dimensions, *, chat: bool, note: str = "") -> BaseModel:
        """Describe one of them."""
        said = " ".join(part for part in (note, "" if chat else NO_CHAT_NOTE) if part)
        shape = self.layout(of)
        return BaseModel(
            name, aliases, shown, self.family, shape, self.context_tokens, self.license, self.gated, chat, self.languages, said
        )

    def pair(self, name: str, suffix: str, alias: str, shown: str, of: Dimensions, *others: str) -> Iterator[BaseModel]:
        """Describe a model and its chat version, whose name has `suffix` at its end."""
        yield self.model(name, (alias, *others), shown, of, chat=False)
        tuned = suffix.strip("-").lower()
        chat_aliases = tuple(f"{each}-{tuned}" for each in (alias, *others))
        yield self.model(f"{name}{suffix}", chat_aliases, f"{shown} {tuned.capitalize()}", of, chat=True)


_EUROPEAN = ("en", "de", "fr", "it", "pt", "hi", "es", "th")
_MANY = ("zh", "en", "ar", "fr", "de", "es", "it", "pt", "ru", "ja", "ko", "mul")
_NEMO = ("en", "fr", "de", "es", "it", "pt", "zh", "ja", "ko", "ar", "hi")

_SMOLLM2 = _Line("llama", shape_llama, "Apache-2.0", False, 8_192)
_MISTRAL = _Line("mistral", shape_llama, "Apache-2.0", True, 32_768)
_NEMO_LINE = _Line("mistral", shape_llama, "Apache-2.0", True, 131_072, _NEMO)
_LLAMA_2 = _Line("llama", shape_llama, LLAMA_2_LICENSE, True, 4_096)
_LLAMA_3 = _Line("llama", shape_llama, LLAMA_3_LICENSE, True, 8_192)
_LLAMA_31 = _Line("llama", shape_llama, LLAMA_31_LICENSE, True, 131_072, _EUROPEAN)
_LLAMA_32 = _Line("llama", shape_llama, LLAMA_32_LICENSE, True, 131_072, _EUROPEAN)
_LLAMA_33 = _Line("llama", shape_llama, LLAMA_33_LICENSE, True, 131_072, _EUROPEAN)
_FALCON_7B = _Line("falcon", shape_falcon, "Apache-2.0", False, 2_048, ("en", "fr"))
_FALCON_40B = _Line("falcon", shape_falcon, "Apache-2.0", False, 2_048, ("en", "de", "es", "fr"))
_QWEN_25 = _Line("qwen2", shape_qwen2, "Apache-2.0", False, 32_768, _MANY)
_QWEN_25_3B = _Line("qwen2", shape_qwen2, QWEN_RESEARCH_LICENSE, False, 32_768, _MANY)
_QWEN_25_72B = _Line("qwen2", shape_qwen2, QWEN_LICENSE, False, 32_768, _MANY)
_QWEN_3 = _Line("qwen3", shape_qwen3, "Apache-2.0", False, 40_960, _MANY)
_GEMMA_2 = _Line("gemma2", shape_gemma2, GEMMA_LICENSE, True, 8_192)
_PHI_3 = _Line("phi3", shape_phi3, "MIT", False, 4_096)
_PHI_4 = _Line("phi3", shape_phi3, "MIT", False, 16_384)
_ALLAM = _Line("llama", shape_llama, "Apache-2.0", False, 4_096, ("ar", "en"))

_MISTRAL_7B = Dimensions(32, 4_096, 14_336, 32, 8, 32_768)
_NEMO_12B = Dimensions(40, 5_120, 14_336, 32, 8, 131_072, head_size=128)
_LLAMA_8B = Dimensions(32, 4_096, 14_336, 32, 8, 128_256)
_LLAMA_70B = Dimensions(80, 8_192, 28_672, 64, 8, 128_256)


def _list_smollm2() -> Iterator[BaseModel]:
    packaged = Dimensions(30, 576, 1_536, 9, 3, 49_152, tied=True)
    aliases = ("smollm2-135m-instruct", "smollm2-135m", "smollm2")
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    yield _SMOLLM2.model(name, aliases, "SmolLM2 135M Instruct", packaged, chat=True, note=SMOLLM_NOTE)
    sizes = (
        ("360M", Dimensions(32, 960, 2_560, 15, 5, 49_152, tied=True)),
        ("1.7B", Dimensions(24, 2_048, 8_192, 32, 32, 49_152, tied=True)),
    )
    for size, of in sizes:
        yield from _SMOLLM2.pair(f"HuggingFaceTB/SmolLM2-{size}", "-Instruct", f"smollm2-{size.lower()}", f"SmolLM2 {size}", of)


def _list_mistral() -> Iterator[BaseModel]:
    for chat in (False, True):
        tuned, end, shown = ("-Instruct", "-instruct", " Instruct") if chat else ("", "", "")
        yield _MISTRAL.model(
            f"mistralai/Mistral-7B{tuned}-v0.3", (f"mistral-7b{end}",), f"Mistral 7B{shown}", _MISTRAL_7B, chat=chat, note=MISTRAL_GATE_NOTE
        )
    for chat in (False, True):
        tuned, end, shown = ("Instruct", "-instruct", " Instruct") if chat else ("Base", "", "")
        aliases = tuple(f"{stem}{end}" for stem in ("mistral-13b", "mistral-12b", "mistral-nemo"))
        note = f"{NO_MISTRAL_13B_NOTE} {MISTRAL_GATE_NOTE}"
        yield _NEMO_LINE.model(f"mistralai/Mistral-Nemo-{tuned}-2407", aliases, f"Mistral-Nemo 12B{shown}", _NEMO_12B, chat=chat, note=note)


def _list_llama() -> Iterator[BaseModel]:
    llama_2 = (
        ("7b", Dimensions(32, 4_096, 11_008, 32, 32, 32_000)),
        ("13b", Dimensions(40, 5_120, 13_824, 40, 40, 32_000)),
        ("70b", Dimensions(80, 8_192, 28_672, 64, 8, 32_000)),
    )
    for size, of in llama_2:
        for chat in (False, True):
            suffix, shown = ("-chat", " Chat") if chat else ("", "")
            aliases = tuple(f"{stem}-{size}{suffix}" for stem in ("llama", "llama-2", "llama2"))
            yield _LLAMA_2.model(f"meta-llama/Llama-2-{size}{suffix}-hf", aliases, f"LLaMA 2 {size.upper()}{shown}", of, chat=chat)
    yield from _LLAMA_3.pair("meta-llama/Meta-Llama-3-8B", "-Instruct", "llama-3-8b", "Llama 3 8B", _LLAMA_8B, "llama3-8b")
    yield from _LLAMA_3.pair("meta-llama/Meta-Llama-3-70B", "-Instruct", "llama-3-70b", "Llama 3 70B", _LLAMA_70B, "llama3-70b")
    yield from _LLAMA_31.pair("meta-llama/Llama-3.1-8B", "-Instruct", "llama-3.1-8b", "Llama 3.1 8B", _LLAMA_8B, "llama-8b")
    yield from _LLAMA_31.pair("meta-llama/Llama-3.1-70B", "-Instruct", "llama-3.1-70b", "Llama 3.1 70B", _LLAMA_70B)
    small = (
        ("1B", Dimensions(16, 2_048, 8_192, 32, 8, 128_256, tied=True)),
        ("3B", Dimensions(28, 3_072, 8_192, 24, 8, 128_256, tied=True)),
    )
    for size, of in small:
        yield from _LLAMA_32.pair(f"meta-llama/Llama-3.2-{size}", "-Instruct", f"llama-3.2-{size.lower()}", f"Llama 3.2 {size}", of)
    yield _LLAMA_33.model(
        "meta-llama/Llama-3.3-70B-Instruct", ("llama-3.3-70b-instruct", "llama-3.3-70b"), "Llama 3.3 70B Instruct", _LLAMA_70B, chat=True
    )


def _list_falcon() -> Iterator[BaseModel]:
    lines = (
        (_FALCON_7B, "7b", Dimensions(32, 4_544, 18_176, 71, 1, 65_024, tied=True)),
        (_FALCON_40B, "40b", Dimensions(60, 8_192, 32_768, 128, 8, 65_024, tied=True)),
    )
    for line, size, of in lines:
        yield from line.pair(f"tiiuae/falcon-{size}", "-instruct", f"falcon-{size}", f"Falcon {size.upper()}", of)


def _list_qwen() -> Iterator[BaseModel]:
    qwen_25 = (
        (_QWEN_25, "0.5B", Dimensions(24, 896, 4_864, 14, 2, 151_936, tied=True)),
        (_QWEN_25, "1.5B", Dimensions(28, 1_536, 8_960, 12, 2, 151_936, tied=True)),
        (_QWEN_25_3B, "3B", Dimensions(36, 2_048, 11_008, 16, 2, 151_936, tied=True)),
        (_QWEN_25, "7B", Dimensions(28, 3_584, 18_944, 28, 4, 152_064)),
        (_QWEN_25, "14B", Dimensions(48, 5_120, 13_824, 40, 8, 152_064)),
        (_QWEN_25, "32B", Dimensions(64, 5_120, 27_648, 40, 8, 152_064)),
        (_QWEN_25_72B, "72B", Dimensions(80, 8_192, 29_568, 64, 8, 152_064)),
    )
    for line, size, of in qwen_25:
        yield from line.pair(f"Qwen/Qwen2.5-{size}", "-Instruct", f"qwen2.5-{size.lower()}", f"Qwen2.5 {size}", of)
    qwen_3 = (
        ("0.6B", Dimensions(28, 1_024, 3_072, 16, 8, 151_936, head_size=128, tied=True)),
        ("1.7B", Dimensions(28, 2_048, 6_144, 16, 8, 151_936, head_size=128, tied=True)),
        ("4B", Dimensions(36, 2_560, 9_728, 32, 8, 151_936, head_size=128, tied=True)),
        ("8B", Dimensions(36, 4_096, 12_288, 32, 8, 151_936, head_size=128)),
    )
    for size, of in qwen_3:
        yield _QWEN_3.model(f"Qwen/Qwen3-{size}", (f"qwen3-{size.lower()}",), f"Qwen3 {size}", of, chat=True)


def _list_others() -> Iterator[BaseModel]:
    gemma_2 = (
        ("2b", Dimensions(26, 2_304, 9_216, 8, 4, 256_000, head_size=256, tied=True)),
        ("9b", Dimensions(42, 3_584, 14_336, 16, 8, 256_000, head_size=256, tied=True)),
    )
    for size, of in gemma_2:
        yield from _GEMMA_2.pair(f"google/gemma-2-{size}", "-it", f"gemma-2-{size}", f"Gemma 2 {size.upper()}", of)
    phi_3 = Dimensions(32, 3_072, 8_192, 32, 32, 32_064)
    aliases = ("phi-3-mini", "phi-3-mini-4k-instruct")
    yield _PHI_3.model("microsoft/Phi-3-mini-4k-instruct", aliases, "Phi-3 mini 4k Instruct", phi_3, chat=True)
    yield _PHI_4.model("microsoft/phi-4", ("phi-4",), "Phi-4 14B", Dimensions(40, 5_120, 17_920, 40, 10, 100_352), chat=True)
    allam = Dimensions(32, 4_096, 11_008, 32, 32, 64_000)
    yield _ALLAM.model(
        "ALLaM-AI/ALLaM-7B-Instruct-preview", ("allam-7b", "allam-7b-instruct"), "ALLaM 7B Instruct", allam, chat=True,
        note="Made for Arabic and English.",
    )  # fmt: skip


BASE_MODELS: Sequence[BaseModel] = (
    *_list_smollm2(), *_list_mistral(), *_list_llama(), *_list_falcon(), *_list_qwen(), *_list_others(),
)  # fmt: skip
