"""Which weights a model has: a hash of their own, and the commit of the Hub where its loader knew one."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import torch
from torch import nn

from .autoencoders import Autoencoder
from .latents import LatentNormalization

# How the Hub's cache lays files out: models--OWNER--NAME/snapshots/COMMIT/...
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})(?:/|$)")


def model_revision(model: nn.Module) -> str:
    """ "weights <16 hex digits>", with "commit <40 hex digits>, " before it where the model came from a known commit.

    The hash is `features.hash_tensors` of the model in its dtype. A commit is what the loader noted in the config
    (transformers) or the snapshot in the Hub's cache that the model was loaded from (the parts of a diffusers
    pipeline). Of a model loaded by name neither is left, and no commit is stated: the name does not say which
    revision was asked for.
    """
    config: Any = getattr(model, "config", {})
    commit = config.get("_commit_hash") if hasattr(config, "get") else getattr(config, "_commit_hash", None)
    if not commit:
        found = _SNAPSHOT.search(str(getattr(config, "_name_or_path", "") or "").replace("\\", "/"))
        commit = found[1] if found else None
    weights = f"weights {hash_tensors(model)}"
    return f"commit {commit}, {weights}" if commit else weights


# The parameters that define the latent space: a fine-tuned decoder leaves it as it is.
ENCODER_PREFIXES = ("encoder.", "quant_conv.")


def vae_fingerprint(vae: Autoencoder) -> str:
    """Which latent space a model or a store belongs to: "<weights>-<normalisation>-<bfloat16>-<float16>".

    Each part is 16 hexadecimal digits of a SHA-256. The first is one of the encoder side's weights, read as float32,
    and of the padding of its convolutions where that is not zeros: a decoder-only fine-tune keeps it. The second is
    one of the normalisation in the config, the others of the weights rounded to half precision, by which
    `check_fingerprint` knows such a copy.

    Raises:
        ValueError: no encoder parameters, as in a wrapped autoencoder.
    """
    weights, *rounded = (_encoder_digest(vae, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    normalization = json.dumps(LatentNormalization.from_vae(vae).to_config(), sort_keys=True)
    return "-".join((weights, hashlib.sha256(normalization.encode()).hexdigest()[:16], *rounded))


def _encoder_digest(vae: Autoencoder, dtype: torch.dtype) -> str:
    """Of the encoder side's weights rounded to `dtype`, and its padding."""
    digest = hashlib.sha256()
    encoder_side = sorted(
        (name, value) for name, value in vae.state_dict().items() if name.startswith(ENCODER_PREFIXES)
    )
    if not encoder_side:
        raise ValueError(
            f"A fingerprint needs an autoencoder with an encoder; {type(vae).__name__} has no parameter named "
            "encoder.*. Unwrap it first (accelerator.unwrap_model)."
        )
    for name, value in encoder_side:
        digest.update(f"{name}:{tuple(value.shape)}".encode())
        digest.update(value.detach().to(dtype).float().cpu().contiguous().numpy().tobytes())
    for name, module in vae.named_modules():
        padding_mode = module.padding_mode if isinstance(module, torch.nn.Conv2d) else "zeros"
        if name.startswith(ENCODER_PREFIXES) and padding_mode != "zeros":
            digest.update(f"{name}:{padding_mode}".encode())
    return digest.hexdigest()[:16]


def check_fingerprint(expected: str, vae: Autoencoder) -> None:
    """Refuses an autoencoder whose latents are not those that `expected` was taken from.

    A copy rounded to bfloat16 or float16 as a whole passes, in whatever precision it is now.

    Raises:
        ValueError: the encoder's weights or the normalisation differ.
    """
    weights, normalization, *rounded = expected.split("-")
    actual = vae_fingerprint(vae)
    own_weights, own_normalization, *_ = actual.split("-")
    differing = []
    if own_weights not in (weights, *rounded):
        differing.append("encoder weights")
    if own_normalization != normalization:
        differing.append("latent normalisation (latents_mean, latents_std, scaling_factor, shift_factor)")
    if differing:
        raise ValueError(
            f"This autoencoder does not have the latent space expected here: its {' and '.join(differing)} differ "
            f"(fingerprint {actual}, expected {expected}); use the autoencoder that the latents were made with."
        )


def hash_tensors(module: nn.Module) -> str:
    """First 16 hex digits of the sha256 of all names, shapes and values of a module's state."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def weights_digest(*modules: nn.Module) -> str:
    """16 hex digits that change when training does: names, shapes and the first 1024 values of every tensor.

    Tells a resumed run that the weights under the same path are not those it began with, without reading gigabytes.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            head = tensor.detach().flatten()[:1024].float().cpu().numpy()
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + head.tobytes())
    return digest.hexdigest()[:16]
