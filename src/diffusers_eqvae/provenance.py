"""What a thing is and what it was made from: hashes of weights, files and data, commits, hardware and versions.

One identity per thing: `autoencoder_identity` of an autoencoder, which has named parts, since what reads latents needs
another part of it than what decodes them (`require_same_autoencoder` is the one comparison of two); `weights_hash` of
any other network, whatever file it came from; `metrics.image_sets.hash_digests` of images.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from torch import nn

from .autoencoder_classes import class_of
from .autoencoders import (
    Autoencoder,
    autoencoder_location,
    downsampling_factor,
    latent_channels,
    latent_range,
    stock_class,
    uncompiled,
)
from .latents import LatentNormalization
from .pretrained import hub_file

# How the Hub's cache lays files out: models--OWNER--NAME/snapshots/COMMIT/...
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})(?:/|$)")
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Each part of an autoencoder, by how the names of its parameters begin.
AUTOENCODER_PARTS = {
    "encoder": ("encoder.", "quant_conv."),
    "codebook": ("quantize.",),
    "decoder": ("decoder.", "post_quant_conv."),
}
_CALLED = {
    "encoder": "encoder weights",
    "codebook": "codebook",
    "decoder": "decoder weights",
    "normalization": "latent normalisation (latents_mean, latents_std, scaling_factor, shift_factor)",
}
# The parts that latents depend on: a fine-tuned decoder leaves them as they are.
LATENT_SPACE = ("encoder", "codebook", "normalization")


def weights_of(vae: Autoencoder, *parts: str) -> list[nn.Parameter]:
    """The parameters of parts of an autoencoder by their names in `AUTOENCODER_PARTS`.

    Example:
        >>> any(weight.requires_grad for weight in weights_of(vae, "encoder"))
        True
    """
    prefixes = tuple(prefix for part in parts for prefix in AUTOENCODER_PARTS[part])
    return [weight for name, weight in vae.named_parameters() if name.startswith(prefixes)]


def autoencoder_identity(vae: Autoencoder) -> dict[str, Any]:
    """What an autoencoder is, as a JSON value that travels with whatever was made by it.

    `class` is the class of diffusers that it is or derives from; `latent_range` what raw latents its decoder tells
    apart, where that is bounded.
    `encoder` (with quant_conv), `codebook` (of a VQ model, else None) and `decoder` (with post_quant_conv) are each
    hashed as float32, bfloat16 and float16, the padding of their convolutions included; `normalization` is one hash of
    the config's four entries, or those three of weights that normalise (FLUX.2, RAE). Every hash is the first 16
    hexadecimal digits of a SHA-256.

    Example:
        >>> autoencoder_identity(vae)
        {'class': 'AutoencoderKL', 'latent_channels': 4, 'downsampling_factor': 8, 'latent_range': None,
         'encoder': {'float32': '5e0b...', 'bfloat16': '91c7...', 'float16': '07aa...'}, 'codebook': None,
         'decoder': {...}, 'normalization': '3f52...'}

    Raises:
        ValueError: no encoder parameters, as in a wrapped autoencoder.
    """
    vae = uncompiled(vae)
    if not _parameters(vae, "encoder"):
        raise ValueError(
            f"The identity of an autoencoder needs its encoder; {type(vae).__name__} has no parameter named encoder.* "
            "and may be wrapped: unwrap it first (accelerator.unwrap_model)."
        )
    bounds = latent_range(vae)
    return {
        "class": stock_class(type(vae)),
        "latent_channels": latent_channels(vae),
        "downsampling_factor": downsampling_factor(vae),
        "latent_range": None if bounds is None else list(bounds),
        **{part: _part_hashes(vae, part) for part in AUTOENCODER_PARTS},
        "normalization": _normalization_hash(vae),
    }


def require_same_autoencoder(
    expected: Mapping[str, Any] | None,
    given: Autoencoder | Mapping[str, Any],
    *,
    parts: Sequence[str] = LATENT_SPACE,
    whose: str = "these latents",
) -> None:
    """Refuses an autoencoder, or the identity of one, that differs from `expected` in one of the parts.

    Weights agree where their hashes agree in any precision, so a copy rounded to bfloat16 or float16 is the same
    autoencoder, in whatever precision it is now. An `expected` of None, or a part that it does not state, is unknown
    and passes.

    Args:
        expected: from `autoencoder_identity`.
        parts: of "encoder", "codebook", "decoder" and "normalization".
        whose: what `expected` belongs to, for the message.

    Example:
        >>> require_same_autoencoder(store.autoencoder, vae, whose="the store latents/images")
    """
    given = uncompiled(given)
    differing = [
        _CALLED[part] for part in parts if expected and part in expected and not _agree(part, expected[part], given)
    ]
    if differing:
        remedy = f"use the autoencoder that {whose} came with"
        if differing == [_CALLED["normalization"]]:
            remedy += " as its files state it: what is encoded for it keeps that normalisation (normalization config)"
        raise ValueError(
            f"This autoencoder does not belong to {whose}: its {' and '.join(differing)} differ; {remedy}."
        )


def _agree(part: str, expected: Any, given: Autoencoder | Mapping[str, Any]) -> bool:
    """Stops at the first precision that agrees, so that the usual comparison reads the weights once."""
    if part == "normalization" and not isinstance(given, Mapping):
        given = {part: _normalization_hash(given)}
    if isinstance(expected, str):
        return expected == given.get(part)
    if isinstance(given, Mapping):
        found = given.get(part)
        return found == expected or any((found or {}).get(key) == value for key, value in (expected or {}).items())
    if expected is None:
        return not _parameters(given, part)
    return any(_part_hash(given, part, precision) == value for precision, value in expected.items())


def _parameters(vae: Autoencoder, part: str) -> list[tuple[str, torch.Tensor]]:
    return sorted(
        (name, value) for name, value in vae.state_dict().items() if name.startswith(AUTOENCODER_PARTS[part])
    )


def _part_hashes(vae: Autoencoder, part: str) -> dict[str, str] | None:
    return {name: _part_hash(vae, part, name) for name in _PRECISIONS} if _parameters(vae, part) else None


def _part_hash(vae: Autoencoder, part: str, precision: str) -> str:
    """Of the part's weights rounded to a precision, and of its padding where that is not zeros."""
    digest = hashlib.sha256()
    for name, value in _parameters(vae, part):
        digest.update(f"{name}:{tuple(value.shape)}".encode())
        _add_values(digest, value.detach().to("cpu", _PRECISIONS[precision]))
    for name, module in vae.named_modules():
        padding_mode = module.padding_mode if isinstance(module, nn.Conv2d) else "zeros"
        if name.startswith(AUTOENCODER_PARTS[part]) and padding_mode != "zeros":
            digest.update(f"{name}:{padding_mode}".encode())
    return digest.hexdigest()[:16]


