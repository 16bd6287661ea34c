"""Decoder layers with fewer, larger operations than transformers' own, for the families that share the Llama shape.

Each replacement is compared with the original layer on random input before it is used: a transformers release that changes a layer
costs speed, never correctness. Other families keep their own layers, with only their linear parts exchanged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from server.inference.attention import attend
from server.inference.cache import CacheShape, RowCache, Step
from server.inference.kernels.attention import RowAttention
from server.inference.kernels.pointwise import Gate, Norm
from server.inference.kernels.team import find_team_for
from server.inference.projections import Projection
from server.inference.selection import AdapterSelection

# Classes whose layers are: norm, q/k/v (perhaps with norms on q and k), rotary on all of the head, attention, norm, gated MLP.
FUSABLE_LAYERS = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})
# Largest difference between a fused layer and the original, relative to the original's largest value: a few roundings of the type.
TOLERANCES: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
TRIAL_TOKENS = 5


@dataclass(frozen=True)
class LayerKernels:
    """What a layer runs as machine code of our own."""

    attention_norm: Norm
    mlp_norm: Norm
    attention: RowAttention
    gate: Gate


class FusedLayer(nn.Module):
    """One decoder layer: merged q/k/v and gate/up products, rotary in place on the merged result, one cache write; kernels on a CPU."""

    def __init__(self, layer: Any, selection: AdapterSelection) -> None:  # transformers' layers share names, not a class
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.index: int = attention.layer_idx
        self.head_size: int = attention.head_dim
        self.qkv = Projection([attention.q_proj, attention.k_proj, attention.v_proj], selection)
        self.out = Projection([attention.o_proj], selection)
        self.gate_up = Projection([mlp.gate_proj, mlp.up_proj], selection)
        self.down = Projection([mlp.down_proj], selection)
        self.activation = mlp.act_fn
        self.scaling: float = attention.scaling
        self.window: int | None = None  # where the window is written differs by family; the trial sees what the original uses
        self.heads = self.qkv.part_features[0] // self.head_size
        self.key_heads = self.qkv.part_features[1] // self.head_size
        self.attention_norm, self.mlp_norm = _fuse_norm(layer.input_layernorm), _fuse_norm(layer.post_attention_layernorm)
        self.query_norm = _fuse_norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.key_norm = _fuse_norm(attention.k_norm) if hasattr(attention, "k_norm") else None
        self._kernels = self._find_kernels(attention.q_proj.weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: RowCache,
        step: Step,
        **_: object,
    ) -> torch.Tensor:
        """Run the layer on [rows, new tokens, width]; the signature is that of a transformers decoder layer."""
        if step.rotary is None:
            step.rotary = _sign_rotary(*position_embeddings)
        if self._kernels is not None:
            return self._run_kernels(self._kernels, hidden_states, past_key_values, step, step.rotary)
        merged = self._project(self.attention_norm(hidden_states))
        hidden_states = hidden_states + self.out(self._attend(merged, past_key_values, step, *step.rotary))
        gate, up = self.gate_up(self.mlp_norm(hidden_states)).chunk(2, dim=-1)
        output: torch.Tensor = hidden_states + self.down(self.activation(gate).mul_(up))
        return output

    def _run_kernels(
        self, kernels: LayerKernels, hidden: torch.Tensor, cache: RowCache, step: Step, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        _, x = kernels.attention_norm.normalize(hidden)
        merged = self._project(x)
        if merged.shape[1] == 1:
            rows = cache.rows_of(self.index)
            attended = kernels.attention.attend(merged, rotary, step.positions, rows, step.longest_tokens, self.window)
        else:
            attended = self._attend(merged, cache, step, *rotary)
        hidden, x = kernels.mlp_norm.normalize(hidden, self.out(attended))
        output: torch.Tensor = hidden + self.down(kernels.gate.apply(self.gate_up(x)))
        return output

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        """Give queries, keys and values [rows, new tokens, heads + 2 x key heads, head size] before their rotation."""
        heads, key_heads = self.heads, self.key_heads
        merged: torch.Tensor = self.qkv(x).view(*x.shape[:2], heads + 2 * key_heads, self.head_size)
        if self.query_norm is not None and self.key_norm is not None:
            merged[:, :, :heads] = self.query_norm(merged[:, :, :heads])
            merged[:, :, heads : heads + key_heads] = self.key_norm(merged[:, :, heads : heads + key_heads])
        return merged

    def _attend(self, merged: torch.Tensor, cache: RowCache, step: Step, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """Give [rows, new tokens, heads x head size]."""
        rows, new_tokens, heads = *merged.shape[:2], self.heads
        rotated = merged[:, :, : heads + self.key_heads]
        turned = rotated.roll(self.head_size // 2, dims=-1)
        rotated.mul_(cosine).addcmul_(turned, sine)
        keys, values = cache.write(self.index, merged[:, :, heads:])
        output = attend(merged[:, :, :heads].transpose(1, 2), keys, values, step, self.scaling, self.window)
        return output.reshape(rows, new_tokens, heads * self.head_size)

    def _find_kernels(self, weight: torch.Tensor) -> LayerKernels | None:
        team = find_team_for(weight.dtype, weight.device)
        if team is None or type(self.activation) not in (nn.SiLU, SiLUActivation):
            return None
        if not isinstance(self.attention_norm, FusedNorm) or not isinstance(self.mlp_norm, FusedNorm):
            return None
        return LayerKernels(
            Norm(team, self.attention_norm.weight, self.attention_norm.epsilon),
            Norm(team, self.mlp_norm.weight, self.mlp_norm.epsilon),
            RowAttention(team, self.heads, self.key_heads, self.head_size, self.scaling),
            Gate(team),
        )


class FusedNorm(nn.Module):
    """Root-mean-square norm by torch's own operation."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        return functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


