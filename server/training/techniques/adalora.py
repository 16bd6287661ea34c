"""LoRA whose rank is spread over the layers by need (Zhang et al. 2023). The result is plain LoRA."""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import cast

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraModel, RankAllocator, SVDLinear
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from server.domain.techniques import ALL_LINEAR, AdaLora
from server.training.techniques.factors import PARAMETERS_NAME, Factors, write_plain_lora
from server.training.techniques.targets import add_adapter
from server.training.techniques.trained import Trained, cannot_start, check_shapes

ADAPTER = "default"
# Shares of the steps before the first rank is taken away, and after the last.
INITIAL_SHARE = 0.1
FINAL_SHARE = 0.3
# Times that the ranks are spread anew at most; each looks at all of the parameters.
MAX_ALLOCATIONS = 200
# Of the mean distance of the factors from orthonormal ones; the paper's range is 0.1 to 0.5.
ORTHOGONALITY_WEIGHT = 0.1
# Fewer steps leave no time to spread ranks.
MIN_STEPS = 4
STATE_PREFIXES = ("sensitivity/", "uncertainty/", "kept/")


class AdaLoraTrained(Trained):
    """Singular values between two factors; those of little effect are set to zero as the steps go on."""

    def __init__(self, model: PreTrainedModel, technique: AdaLora, total_steps: int) -> None:
        initial, final = int(INITIAL_SHARE * total_steps), int(FINAL_SHARE * total_steps)
        config = AdaLoraConfig(
            init_r=technique.initial_rank, target_r=technique.target_rank, lora_alpha=2 * technique.initial_rank, total_step=total_steps,
            tinit=initial, tfinal=final, deltaT=max(1, (total_steps - initial - final) // MAX_ALLOCATIONS),
            orth_reg_weight=ORTHOGONALITY_WEIGHT, target_modules=ALL_LINEAR, task_type="CAUSAL_LM",
        )  # fmt: skip
        super().__init__(add_adapter(model, config))
        self._allocates = technique.initial_rank > technique.target_rank and total_steps >= MIN_STEPS

    @property
    def _tuner(self) -> AdaLoraModel:
        tuner = self.peft.base_model
        assert isinstance(tuner, AdaLoraModel)
        return tuner

    @property
    def _config(self) -> AdaLoraConfig:
        config = self._tuner.peft_config[ADAPTER]
        assert isinstance(config, AdaLoraConfig)
        return config

    @property
    def _allocator(self) -> RankAllocator:
        allocator = self._tuner.rankallocator
        assert isinstance(allocator, RankAllocator)
        return allocator

    def after_step(self, step: int) -> None:
        """Weigh each rank by its gradients, and take away those of little effect as the schedule says."""
        if self._allocates:
            self._tuner.update_and_allocate(step)  # type: ignore[no-untyped-call]  # peft leaves it untyped

    def penalty(self) -> torch.Tensor:
        """Give the distance of the factors from orthonormal ones, so that singular values mean the same in all layers."""
        distances = []
        for name, parameter in self.parameters.items():
            if "lora_A" in name or "lora_B" in name:
                square = parameter @ parameter.t() if "lora_A" in name else parameter.t() @ parameter
                distances.append(torch.linalg.matrix_norm(square - torch.eye(len(square), device=square.device)))
        return ORTHOGONALITY_WEIGHT * torch.stack(distances).mean()

    def state(self) -> dict[str, torch.Tensor]:
        """Give the averages of the ranks' effects, and which ranks are kept."""
        kept: dict[str, list[bool]] = self._config.rank_pattern or {}
        return {
            **{f"sensitivity/{name}": tensor for name, tensor in self._allocator.exp_avg_ipt.items()},
            **{f"uncertainty/{name}": tensor for name, tensor in self._allocator.exp_avg_unc.items()},
            **{f"kept/{name}": torch.tensor(mask) for name, mask in kept.items()},
        }

    def fits_state(self, names: Set[str]) -> bool:
        """Tell whether these are averages and ranks."""
        return all(name.startswith(STATE_PREFIXES) for name in names)

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore them."""
        sensitivity, uncertainty, kept = (
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)} for prefix in STATE_PREFIXES
        )
        device = self.peft.device
        allocator = self._allocator
        allocator.exp_avg_ipt = {name: tensor.to(device) for name, tensor in sensitivity.items()}
        allocator.exp_avg_unc = {name: tensor.to(device) for name, tensor in uncertainty.items()}
        allocator.ipt = {name: torch.zeros_like(tensor) for name, tensor in allocator.exp_avg_ipt.items()}  # overwritten before it is read
        self._config.rank_pattern = {name: mask.tolist() for name, mask in kept.items()} or None

    @torch.no_grad()
    def save(self, directory: Path) -> None:
        """Write plain LoRA of the ranks that are left, and the parameters beside it."""
        layers = {}
        for name, layer in self.peft.get_base_model().named_modules():
            if isinstance(layer, SVDLinear):
                down, values, up = (cast(torch.Tensor, part[ADAPTER]) for part in (layer.lora_A, layer.lora_E, layer.lora_B))
                left = torch.nonzero(values[:, 0])[:, 0]
                scaling = layer.scaling[ADAPTER] / (float(layer.ranknum[ADAPTER]) + 1e-5)  # as in peft's forward pass
                layers[name] = Factors((down * values)[left], up[:, left] * scaling)
        write_plain_lora(directory, layers, self.peft.peft_config[ADAPTER].base_model_name_or_path)
        save_file({name: parameter.detach().cpu().contiguous() for name, parameter in self.parameters.items()}, directory / PARAMETERS_NAME)

    def warm_start(self, directory: Path) -> None:
        """Take the parameters of a result of the same shape. Raises JobFailure(BASE_MODEL_UNAVAILABLE) for another."""
        if not (directory / PARAMETERS_NAME).is_file():
            raise cannot_start("it was not trained by AdaLoRA")
        found = load_file(directory / PARAMETERS_NAME)
        check_shapes({name: p.shape for name, p in self.parameters.items()}, {name: tensor.shape for name, tensor in found.items()})
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found[name])
