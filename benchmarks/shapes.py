"""Training speed of big shapes with random weights: what a GPU does with an 8B or 70B model, or a CPU with a small one.

    python -m benchmarks.shapes --model llama-3-8b --technique lora --tokens 4096 [--sequences 4] [--steps 10]
    python -m benchmarks.shapes --model llama-3.1-70b --technique qlora --tokens 4096 --sequences 1
    python -m benchmarks.shapes --model smollm2 --technique qlora --tokens 512 --steps 2     # proves the script on a CPU

Our training core on sequences packed to `--tokens` (documents of mixed length, none sees another), every token trained. Weights are
random, made on the device layer by layer and, for QLoRA, held in 4 bits at once: no download, and 70B fits beside its activations.
"""

import argparse
import time
from typing import TYPE_CHECKING, Any

from server.childprocess import measure_peak_memory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from server.domain.shapes import ModelShape
    from server.training.batches import MicroBatch
    from server.training.network import Network

INITIAL_DEVIATION = 0.02
# Lengths of the documents that fill a sequence, as shares of it: a few long ones, many short ones.
DOCUMENT_SHARES = (0.4, 0.25, 0.15, 0.1, 0.06, 0.04)
WARM_UP_STEPS = 2
# Dense bf16 peaks from the data sheets, floating point operations per second.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12}


def main() -> None:
    """Build the model, train a few steps, print a row."""
    import torch

    from benchmarks.training import make_technique, measure_ceiling
    from server.domain.catalogue import find_base_model
    from server.services.memory_model import estimate_flops_per_token
    from server.training.network import Network
    from server.training.techniques.apply import apply_technique

    options = parse_options()
    known = find_base_model(options.model)
    if known is None:
        raise SystemExit(f"{options.model} is not in the catalogue")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    technique = make_technique(options.technique)
    began = time.perf_counter()
    model = build_model(known.family, known.shape, device, quantized=options.technique == "qlora")
    # The weights of QLoRA are in 4 bits already: what is left to do is LoRA.
    trained = apply_technique(model, make_technique("full" if options.technique == "full" else "lora"), seed=0, total_steps=options.steps)
    network = Network(trained.model)
    if options.recompute:
        network.set_recomputing(True)
    count = sum(parameter.numel() for parameter in trained.parameters.values())
    print(f"built in {time.perf_counter() - began:.0f} s; packed: {network.packed}; {count:,} trained parameters")
    optimiser = torch.optim.AdamW(trained.parameters.values(), lr=1e-4, fused=True)
    batches = [make_batch(options.tokens, known.shape.vocabulary_size, seed).to(device) for seed in range(options.sequences)]
    steps = range(WARM_UP_STEPS + options.steps)
    seconds = [run_step(network, trained, optimiser, batches, step, device) for step in steps][WARM_UP_STEPS:]
    rate = options.tokens * options.sequences * len(seconds) / sum(seconds)
    flops = rate * estimate_flops_per_token(known.shape, technique)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else measure_peak_memory()
    ceiling = find_peak(torch.cuda.get_device_name()) if device.type == "cuda" else measure_ceiling()
    print(
        f"{options.model} {options.technique}, {options.sequences} x {options.tokens} tokens: {rate:,.0f} tokens/s, "
        f"{flops / 1e12:.2f} TFLOP/s, {flops / ceiling:.0%} of {ceiling / 1e12:.2f}, peak memory {peak / 1e9:.1f} GB"
    )


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b", help="a model of the catalogue, by hub name or alias")
    parser.add_argument("--technique", choices=("lora", "qlora", "full"), default="lora")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per packed sequence")
    parser.add_argument("--sequences", type=int, default=4, help="packed sequences per optimiser step, one after the other")
    parser.add_argument("--steps", type=int, default=10, help="measured steps, after two to warm up")
    parser.add_argument("--recompute", action="store_true", help="compute activations again in the backward pass")
    return parser.parse_args()


def build_model(family: str, shape: "ModelShape", device: "torch.device", *, quantized: bool) -> "PreTrainedModel":
    """Make a model of random weights: each module gets its memory on the device and, if asked, its 4-bit form, before the next does."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from server.basemodels.quantization import QuantizedLinear
    from server.domain.techniques import Quantization

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
            AutoConfig.for_model(family, **configure(family, shape)), dtype=torch.bfloat16
        )
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if any(True for _ in module.children()):
                continue
            fill(module, device)
            if quantized and isinstance(module, torch.nn.Linear) and module is not head:
                setattr(parent, name, QuantizedLinear.of(module, Quantization.NF4, True, torch.bfloat16))
    model.tie_weights()
    return model  # type: ignore[no-any-return]  # the auto class says Any


def fill(module: Any, device: "torch.device") -> None:
    """Give a module of the meta device memory and random weights; rotary frequencies are computed as the module does."""
    import torch

    if "Rotary" in type(module).__name__:
        with torch.device(device):
            fresh = type(module)(module.config)
        module._apply(lambda tensor: torch.empty_like(tensor, device=device))
        for name, buffer in fresh.named_buffers():
            module.get_buffer(name).copy_(buffer)
        return
    module.to_empty(device=device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, INITIAL_DEVIATION) if parameter.dim() > 1 else parameter.fill_(1.0)


def configure(family: str, shape: "ModelShape") -> dict[str, object]:
    """Give the configuration of a shape (Llama-like families)."""
    return {
        "vocab_size": shape.vocabulary_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.layer_count,
        "num_attention_heads": shape.head_count,
        "num_key_value_heads": shape.key_head_count,
        "intermediate_size": shape.intermediate_size,
        "head_dim": shape.head_size,
        "tie_word_embeddings": shape.tied_embeddings,
        "pad_token_id": None,
        "max_position_embeddings": 131_072,
    }


def make_batch(tokens: int, vocabulary: int, seed: int) -> "MicroBatch":
    """Fill a sequence with documents of random tokens."""
    import torch

    from server.training.batches import MicroBatch

    lengths = [int(share * tokens) for share in DOCUMENT_SHARES]
    lengths[0] += tokens - sum(lengths)
    ids = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(length) for length in lengths])
    trained = torch.nonzero(positions)[:, 0]
    sequences = torch.repeat_interleave(torch.tensor(lengths))[trained]
    return MicroBatch(ids, positions, tuple(lengths), trained - 1, ids[trained], torch.ones(len(trained)), sequences)


def run_step(
    network: "Network", trained: Any, optimiser: "torch.optim.Optimizer", batches: "list[MicroBatch]", step: int, device: "torch.device"
) -> float:
    """Do one optimiser step as the loop does; give its seconds."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    total = sum(batch.trained_count for batch in batches)
    for batch in batches:
        (network.sum_loss(batch) / total).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    torch.nn.utils.clip_grad_norm_(trained.parameters.values(), 1.0)
    optimiser.step()
    trained.after_step(step + 1)
    optimiser.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def find_peak(name: str) -> float:
    """Give an accelerator's dense bf16 peak, or measure what a product reaches where the data sheet is not known."""
    from benchmarks.training import measure_ceiling

    return next((peak for model, peak in PEAKS.items() if model in name), None) or measure_ceiling()


if __name__ == "__main__":
    main()