def fuse_layers(model: PreTrainedModel, selection: AdapterSelection) -> dict[str, tuple[Projection, int]]:
    """Exchange the model's layers for fused ones where that is exact; give each replaced linear's path, projection and part.

    Stops at the first layer that differs: what comes after it keeps transformers' own layers.
    """
    places: dict[str, tuple[Projection, int]] = {}
    for path, module in list(model.named_modules()):
        if type(module).__name__ not in FUSABLE_LAYERS:
            continue
        fused = FusedLayer(module, selection)
        if not _is_equivalent(model, module, fused):
            break
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent).register_module(name, fused)
        for part, linear in enumerate(("q_proj", "k_proj", "v_proj")):
            places[f"{path}.self_attn.{linear}"] = (fused.qkv, part)
        places[f"{path}.self_attn.o_proj"] = (fused.out, 0)
        places[f"{path}.mlp.gate_proj"], places[f"{path}.mlp.up_proj"] = (fused.gate_up, 0), (fused.gate_up, 1)
        places[f"{path}.mlp.down_proj"] = (fused.down, 0)
    return places


def wrap_linears(model: PreTrainedModel, selection: AdapterSelection) -> dict[str, tuple[Projection, int]]:
    """Exchange every linear layer that is left for a Projection; give their places."""
    places: dict[str, tuple[Projection, int]] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            projection = Projection([module], selection)
            parent, _, name = path.rpartition(".")
            model.get_submodule(parent).register_module(name, projection)
            places[path] = (projection, 0)
    return places


def _fuse_norm(norm: nn.Module) -> nn.Module:
    epsilon, weight = getattr(norm, "variance_epsilon", None), getattr(norm, "weight", None)
    return FusedNorm(weight.detach(), float(epsilon)) if isinstance(weight, torch.Tensor) and epsilon is not None else norm


def _sign_rotary(cosine: torch.Tensor, sine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shape [rows, tokens, size] factors for [rows, tokens, heads, size], and put the sign of the half turn into the sine."""
    half = sine.shape[-1] // 2
    signed = torch.cat((-sine[..., :half], sine[..., half:]), dim=-1)
    return cosine.unsqueeze(2), signed.unsqueeze(2)


def _is_equivalent(model: Any, layer: Any, fused: FusedLayer) -> bool:
    """Compare both layers on the same random input; gives the fused one the attention window that the original asked for."""
    weight = layer.self_attn.q_proj.weight
    generator = torch.Generator().manual_seed(fused.index)
    x = torch.randn(2, TRIAL_TOKENS + 1, weight.shape[1], generator=generator).to(weight)
    positions = torch.arange(TRIAL_TOKENS + 1, device=weight.device).expand(2, -1)
    rotary = model.base_model.rotary_emb(x, position_ids=positions)
    if rotary[0].shape[-1] != fused.head_size:
        return False
    shape = CacheShape(fused.index + 1, fused.key_heads, fused.head_size, TRIAL_TOKENS + 1, weight.dtype, weight.device)
    outputs = []
    for candidate in (layer, fused):
        cache, pieces = RowCache(shape, rows=2), []
        for first, last in ((0, TRIAL_TOKENS), (TRIAL_TOKENS, TRIAL_TOKENS + 1)):  # a prompt, then one token after it
            step = Step(0, positions[:, first:last], last, weight.dtype)
            cache.begin(step)
            embeddings = tuple(each[:, first:last] for each in rotary)
            output = candidate(x[:, first:last], position_embeddings=embeddings, past_key_values=cache, step=step, attention_mask=None)
            pieces.append(output[0] if isinstance(output, tuple) else output)
            if step.masks:
                fused.window = next(iter(step.masks))[0]
        outputs.append(torch.cat(pieces, dim=1))
    original, ours = outputs
    difference = (original.float() - ours.float()).abs().max()
    return bool(difference <= TOLERANCES.get(weight.dtype, 0.0) * original.float().abs().max())
