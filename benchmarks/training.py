"""Training speed, memory and held-out loss: our whole job and TRL's SFTTrainer, each in a process of its own, on the same records.

    python -m benchmarks.training [--technique lora|qlora|full] [--steps 6] [--data ../shared/data/gsm8k/train.jsonl] [--only ours]

All train SmolLM2-135M-Instruct with the same adapter, sequence limit, records per step, number of steps and learning rate, on the
answers' tokens. TRL runs twice: at its defaults in bf16, and at the best settings that we know for it. A real token is no padding.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.childprocess import measure_peak_memory
from server.environment import TORCH_ENVIRONMENT

if TYPE_CHECKING:
    import torch

    from server.domain.events import ChildEvent
    from server.domain.orders import FineTuneOrder
    from server.domain.techniques import Technique

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
RANK = 16
ALPHA = 32
WARMUP_STEPS = 0  # the two libraries count warm-up steps differently; without any, both rates fall along the same line
LEARNING_RATES = {"lora": 5e-4, "qlora": 5e-4, "full": 5e-5}
SIDES = {"ours": "ours", "trl-default": "TRL, defaults", "trl-best": "TRL, at its best"}
CEILING_SIZE = 2048  # a square product of this size shows what the processor can do
Result = dict[str, float]


def main() -> None:
    """Parse, prepare the records, run all sides, print the table."""
    options = parse_options()
    if options.side:
        print(json.dumps(train_ours(options) if options.side == "ours" else train_trl(options)))
        return
    with tempfile.TemporaryDirectory() as directory:
        prepare_records(options, Path(directory))
        sides = [options.only] if options.only else list(SIDES)
        print_table(options, {side: run_side(side, Path(directory)) for side in sides})


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--technique", choices=tuple(LEARNING_RATES), default="lora")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="JSONL with question and answer")
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=16, help="records per optimiser step")
    parser.add_argument("--held-out", type=int, default=48, help="records that only the loss is measured on")
    parser.add_argument("--max-tokens", type=int, default=1024, help="sequence limit")
    parser.add_argument("--learning-rate", type=float, help="default: 5e-4, for full 5e-5")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's choice")
    parser.add_argument("--cache", type=Path, default=Path(".data/cache"), help="where converted weights are kept")
    parser.add_argument("--only", choices=tuple(SIDES), help="run one side")
    parser.add_argument("--side", choices=tuple(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--records", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.learning_rate = options.learning_rate or LEARNING_RATES[options.technique]
    return options


def prepare_records(options: argparse.Namespace, directory: Path) -> None:
    """Write the first records for training, the next ones as held out, as chat messages; convert the weights ahead."""
    from server.basemodels.sources import BaseModelSource

    BaseModelSource(options.cache).resolve(BASE_MODEL)
    wanted = options.steps * options.batch_size + options.held_out
    with options.data.open() as file:
        rows = [json.loads(line) for line, _ in zip(file, range(wanted), strict=False)]
    if len(rows) < wanted:
        sys.exit(f"{options.data} has {len(rows)} records, {wanted} are needed: lower --steps")
    chats = [{"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]} for row in rows]
    for name, part in (("held_out", chats[: options.held_out]), ("train", chats[options.held_out :])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in part))


def run_side(side: str, directory: Path) -> Result:
    """Run one side in a process of its own; its last line of output is its result."""
    print(f"training: {SIDES[side]} …", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:], "--side", side, "--records", str(directory)]
    # Ours runs as a worker's child does.
    environment = {**TORCH_ENVIRONMENT, **os.environ} if side == "ours" else dict(os.environ)
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment).stdout
    result: Result = json.loads(output.splitlines()[-1])
    return result


def train_ours(options: argparse.Namespace) -> Result:
    """Run our job as a worker's child does, from the order to the tried result; the clock runs from the first step to the last."""
    import torch

    from server.basemodels.sources import BaseModelSource
    from server.childprocess import Signals
    from server.domain.events import Started, StepDone
    from server.storage.artefacts import ArtefactStore
    from server.training.run import run_fine_tune

    if options.threads:
        torch.set_num_threads(options.threads)
    times: list[tuple[float, ChildEvent]] = []

    def emit(event: "ChildEvent") -> None:
        times.append((time.perf_counter(), event))
        print(event, file=sys.stderr)

    store = ArtefactStore(options.records)
    source = BaseModelSource(options.cache)
    never = Signals(should_stop=lambda: False, should_pause=lambda: False)
    run_fine_tune(make_order(options), store, source, emit, never)
    began = next(moment for moment, event in times if isinstance(event, Started))
    ended, last = next((moment, event) for moment, event in reversed(times) if isinstance(event, StepDone))
    assert isinstance(last, StepDone)
    peak_bytes = measure_peak_memory()
    model = load_result(options, store.locate("result"), source.resolve(BASE_MODEL).directory)
    return describe(options, model, last.tokens, ended - began, peak_bytes)


