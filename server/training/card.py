"""The model card: the README.md of a version and of its exports, in the hub's form. Facts in, text out; it knows no files.

The same facts always give the same text, so that an artefact's hash depends on nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from server.domain.catalogue import find_base_model
from server.domain.specs import FineTuneSpec
from server.domain.techniques import FullTechnique, LoraTechnique, QloraTechnique, TechniqueFamily
from server.services.codec import Codec

CARD_NAME = "README.md"

# The hub's own identifiers of licences, https://huggingface.co/docs/hub/repositories-licenses; any other is "other" with its name.
_HUB_LICENSES: Mapping[str, str] = {
    "Apache-2.0": "apache-2.0",
    "MIT": "mit",
    "Llama 2 Community License": "llama2",
    "Llama 3 Community License": "llama3",
    "Llama 3.1 Community License": "llama3.1",
    "Llama 3.2 Community License": "llama3.2",
    "Llama 3.3 Community License": "llama3.3",
    "Gemma Terms of Use": "gemma",
    "Gemma": "gemma",
    "TII Falcon LLM License 2.0": "falcon-llm-license",
}


class CardForm(StrEnum):
    """What the card lies beside."""

    ADAPTER = "ADAPTER"  # a peft directory
    MODEL = "MODEL"  # a whole transformers directory, every weight trained
    MERGED = "MERGED"  # the same, an adapter merged into its base


@dataclass(frozen=True, slots=True)
class CardFacts:
    """All that a card tells. `metrics` and `library_versions` by name; records are counted after what the checks left out."""

    form: CardForm
    spec: FineTuneSpec
    job_id: str
    base_revision: str
    checkpoint_step: int = 0
    train_records: int = 0
    eval_records: int = 0
    trained_tokens: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    library_versions: Mapping[str, str] = field(default_factory=dict)
    template_sha256: str = ""


# For the manifest of a version, from where its export takes them: `CARD_FACTS.encode(facts).decode()` is one line of JSON.
CARD_FACTS = Codec[CardFacts](CardFacts)


def write_model_card(facts: CardFacts) -> str:
    """Write the card: YAML front matter as the hub reads it, then Markdown for people."""
    parts = (
        _write_front_matter(facts),
        f"# {_title(facts)}",
        _write_summary(facts),
        _write_table("Trained on", _list_data(facts)),
        _write_table("How", _list_configuration(facts)),
        _write_table("Metrics", [(name, f"{value:.6g}") for name, value in sorted(facts.metrics.items())]),
        _write_table("Made with", sorted(facts.library_versions.items())),
        f"## How to load it\n\n```python\n{_write_loading(facts)}\n```",
        _write_limits(facts),
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _write_front_matter(facts: CardFacts) -> str:
    entry = find_base_model(facts.spec.base_model)
    lines = [f"base_model: {_quote(facts.spec.base_model)}", f"base_model_relation: {_relation(facts)}"]
    lines.append(f"library_name: {'peft' if facts.form is CardForm.ADAPTER else 'transformers'}")
    lines.append("pipeline_tag: text-generation")
    if entry:
        known = _HUB_LICENSES.get(entry.license)
        lines += [f"license: {known}"] if known else ["license: other", f"license_name: {_quote(entry.license)}"]
        lines += ["language:", *(f"  - {_quote(language)}" for language in entry.languages)]
    lines += ["tags:", *(f"  - {_quote(tag)}" for tag in _list_tags(facts))]
    return "\n".join(("---", *lines, "---"))


def _relation(facts: CardFacts) -> str:
    return {CardForm.ADAPTER: "adapter", CardForm.MODEL: "finetune", CardForm.MERGED: "merge"}[facts.form]


def _list_tags(facts: CardFacts) -> Sequence[str]:
    technique = facts.spec.technique
    kinds = {technique.kind, technique.family.lower(), facts.spec.parameters.objective.lower()}
    return sorted(kind.replace("_", "-") for kind in kinds)


def _title(facts: CardFacts) -> str:
    what = {CardForm.ADAPTER: "adapter for", CardForm.MODEL: "fine-tuned", CardForm.MERGED: "adapter merged into"}[facts.form]
    return f"{_technique_name(facts)} {what} {facts.spec.base_model}"


def _technique_name(facts: CardFacts) -> str:
    technique = facts.spec.technique
    names = {TechniqueFamily.FULL: "Fully", TechniqueFamily.LORA: "LoRA", TechniqueFamily.QLORA: "QLoRA"}
    return names.get(technique.family, technique.kind.replace("_", " ").capitalize())


def _write_summary(facts: CardFacts) -> str:
    entry = find_base_model(facts.spec.base_model)
    of_license = f" The base model's licence ({entry.license}) holds for this model too." if entry else ""
    unknown = "" if entry else " The base model's licence holds for this model too; it is not known here."
    return (
        f"Made by the fine-tuning job `{facts.job_id}` from `{facts.spec.base_model}` at revision `{facts.base_revision}`, "
        f"with the weights after optimiser step {facts.checkpoint_step}.{of_license}{unknown}"
    )


def _list_data(facts: CardFacts) -> list[tuple[str, str]]:
    spec = facts.spec
    rows = [("dataset", spec.dataset_id), ("SHA-256 of its bytes", spec.dataset_sha256), ("records trained on", f"{facts.train_records:,}")]
    rows += [("tokens trained on", f"{facts.trained_tokens:,}")] if facts.trained_tokens else []
    if spec.eval_dataset_id:
        rows.append(("evaluation dataset", spec.eval_dataset_id))
    if facts.eval_records:
        rows.append(("records held out", f"{facts.eval_records:,}"))
    if spec.warm_start_from:
        rows.append(("weights started from", f"{spec.warm_start_from.model_id} version {spec.warm_start_from.version}"))
    rows += [("SHA-256 of the chat template", facts.template_sha256)] if facts.template_sha256 else []
    return rows


def _list_configuration(facts: CardFacts) -> list[tuple[str, str]]:
    codec = Codec[FineTuneSpec](FineTuneSpec)
    content = codec.to_json(facts.spec)
    shape = [(f"technique.{name}", value) for name, value in _flatten("", content["technique"]) if name != "kind"]
    return [("technique", facts.spec.technique.kind), *shape, *_flatten("", content["parameters"])]


def _flatten(prefix: str, content: Mapping[str, object]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in content.items():
        if isinstance(value, dict):
            rows += _flatten(f"{prefix}{name}.", value)
        elif value is not None and name != "sample_prompts":
            rows.append((prefix + name, value if isinstance(value, str) else json.dumps(value)))
    return rows


def _write_table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = [f"| {_escape(name)} | {_escape(value)} |" for name, value in rows]
    return "\n".join((f"## {title}", "", "| | |", "|---|---|", *lines))


def _write_loading(facts: CardFacts) -> str:
    if facts.form is not CardForm.ADAPTER:
        return "\n".join(
            (
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                "",
                'model = AutoModelForCausalLM.from_pretrained("DIRECTORY")',
                'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")',
            )
        )
    revision = f", revision={_quote(facts.base_revision)}" if _is_commit(facts.base_revision) else ""
    return "\n".join(
        (
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({_quote(facts.spec.base_model)}{revision})",
            'model = PeftModel.from_pretrained(base, "DIRECTORY")',
            'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")',
        )
    )


def _write_limits(facts: CardFacts) -> str:
    technique = facts.spec.technique
    limits = ["It knows what its base model knew, biases and errors included; fine-tuning on few records narrows what it does well."]
    limits.append(f"Records had at most {facts.spec.parameters.max_sequence_tokens:,} tokens; longer conversations were not trained.")
    if isinstance(technique, QloraTechnique):
        limits.append(
            f"It was trained on the base model's weights in 4 bits ({technique.quantization.value}"
            f"{', doubly quantised' if technique.double_quantization else ''}): beside unquantised weights it answers a little differently."
        )
    if not facts.eval_records:
        limits.append("No records were held out: its metrics say nothing about texts that it has not seen.")
    if not isinstance(technique, (FullTechnique, LoraTechnique, QloraTechnique)) and facts.form is CardForm.ADAPTER:
        limits.append("It needs peft to be loaded; not every server of models takes this kind of adapter.")
    return "\n".join(("## Limits", "", *(f"- {limit}" for limit in limits)))


def _is_commit(revision: str) -> bool:
    return len(revision) == 40 and all(character in "0123456789abcdef" for character in revision)


def _quote(text: str) -> str:
    """Write a text as JSON, which YAML and Python read alike."""
    return json.dumps(text, ensure_ascii=False)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
