"""LoRA training speed, memory and held-out loss: ours and TRL's SFTTrainer, each in a process of its own, on the same records.

    python -m benchmarks.training [--steps 12] [--data ../shared/data/gsm8k/train.jsonl] [--only ours]

Both train SmolLM2-135M-Instruct with the same LoRA shape, sequence limit, records per step, number of steps and learning rate,
on the answers' tokens. TRL stands at its defaults in bf16. A real token is one that is no padding.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server.domain.specs import TrainingParameters

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
RANK = 16
ALPHA = 32
WARMUP_STEPS = 0  # the two libraries count warm-up steps differently; without any, both rates fall along the same line


def main() -> None:
    """Parse, prepare the records, run both sides, print the table."""
    options = parse_options()
    if options.side:
        print(json.dumps((train_ours if options.side == "ours" else train_trl)(options)))
        return
    with tempfile.TemporaryDirectory() as directory:
        prepare_records(options, Path(directory))
        sides = [options.only] if options.only else ["ours", "trl"]
        print_table({side: run_side(side, Path(directory)) for side in sides})


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="JSONL with question and answer")
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=16, help="records per optimiser step")
    parser.add_argument("--held-out", type=int, default=48, help="records that only the loss is measured on")
    parser.add_argument("--max-tokens", type=int, default=1024, help="sequence limit")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's choice")
    parser.add_argument("--cache", type=Path, default=Path(".data/cache"), help="where converted weights are kept")
    parser.add_argument("--only", choices=("ours", "trl"), help="run one side")
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--records", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


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


def run_side(side: str, directory: Path) -> dict[str, float]:
    """Run one side in a process of its own; its last line of output is its result."""
    print(f"training with {side} …", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:], "--side", side, "--records", str(directory)]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def train_ours(options: argparse.Namespace) -> dict[str, float]:
    """Train by our loop."""
    import torch

    from server.basemodels.loading import load_causal_model, load_tokenizer, preferred_dtype
    from server.basemodels.sources import BaseModelSource
    from server.domain.techniques import LoraTechnique
    from server.training.adapters import add_lora, trainable_parameters
    from server.training.batches import BatchPlan
    from server.training.checkpoint import Position
    from server.training.data import TokenizedRecords, read_records
    from server.training.loop import Run, make_optimiser, train
    from server.training.network import Network

    if options.threads:
        torch.set_num_threads(options.threads)
    directory = BaseModelSource(options.cache).resolve(BASE_MODEL).directory
    tokenizer = load_tokenizer(directory)
    records = read_records(options.records / "train.jsonl", tokenizer, max_tokens=options.max_tokens).records
    model = add_lora(load_causal_model(directory, dtype=preferred_dtype()), LoraTechnique(RANK, ALPHA), seed=0)
    parameters = trainable_parameters(model)
    settings = make_parameters(options)
    plan = BatchPlan.of(len(records), batch_size=options.batch_size, epochs=1.0, max_steps=options.steps, seed=0)
    position = Position()
    run = Run(
        network=Network(model),
        parameters=parameters,
        optimiser=make_optimiser(parameters.values(), settings),
        records=records,
        held_out=TokenizedRecords(),
        plan=plan,
        settings=settings,
        emit=lambda event: print(event, file=sys.stderr),
        should_stop=lambda: False,
        save=lambda position: None,
    )
    began = time.perf_counter()
    train(run, position)
    seconds = time.perf_counter() - began
    return finish(options, model, directory, position.tokens, seconds)


def make_parameters(options: argparse.Namespace) -> "TrainingParameters":
    """Give our loop's parameters: no evaluation, no checkpoint inside the measured time."""
    from server.domain.specs import LossOn, OverlongPolicy, Scheduler, TrainingParameters

    return TrainingParameters(
        epochs=1.0,
        max_steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        scheduler=Scheduler.LINEAR,
        warmup_steps=WARMUP_STEPS,
        weight_decay=0.0,
        max_gradient_norm=1.0,
        max_sequence_tokens=options.max_tokens,
        overlong_policy=OverlongPolicy.DROP,
        loss_on=LossOn.ASSISTANT,
        seed=0,
        evaluate_every_steps=options.steps,
        checkpoint_every_steps=options.steps,
    )


def train_trl(options: argparse.Namespace) -> dict[str, float]:
    """Train by TRL's SFTTrainer at its defaults in bf16."""
    import torch
    from datasets import Dataset  # type: ignore[import-untyped]  # ships no types
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from server.basemodels.sources import BaseModelSource

    if options.threads:
        torch.set_num_threads(options.threads)
    directory = BaseModelSource(options.cache).resolve(BASE_MODEL).directory
    chats = [json.loads(line)["messages"] for line in (options.records / "train.jsonl").open()]
    micro_batch = min(SFTConfig.per_device_train_batch_size, options.batch_size)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16),
        processing_class=AutoTokenizer.from_pretrained(directory),
        # Prompt and completion: by default TRL trains the completion's tokens only.
        train_dataset=Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
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
        ),
    )
    outcome = trainer.train()
    tokens = trainer.state.num_input_tokens_seen
    return finish(options, trainer.model, directory, int(tokens), float(outcome.metrics["train_runtime"]))


def finish(options: argparse.Namespace, model: Any, directory: Path, tokens: int, seconds: float) -> dict[str, float]:
    """Take memory first, then the held-out loss: the same code for both sides, plain forward passes one record at a time."""
    import torch
    from torch.nn.functional import cross_entropy

    from server.basemodels.loading import load_tokenizer
    from server.training.data import read_records

    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    records = read_records(options.records / "held_out.jsonl", load_tokenizer(directory), max_tokens=options.max_tokens).records
    model.eval()
    total, trained = 0.0, 0
    with torch.no_grad():
        for index in range(len(records)):
            ids = torch.tensor(records.token_ids(index), device=model.device)[None].long()
            mask = torch.tensor(records.trained_mask(index), device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1][mask[1:]].float()
            total += float(cross_entropy(logits, ids[0, 1:][mask[1:]], reduction="sum"))
            trained += int(mask.sum())
    return {"tokens_per_second": tokens / seconds, "peak_bytes": peak_bytes, "loss": total / trained, "tokens": tokens, "seconds": seconds}


def print_table(results: dict[str, dict[str, float]]) -> None:
    """Print both sides and the ratio."""
    print(f"{'':14}{'real tokens/s':>15}{'peak memory':>14}{'held-out loss':>15}{'tokens':>10}{'seconds':>10}")
    names = {"ours": "ours", "trl": "TRL SFTTrainer"}
    for side, result in results.items():
        print(
            f"{names[side]:14}{result['tokens_per_second']:15.1f}{result['peak_bytes'] / 1e9:11.2f} GB{result['loss']:15.4f}"
            f"{result['tokens']:10.0f}{result['seconds']:10.1f}"
        )
    if len(results) == 2:
        ours, peer = results["ours"], results["trl"]
        speed, memory = ours["tokens_per_second"] / peer["tokens_per_second"], ours["peak_bytes"] / peer["peak_bytes"]
        print(
            f"ours / TRL: {speed:.2f} times the speed, {memory:.2f} times the memory, {ours['loss'] / peer['loss'] - 1:+.2%} held-out loss"
        )


if __name__ == "__main__":
    main()