def make_order(options: argparse.Namespace) -> "FineTuneOrder":
    """Order the job: no evaluation, and no checkpoint before the last step."""
    from server.diskfiles import hash_file
    from server.domain.datasets import DatasetFormat, RecordKind
    from server.domain.orders import DatasetFile, FineTuneOrder
    from server.domain.specs import FineTuneSpec, OverlongPolicy, ParametersRequest, Scheduler
    from server.services.training_parameters import FineTuneDefaults, resolve_parameters

    records = options.steps * options.batch_size
    asked = ParametersRequest(
        max_steps=options.steps,
        scheduler=Scheduler.LINEAR,
        warmup_steps=WARMUP_STEPS,
        max_sequence_tokens=options.max_tokens,
        overlong_policy=OverlongPolicy.DROP,
        evaluate_every_steps=options.steps,
        checkpoint_every_steps=options.steps,
    )
    technique = make_technique(options.technique)
    parameters = resolve_parameters(asked, FineTuneDefaults(options.batch_size, options.learning_rate), technique, records)
    sha256 = hash_file(options.records / "train.jsonl")
    dataset = DatasetFile("train.jsonl", sha256, DatasetFormat.JSONL, RecordKind.CHAT, records)
    return FineTuneOrder("job", 1, FineTuneSpec(BASE_MODEL, "ds", sha256, technique, parameters), dataset, "job", "result")


def make_technique(name: str) -> "Technique":
    """Give the technique in the shape that both sides train."""
    from server.domain.techniques import FullTechnique, LoraTechnique, QloraTechnique

    lora = LoraTechnique(RANK, ALPHA)
    techniques: dict[str, Technique] = {"lora": lora, "qlora": QloraTechnique(lora), "full": FullTechnique()}
    return techniques[name]


def load_result(options: argparse.Namespace, directory: Path, base_directory: Path) -> Any:
    """Load the result as its users do: the whole model, or the adapter on the base that it was trained on."""
    from peft import PeftModel

    from server.basemodels.loading import load_causal_model, preferred_dtype
    from server.basemodels.quantization import dequantize_in_place
    from server.domain.techniques import Quantization

    if options.technique == "full":
        return load_causal_model(directory, dtype=preferred_dtype())
    base = load_causal_model(base_directory, dtype=preferred_dtype())
    if options.technique == "qlora":
        dequantize_in_place(base, Quantization.NF4, True)
    return PeftModel.from_pretrained(base, str(directory))


def train_trl(options: argparse.Namespace) -> Result:
    """Train by TRL's SFTTrainer: at its defaults, or without recomputed activations in micro-batches of 4."""
    import torch
    from datasets import Dataset  # type: ignore[import-untyped]  # ships no types
    from transformers import AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from server.basemodels.sources import BaseModelSource

    if options.threads:
        torch.set_num_threads(options.threads)
    directory = BaseModelSource(options.cache).resolve(BASE_MODEL).directory
    chats = [json.loads(line)["messages"] for line in (options.records / "train.jsonl").open()]
    best = options.side == "trl-best"
    micro_batch = min(4 if best else SFTConfig.per_device_train_batch_size, options.batch_size)
    trainer = SFTTrainer(
        model=load_for_trl(options, directory),
        processing_class=AutoTokenizer.from_pretrained(directory),
        # Prompt and completion: by default TRL trains the completion's tokens only.
        train_dataset=Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]),
        peft_config=make_peft_config(options.technique),
        args=SFTConfig(
            output_dir=str(options.records / "trl"),
            max_steps=options.steps,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=options.batch_size // micro_batch,
            learning_rate=options.learning_rate,
            warmup_steps=WARMUP_STEPS,
            max_length=options.max_tokens,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            include_num_input_tokens_seen="non_padding",
            save_strategy="no",
            report_to="none",
            seed=0,
            gradient_checkpointing=False if best else SFTConfig.gradient_checkpointing,
        ),
    )
    outcome = trainer.train()
    peak_bytes = measure_peak_memory()
    return describe(options, trainer.model, int(trainer.state.num_input_tokens_seen), float(outcome.metrics["train_runtime"]), peak_bytes)


