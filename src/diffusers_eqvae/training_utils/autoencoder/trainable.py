"""What of an autoencoder is trained (--trainable): its halves, blocks by name, or adapters on them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence

import torch

from ...autoencoder_classes import class_of
from ...autoencoders import Autoencoder, encode, smallest_images
from ...classes import listed
from ...objectives.base import reached_by
from ...provenance import AUTOENCODER_PARTS, weights_of
from ...randomness import preserved_global_state
from ...tokens import decode_with_terms
from ..lora import LORA, LoraArguments, add_adapters

logger = logging.getLogger(__name__)

WHOLE = "full"
NEAREST = 3


def freeze_all_but(vae: Autoencoder, words: Sequence[str], lora: LoraArguments | None = None) -> None:
    """Leaves those weights trainable that `words` mean; what neither encoding nor decoding reads is frozen and named.

    Args:
        words: full; encoder (with quant_conv), codebook or decoder (with post_quant_conv); or names of the module
            tree, such as decoder.up_blocks.3, each with all below it. With lora, alone or beside them, adapters on
            the layers there learn in their place.
        lora: of those adapters.

    Raises:
        ValueError: a name that the autoencoder does not have (the nearest are named), or one without weights.
    """
    named = [word for word in words if word != LORA] or [WHOLE]
    prefixes = tuple(prefix for word in named for prefix in _prefixes(vae, word))
    parts = class_of(vae).frozen
    frozen = tuple(prefix for part in parts for prefix in AUTOENCODER_PARTS[part])
    if LORA in words:
        add_adapters(vae, lora or LoraArguments(), prefixes=prefixes, frozen=frozen)
    else:
        for name, weight in vae.named_parameters():
            weight.requires_grad_(f"{name}.".startswith(prefixes) and not name.startswith(frozen))
    for module in vae.children():
        if not any(weight.requires_grad for weight in module.parameters()):
            module.eval()  # nothing in it moves, statistics of norms neither
    if parts:
        logger.warning("Frozen, since %s keeps what it came with: %s.", type(vae).__name__, listed(parts))
    if not any(weight.requires_grad for weight in vae.parameters()):
        raise ValueError(f"--trainable {' '.join(words)} leaves nothing to train of this {type(vae).__name__}.")
    if unread := _freeze_unread(vae):
        logger.warning("Frozen, since neither encoding nor decoding an image reads them: %s.", listed(unread))


def _prefixes(vae: Autoencoder, word: str) -> tuple[str, ...]:
    """How the names of the parameters begin that a word means."""
    if word == WHOLE:
        return ("",)
    modules = [name for name, _ in vae.named_modules() if name]
    prefixes = AUTOENCODER_PARTS.get(word, (f"{word}.",))
    if word not in AUTOENCODER_PARTS and word not in modules:
        likest = difflib.get_close_matches(word, modules, n=NEAREST, cutoff=0.5) or list(vae._modules)
        raise ValueError(
            f"--trainable {word} is not a part of this {type(vae).__name__}; the nearest are {', '.join(likest)}. It "
            f"takes {WHOLE}, {LORA}, {', '.join(AUTOENCODER_PARTS)}, or names of the module tree."
        )
    if not any(name.startswith(prefixes) for name, _ in vae.named_parameters()):
        raise ValueError(f"--trainable {word} names a part of this {type(vae).__name__} without weights.")
    return prefixes


def _freeze_unread(vae: Autoencoder) -> list[str]:
    """Freezes trainable weights that no gradient can reach, which data parallelism would wait for: their names."""
    with torch.enable_grad(), preserved_global_state():
        posterior = encode(vae, smallest_images(vae))
        decoded = decode_with_terms(vae, posterior.sample(torch.zeros_like(posterior.mean)))
    used = reached_by([posterior.moments, decoded.pixels, *decoded.terms.values()])
    unread = [(name, each) for name, each in vae.named_parameters() if each.requires_grad and id(each) not in used]
    for _, weight in unread:
        weight.requires_grad_(False)
    return [name for name, _ in unread]


def learns(vae: Autoencoder, *parts: str) -> bool:
    """Whether any weight of these parts ("encoder", "codebook", "decoder") is trained."""
    return any(weight.requires_grad for weight in weights_of(vae, *parts))


def keeps_latents(vae: Autoencoder) -> bool:
    """Whether a run leaves latents as they are: stores, and generators trained on them, stay valid."""
    return not learns(vae, "encoder", "codebook")


def refuse_other_latents(vae: Autoencoder, *, pretrained: bool, asked: Mapping[str, str | None]) -> None:
    """Where the encoder is frozen, refuses what would change latents besides weights.

    Args:
        pretrained: whether the encoder has learned anything.
        asked: options that would, by name, as given.
    """
    if not keeps_latents(vae):
        return
    if not pretrained:
        raise ValueError(
            "--trainable leaves the encoder as it is, and one from --model_config has learned nothing; give "
            "--pretrained_model_name_or_path, or train the encoder too."
        )
    for flag, value in asked.items():
        if value is not None:
            raise ValueError(
                f"--{flag} {value} gives other latents, and --trainable leaves the encoder as it is, so that stores "
                f"and generators stay valid; leave --{flag} out, or train the encoder too."
            )