def _normalization_hash(vae: Autoencoder) -> str | dict[str, str]:
    """Of the config's entries; of weights that normalise (FLUX.2, RAE) rounded to each precision, as of any others."""
    row = class_of(vae)
    if not row.buffers:
        return _json_hash(LatentNormalization.from_vae(vae).to_config())
    stated = {name: row.stated(vae, dtype) for name, dtype in _PRECISIONS.items()}
    return {name: _json_hash(LatentNormalization.from_config(each).to_config()) for name, each in stated.items()}


def _json_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# How many images' bytes always enter the identity of a data set.
SAMPLED_IMAGES = 64
_DATA = {
    "images": "number of images",
    "files": "names or sizes of files",
    "labels": "labels",
    "classes": "class names",
    "sampled": "content of images",
    "everything": "content of images",
    "value_range": "stated values of black and white",
}


def data_identity(
    count: int,
    *,
    files: Iterable[tuple[str, int]] | None,
    labels: Any,
    classes: Mapping[int, str],
    sampled: Iterable[bytes],
    everything: Iterable[bytes] | None = None,
) -> dict[str, Any]:
    """Which images and labels a data set is made of, as a JSON value that travels with whatever was made from it.

    Args:
        files: names and sizes of the images' files, in order; None where there are no files.
        labels: (N,) class ids, or None.
        classes: class names by id.
        sampled: the bytes of `SAMPLED_IMAGES` evenly spaced images.
        everything: the bytes of all, where every one shall count.

    Example:
        >>> source.identity
        {'images': 1382, 'files': '81c0...', 'labels': '9af2...', 'classes': '07d1...', 'sampled': '5e0b...'}
    """
    named = None if files is None else (f"{name}\0{size}\n".encode() for name, size in files)
    identity = {
        "images": count,
        "files": None if named is None else _digest(named),
        "labels": None if labels is None else _digest([labels.astype("<i8").tobytes()]),
        "classes": _digest([json.dumps(sorted(classes.items())).encode()]),
        "sampled": _digest(map(_hashed, sampled)),
    }
    return identity if everything is None else identity | {"everything": _digest(map(_hashed, everything))}


def data_difference(expected: Mapping[str, Any] | None, given: Mapping[str, Any]) -> str | None:
    """In what two data identities differ, in words, or None; what one of them does not state is unknown and passes.

    Example:
        >>> data_difference({"images": 9, "labels": "aa"}, {"images": 8, "labels": "aa"})
        'number of images'
    """
    known = [key for key in _DATA if (expected or {}).get(key) is not None and given.get(key) is not None]
    return " and ".join(dict.fromkeys(_DATA[key] for key in known if (expected or {})[key] != given[key])) or None