def load_for_trl(options: argparse.Namespace, directory: Path) -> Any:
    """Load the base model as TRL's users do; full training in float32 under bf16 autocast.

    Weights in bf16 alone take less memory (5.58 GB) and do not learn: steps of this size are rounded away, held-out loss 1.297, not 1.123.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.float32 if options.technique == "full" else torch.bfloat16
    if options.technique != "qlora":
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    held = BitsAndBytesConfig(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=held)


def make_peft_config(technique: str) -> Any:
    """Give the same adapter for TRL; none for full training."""
    from peft import LoraConfig

    return None if technique == "full" else LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def describe(options: argparse.Namespace, model: Any, tokens: int, seconds: float, peak_bytes: int) -> Result:
    """Measure the held-out loss by the same code for all sides, and the processor's ceiling, after memory was taken."""
    loss = measure_loss(options, model)
    return {
        "tokens_per_second": tokens / seconds,
        "peak_bytes": peak_bytes,
        "loss": loss,
        "tokens": tokens,
        "seconds": seconds,
        "ceiling": measure_ceiling(),
    }


def measure_loss(options: argparse.Namespace, model: Any) -> float:
    """Give the mean loss per answer token of the held-out records: plain forward passes, one record at a time."""
    import torch
    from torch.nn.functional import cross_entropy

    from server.basemodels.loading import load_tokenizer
    from server.basemodels.sources import BaseModelSource
    from server.datafiles.preparation import Preparation, Rules
    from server.datafiles.reading import NumberedRecord
    from server.domain.record_forms import parse_record
    from server.domain.specs import LossOn, OverlongPolicy

    tokenizer = load_tokenizer(BaseModelSource(options.cache).resolve(BASE_MODEL).directory)
    preparation = Preparation(tokenizer, Rules(8192, OverlongPolicy.REJECT, LossOn.ASSISTANT, needs_pairs=False))
    model.eval()
    total, trained = 0.0, 0
    with torch.no_grad(), (options.records / "held_out.jsonl").open("rb") as lines:
        for line in lines:
            (sequence,) = preparation.prepare([NumberedRecord(1, 1, parse_record(line))])[0].sequences
            ids = torch.tensor(sequence.token_ids, device=model.device)[None]
            mask = torch.tensor(sequence.weights, device=model.device)[1:] > 0
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1][mask].float()
            total += float(cross_entropy(logits, ids[0, 1:][mask], reduction="sum"))
            trained += int(mask.sum())
    return total / trained


def measure_ceiling(repeats: int = 20) -> float:
    """Give the floating point operations per second of a bf16 matrix product."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(CEILING_SIZE, CEILING_SIZE, dtype=torch.bfloat16, device=device) for _ in range(2))

    def multiply(times: int) -> "torch.Tensor":
        for _ in range(times):
            product = a @ b
        return product.sum().cpu()

    multiply(3)
    began = time.perf_counter()
    multiply(repeats)
    return repeats * 2 * CEILING_SIZE**3 / (time.perf_counter() - began)


def print_table(options: argparse.Namespace, results: dict[str, Result]) -> None:
    """Print all sides, the ratios, and which share of the processor's ceiling the products alone would need."""
    from server.domain.catalogue import find_base_model
    from server.services.memory_model import estimate_flops_per_token

    known = find_base_model(BASE_MODEL)
    assert known is not None
    flops = estimate_flops_per_token(known.shape, make_technique(options.technique))
    print(
        f"{options.technique:17}{'real tokens/s':>14}{'of ceiling':>12}{'peak memory':>14}{'held-out loss':>15}{'tokens':>9}{'seconds':>9}"
    )
    for side, result in results.items():
        share = result["tokens_per_second"] * flops / result["ceiling"]
        print(
            f"{SIDES[side]:17}{result['tokens_per_second']:14.1f}{share:12.0%}{result['peak_bytes'] / 1e9:11.2f} GB{result['loss']:15.4f}"
            f"{result['tokens']:9.0f}{result['seconds']:9.1f}"
        )
    print("ceiling (bf16 product 2048³): " + ", ".join(f"{result['ceiling'] / 1e9:.0f} GFLOP/s" for result in results.values()))
    ours = results.get("ours")
    for side, peer in results.items():
        if ours is None or side == "ours":
            continue
        speed, memory = ours["tokens_per_second"] / peer["tokens_per_second"], ours["peak_bytes"] / peer["peak_bytes"]
        loss = ours["loss"] / peer["loss"] - 1
        print(f"ours / {SIDES[side]}: {speed:.2f} times the speed, {memory:.2f} times the memory, {loss:+.2%} held-out loss")


if __name__ == "__main__":
    main()
