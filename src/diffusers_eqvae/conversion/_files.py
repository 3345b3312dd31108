"""Files of published weights: safe to read, whichever training code wrapped them."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import atomic_path, read_weights

logger = logging.getLogger(__name__)

# What wrappers put before every name: DistributedDataParallel, torch.compile, Lightning and others.
PREFIXES = ("module.", "_orig_mod.", "model.")
# Entries of a training checkpoint that may hold the weights, the preferred one first.
ENTRIES = ("ema", "model", "state_dict", "model_state_dict")
SAFETENSORS = ".safetensors"
SUFFIXES = (SAFETENSORS, ".pt", ".pth", ".ckpt", ".bin")
# latent-diffusion keeps the moving average of a.b.weight as model_ema.abweight, beside the weights.
AVERAGE = "model_ema."
# TAESD is published as two files, NAME_encoder and NAME_decoder; how ComfyUI calls the halves in one.
HALVES = ("taesd_encoder.", "taesd_decoder.")
_HALF = re.compile(r"(.*_)(encoder|decoder)")
# Modules of whose objects trainers leave some beside the tensors: callbacks, settings, counters.
TRAINERS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.", "collections.", "typing.")


class _Bookkeeping(dict):  # type: ignore[type-arg]
    """Stands for an object that a trainer left in its checkpoint; takes in whatever it is given, and does nothing."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *state: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


def read_published(path: str | Path, *, weights: str | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file; nothing in it is executed.

    Of a training checkpoint ({"ema", "model", "opt", ...}) one entry is taken, and prefixes that all names share are
    removed (`module.`, `_orig_mod.`, `model.`); both are logged. In a checkpoint of Lightning objects of the trainer
    are passed over, and a moving average under `model_ema.` counts as the entry "ema". Of TAESD, published as
    NAME_encoder and NAME_decoder, the other half is read too, and both have the prefixes of `HALVES`.

    Args:
        path: the file.
        weights: the entry, e.g. "ema" or "model"; without it "ema" before "model".

    Raises:
        ValueError: a file that is not there, needs code to be read, or has no such entry.

    Example:
        >>> tensors = read_published("SiT-XL-2-256x256.pt", weights="ema")
    """
    path = Path(path)
    tensors = _read(path, weights)
    if _HALF.fullmatch(path.stem) is None or not all(name[0].isdigit() for name in tensors):
        return tensors
    both: dict[str, Tensor] = {}
    for half, file in _halves(path).items():
        if file != path and not file.is_file():
            raise ValueError(f"{path} holds half of an autoencoder; the other, {file.name}, must lie beside it.")
        both |= {half + name: tensor for name, tensor in (tensors if file == path else _read(file, weights)).items()}
    logger.info("Taking both halves, %s.", " and ".join(file.name for file in _halves(path).values()))
    return both


def _halves(path: Path) -> dict[str, Path]:
    """The files of the halves of TAESD, of either's path."""
    match = _HALF.fullmatch(path.stem)
    assert match is not None
    return {half: path.with_name(f"{match[1]}{half.removeprefix('taesd_')}{path.suffix[1:]}") for half in HALVES}


def _read(path: Path, weights: str | None) -> dict[str, Tensor]:
    # DiT's and SiT's checkpoints keep their flags
    content = read_weights(path, allowed=[argparse.Namespace, *_trainer_objects(path)])
    tensors = _averaged(_entry(content, weights, path), weights)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} does not hold named tensors; it holds {', '.join(map(str, tensors)) or 'nothing'}.")
    return _without_prefixes(tensors)


def save_published(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Writes tensors to a .safetensors or torch file (.pt, .pth), whole or not at all.

    Halves of TAESD go to two files where the name is that of either, NAME_encoder or NAME_decoder.

    Example:
        >>> save_published(to_published(transformer, "sit"), "sit.safetensors")
    """
    path = Path(path)
    if all(name.startswith(HALVES) for name in tensors) and _HALF.fullmatch(path.stem):
        halves = _halves(path)
        for file in halves.values():
            if file != path and file.exists():
                raise ValueError(f"{file}, where the other half would be written, exists already; remove it.")
        for half, file in halves.items():
            own = {name.removeprefix(half): each for name, each in tensors.items() if name.startswith(half)}
            _write(own, file)
    else:
        _write(tensors, path)


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as sibling:
        if path.suffix == SAFETENSORS:
            from safetensors.torch import save_file

            save_file(contiguous, sibling)
        else:
            torch.save(contiguous, sibling)


def _trainer_objects(path: Path) -> list[Any]:
    """Of the classes that a torch file names, those of trainers; each is read as `_Bookkeeping`."""
    if path.suffix == SAFETENSORS or not path.is_file():
        return []
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # damaged, or of a form that cannot be listed: reading it says what is wrong
        return []
    return [(_Bookkeeping, name) for name in named if name.startswith(TRAINERS) or name == "_codecs.encode"]


def _averaged(tensors: Mapping[str, Tensor], weights: str | None) -> Mapping[str, Tensor]:
    """The moving average that lies beside the weights, where there is one, or the weights without it."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.startswith(AVERAGE)}
    averages = {f"{AVERAGE}{name.replace('.', '')}": name for name in plain}
    found = {averages[name]: tensor for name, tensor in tensors.items() if name in averages}
    if not found:
        return tensors
    if weights == "model":
        logger.info("Taking the weights, and not their moving average (%s*).", AVERAGE)
        return plain
    logger.info("Taking the moving average (%s*) of %d of %d tensors.", AVERAGE, len(found), len(plain))
    return plain | found


def _entry(content: Mapping[str, Any], weights: str | None, path: Path) -> Mapping[str, Tensor]:
    there = [
        name for name in content if isinstance(content[name], Mapping) and type(content[name]) is not _Bookkeeping
    ]
    with_average = [name for name in there if any(str(each).startswith(AVERAGE) for each in content[name])]
    if weights in ("ema", "model") and weights not in there:
        if any(name.startswith(AVERAGE) for name in content):
            return content
        weights = next(iter(with_average), weights)
    if weights is None:
        weights = next((name for name in ENTRIES if name in there), None)
        if weights is None:
            return content
    elif weights not in there:
        raise ValueError(f"{path} has no entry {weights!r}; it has {', '.join(map(repr, there)) or 'tensors alone'}.")
    logger.info("Taking the entry %r of %s.", weights, ", ".join(map(repr, content)))
    return content[weights]


def _without_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    removed = ""
    while prefix := next((each for each in PREFIXES if all(name.startswith(each) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        removed += prefix
    if removed:
        logger.info("The prefix %r of every name is removed.", removed)
    return dict(tensors)