def require_same_data(
    expected: Mapping[str, Any] | None, given: Mapping[str, Any], *, whose: str, remedy: str
) -> None:
    """Refuses the identity of a data set that differs from `expected`, of `whose`.

    Example:
        >>> require_same_data(saved, source.identity, whose="the store latents/images", remedy="encode them anew")
    """
    if difference := data_difference(expected, given):
        raise ValueError(f"These are not the data of {whose}: the {difference} differ; {remedy}.")


def _hashed(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def weights_hash(*modules: nn.Module) -> str:
    """The identity of weights: 16 hex digits of the SHA-256 of all names, shapes and values of the modules' states.

    In the dtype they have; a copy rounded to half precision has another. Buffers count, device and memory format do
    not.

    Example:
        >>> weights_hash(pipeline.transformer, pipeline.vae)
        '0f2c6f6f9d0c3f7e'
    """
    return hash_tensors(named for module in map(uncompiled, modules) for named in module.state_dict().items())


def hash_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """16 hex digits of the SHA-256 of names, shapes and values, in the dtype they have."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        _add_values(digest, tensor.detach().cpu())
    return digest.hexdigest()[:16]


def _add_values(digest: Any, tensor: torch.Tensor) -> None:
    """The bytes of a tensor on the CPU in the order of its indices, without a copy where they lie so."""
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())


def module_identity(module: nn.Module) -> dict[str, Any]:
    """What a network is, as a JSON value: its class, the options of its parts, and two hashes of its weights.

    `frozen` is that of the weights that do not learn (buffers too, where none does), `learned` that of the others.

    Example:
        >>> module_identity(vae.requires_grad_(False))
        {'class': 'AutoencoderKL', 'config': {'AutoencoderKL.latent_channels': 4, ...}, 'frozen': '5e0b...',
         'learned': None}
    """
    learns = {name: weight.requires_grad for name, weight in module.named_parameters()}
    hashes: dict[str, str | None] = {}
    for part, asked in (("frozen", False), ("learned", True)):
        # Buffers follow the weights.
        named = [each for each in module.state_dict().items() if learns.get(each[0], any(learns.values())) is asked]
        hashes[part] = hash_tensors(named) if named else None
    return {"class": type(module).__name__, "config": public_config(module), **hashes}


def public_config(module: nn.Module) -> dict[str, Any]:
    """The options of a network's parts, by class and name, which decide beside its weights what it computes."""
    return {
        f"{type(part).__name__}.{key}": value
        for part in module.modules()
        if isinstance(part, ConfigMixin)
        for key, value in part.config.items()
        if key[0] != "_" and key != "class_counts"  # how many images there are is said by the data
    }


def hub_commit(name: str, *, subfolder: str | None = None, revision: str | None = None) -> str | None:
    """The commit of the Hub repository that an autoencoder is loaded from; None where `name` is another directory.

    Takes what `load_autoencoder` takes. A commit says where weights were found; what they are says their identity.

    Example:
        >>> hub_commit("madebyollin/taesd")
        '614f76814bef30edf58b17e1d2ff7e7ee2a60b2b'
    """
    inside = autoencoder_location(name, subfolder=subfolder, revision=revision).get("subfolder")
    config = hub_file(name, "/".join(filter(None, (inside, "config.json"))), revision)
    found = None if config is None else _SNAPSHOT.search(config.absolute().as_posix())
    return None if found is None else found[1]


def hash_file(path: str | os.PathLike[str]) -> str:
    """First 16 hex digits of a file's SHA-256, as `sha256sum FILE | cut -c -16` prints them."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def portable(value: Any) -> Any:
    """A JSON value whose paths say nothing of this machine, for files that are shown to others.

    A path below the working directory is given relative to it, any other absolute one (and one with "..") by its last
    part. Hub names and all other text stay. What it is, hashes beside it say.

    Example:
        >>> portable({"model": "/home/me/vae", "vae": "runs/vae", "base": "madebyollin/taesd"})
        {'model': 'vae', 'vae': 'runs/vae', 'base': 'madebyollin/taesd'}
    """
    if isinstance(value, Mapping):
        return {key: portable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(portable, value))
    if not isinstance(value, str) or not (os.path.isabs(value) or ".." in Path(value).parts):
        return value
    path = Path(os.path.abspath(value))
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name


def versions() -> dict[str, str]:
    """Of what decides numbers: {"diffusers_eqvae": "0.1.0", "diffusers": ..., "torch": ..., "python": ...}."""
    return {
        "diffusers_eqvae": sys.modules["diffusers_eqvae"].__version__,  # importing it would go upwards
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def hardware(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where and when: {"hardware": name of the device, "threads", "versions" (see `versions`), "date" in UTC}."""
    on_cuda = torch.device(device).type == "cuda"
    return {
        "hardware": torch.cuda.get_device_name(device) if on_cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
