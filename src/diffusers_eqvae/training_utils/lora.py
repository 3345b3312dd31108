"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft, on convolutions and linear layers of whatever is trained.

W' = W + (alpha / rank) B A          B = 0 at first, so that a run starts as the function that it is to change
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import nn

from ..model_card import without_folders
from ..options import Checked

LORA = "lora"  # the word of --trainable, and the folder of the adapter in a run
ADAPTER = "default"
NEAREST = 3
M = TypeVar("M", bound=nn.Module)


@dataclass
class LoraArguments(Checked):
    """Adapters of --trainable lora."""

    lora_rank: int = field(default=16, metadata={"help": "Rank of each adapter.", "range": "(0, inf)"})
    lora_alpha: int | None = field(
        default=None,
        metadata={
            "help": "Adapters are scaled by it over the rank; unset, the rank: by 1.",
            "range": "(0, inf)",
        },
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout before the adapters, in training.", "range": "[0, 1)"}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers that get one, by the end of their names (to_q conv1); unset, every convolution and linear "
            "layer of what is trained."
        },
    )

    @property
    def alpha(self) -> int:
        return self.lora_rank if self.lora_alpha is None else self.lora_alpha


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """By name the layers that peft adapts exactly: linear ones, and convolutions without groups and dilation."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.groups == 1 and set(layer.dilation) == {1})
    }


def add_adapters(
    model: nn.Module, arguments: LoraArguments, *, prefixes: Sequence[str] = ("",), frozen: Sequence[str] = ()
) -> None:
    """Freezes a model and puts adapters on its layers, which alone learn; the function stays what it was.

    Args:
        prefixes: how the names of the parameters begin among which layers are chosen.
        frozen: and how those begin that are left out.

    Raises:
        ValueError: no layer there has the name that is asked for (the nearest are named), or there is none at all.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("--trainable lora needs the package peft: pip install peft.") from error
    below = [name for name in adaptable(model) if f"{name}.".startswith(tuple(prefixes))]
    there = [name for name in below if not f"{name}.".startswith(tuple(frozen))]
    chosen = _chosen(model, there, arguments.lora_target_modules)
    model.requires_grad_(False)
    config = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=chosen,
    )
    inject_adapter_in_model(config, model, ADAPTER)
    for name in chosen:
        layer: Any = model.get_submodule(name)
        if isinstance(layer.get_base_layer(), nn.Conv2d):  # peft 0.21 pads with zeros, whatever the layer does
            layer.lora_A[ADAPTER].padding_mode = layer.get_base_layer().padding_mode


def _chosen(model: nn.Module, there: list[str], asked: list[str] | None) -> list[str]:
    """Those of the layers `there` that end in one of the names asked for."""
    if not there:
        raise ValueError(
            f"--trainable lora adapts convolutions and linear layers, and what is trained of this "
            f"{type(model).__name__} has none; name another part, or leave lora out."
        )
    for end in asked or ():
        if not any(_ends(name, end) for name in there):
            endings = [name.rpartition(".")[2] for name in there]
            likest = difflib.get_close_matches(end, dict.fromkeys([*there, *endings]), n=NEAREST, cutoff=0.5)
            raise ValueError(
                f"--lora_target_modules {end} does not end the name of a convolution or linear layer among what is "
                f"trained; the nearest are {', '.join(likest or dict.fromkeys(endings))}."
            )
    return [name for name in there if asked is None or any(_ends(name, end) for end in asked)]


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def adapters(model: nn.Module) -> dict[str, Any]:
    """By name the layers of a model that have an adapter."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def fused(model: M) -> M:
    """A copy whose weights are W + (alpha / rank) B A, of the class, names and config as before the adapters."""
    model = copy.deepcopy(model)
    for name, layer in adapters(model).items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
    return model


def adapter_settings(model: Any) -> dict[str, Any]:
    """Rank and alpha of a model's adapters, for its card."""
    config = model.peft_config[ADAPTER]
    return {"rank": config.r, "alpha": config.lora_alpha}


def save_adapter(model: Any, directory: Path, *, base: str | None, component: str | None = None) -> None:
    """adapter_config.json, and the adapters in one of two layouts.

    adapter_model.safetensors is what peft's `PeftModel.from_pretrained(model, directory)` reads; of a pipeline's
    component it is pytorch_lora_weights.safetensors, which diffusers' `pipeline.load_lora_weights(directory)` reads.

    Args:
        base: what the model was loaded from; of a local directory its last part is written.
        component: the model's name in its pipeline.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
    from peft import get_peft_model_state_dict

    config = copy.copy(model.peft_config[ADAPTER])
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set's order is that of a process
    config.base_model_name_or_path = None if base is None else without_folders(base)
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    metadata = {"format": "pt"}
    if component is not None:
        named = {f"{component}.{key}": value for key, value in config.to_dict().items()}
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(named, sort_keys=True)
    prefix, file = (
        ("base_model.model", "adapter_model.safetensors") if component is None else (component, LORA_WEIGHT_NAME_SAFE)
    )
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    named = {f"{prefix}.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(named, directory / file, metadata=metadata)
