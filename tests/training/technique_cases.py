"""Every technique in a small size, and a bare loop to train it by, for the tests of techniques and families."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from server.basemodels.loading import load_causal_model, load_tokenizer
from server.basemodels.quantization import dequantize_in_place
from server.basemodels.sources import ResolvedModel, SourceKind
from server.datafiles.tokens import TokenizedRecords
from server.domain.techniques import (
    AdaLora,
    FullTechnique,
    Ia3,
    LayerNormTuning,
    LoraInitialization,
    LoraTechnique,
    Oft,
    PrefixTuning,
    PromptTuning,
    PTuning,
    QloraTechnique,
    Quantization,
    Technique,
    Vera,
)
from server.storage.artefacts import Artefact, ArtefactStore
from server.training.artefact import save_result
from server.training.batches import MicroBatch, make_micro_batch
from server.training.network import Network
from server.training.optimiser import make_optimiser
from server.training.techniques.apply import apply_technique
from server.training.techniques.trained import Trained
from tests.training.building import make_parameters

CASES: dict[str, Technique] = {
    "full": FullTechnique(),
    "lora": LoraTechnique(rank=4),
    "lora with dropout": LoraTechnique(rank=4, dropout=0.2),
    "rank-stabilised lora": LoraTechnique(rank=4, rank_stabilized=True),
    "dora": LoraTechnique(rank=4, dora=True),
    "pissa": LoraTechnique(rank=4, initialization=LoraInitialization.PISSA),
    "olora": LoraTechnique(rank=4, initialization=LoraInitialization.OLORA),
    "eva": LoraTechnique(rank=4, initialization=LoraInitialization.EVA),
    "qlora": QloraTechnique(LoraTechnique(rank=4)),
    "qlora in fp4": QloraTechnique(LoraTechnique(rank=4), quantization=Quantization.FP4, double_quantization=False),
    "qdora": QloraTechnique(LoraTechnique(rank=4, dora=True)),
    "loftq": QloraTechnique(LoraTechnique(rank=4, initialization=LoraInitialization.LOFTQ)),
    "prompt tuning": PromptTuning(virtual_tokens=5, initial_text="Who keeps the maps?"),
    "p-tuning": PTuning(virtual_tokens=5),
    "prefix tuning": PrefixTuning(virtual_tokens=5),
    "ia3": Ia3(),
    "adalora": AdaLora(initial_rank=6, target_rank=3),
    "vera": Vera(rank=16),
    "oft": Oft(block_size=8),
    "layer norm tuning": LayerNormTuning(),
}
TOTAL_STEPS = 8
LENGTHS = (40, 9, 23, 64, 5, 31, 17, 12)


def make_records(vocabulary: int, lengths: Sequence[int] = LENGTHS) -> TokenizedRecords:
    """Make records of random tokens, the second half of each trained."""
    records = TokenizedRecords()
    generator = torch.Generator().manual_seed(1)
    for length in lengths:
        ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
        records.append(ids, tuple(place >= length // 2 for place in range(length)))
    return records


@dataclass(slots=True)
class Session:
    """A technique applied to a freshly loaded model, and an optimiser."""

    trained: Trained
    network: Network
    optimiser: torch.optim.Optimizer
    batch: MicroBatch

    @classmethod
    def open(
        cls, directory: Path, technique: Technique, *, seed: int = 3, dtype: torch.dtype = torch.float32, packing: bool = True
    ) -> "Session":
        """Load and apply."""
        model = load_causal_model(directory, dtype=dtype)
        records = make_records(model.config.get_text_config().vocab_size)
        batch = make_micro_batch(records, range(len(records)))
        trained = apply_technique(
            model, technique, seed=seed, total_steps=TOTAL_STEPS, probe=lambda: [batch], tokenizer=load_tokenizer(directory),
            base_directory=directory,
        )  # fmt: skip
        optimiser = make_optimiser(trained.parameters.values(), make_parameters())
        return cls(trained, Network(trained.model, packing=packing), optimiser, batch)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Give those of the mean loss."""
        self.optimiser.zero_grad()
        (self.network.sum_loss(self.batch) / self.batch.trained_count).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return {name: p.grad.clone() for name, p in self.trained.parameters.items() if p.grad is not None}

    def train(self, steps: Iterable[int]) -> list[float]:
        """Do steps, numbered from 1; give their losses."""
        losses = []
        self.network.model.train()
        for step in steps:
            loss = self.network.sum_loss(self.batch) / self.batch.trained_count
            losses.append(loss.item())
            penalty = self.trained.penalty()
            (loss if penalty is None else loss + penalty).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self.optimiser.step()
            self.trained.after_step(step)
            self.optimiser.zero_grad()
        self.network.model.eval()
        return losses

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """Give the logits of the batch at its predictors, [N, V]."""
        self.network.model.eval()
        if not self.network.packed:
            return self.network._logits_one_by_one(self.batch)
        logits: torch.Tensor = self.network._head()(self.network._hide_packed(self.batch))
        return logits

    def save(self, store: ArtefactStore, path: str, base: Path) -> Artefact:
        """Write the result."""
        resolved = ResolvedModel(str(base), "revision", base, SourceKind.LOCAL)
        return save_result(store, path, self.trained, load_tokenizer(base), resolved, {"technique": "any"})


@torch.no_grad()
def logits_of_plain_libraries(artefact: Artefact, base: Path, batch: MicroBatch, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Load a result by nothing but transformers and peft, on the weights it belongs to; give its logits at the predictors, [N, V]."""
    model = AutoModelForCausalLM.from_pretrained(artefact.directory if artefact.description["kind"] == "model" else base, dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    if quantization := artefact.description["quantization"]:
        dequantize_in_place(model, Quantization(str(quantization)), bool(artefact.description["double_quantization"]))
    tuned = model if artefact.description["kind"] == "model" else PeftModel.from_pretrained(model, str(artefact.directory))
    tuned.eval()
    records = [tuned(input_ids=ids[None]).logits[0, -len(ids) :] for ids in torch.split(batch.token_ids, list(batch.lengths))]
    return torch.cat(records)[batch.predictors]
