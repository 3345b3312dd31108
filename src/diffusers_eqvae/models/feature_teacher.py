"""A frozen vision foundation model that gives every image region a feature: what latents are aligned with."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pretrained import hub_file, looking_for
from ..provenance import hash_file, weights_hash

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SIGLIP = "siglip_vision_model"
# The mean and standard deviation of the images that each was trained on.
MODEL_TYPES = dict.fromkeys(("dinov2", "dinov2_with_registers", "dinov3_vit"), _IMAGENET)
MODEL_TYPES[_SIGLIP] = ((0.5,) * 3, (0.5,) * 3)


class FeatureTeacher(nn.Module):
    """Patch and global features of DINOv2 (with or without registers), DINOv3 or SigLIP, from transformers.

    Images are brought to the model's mean and standard deviation (ImageNet's; .5 for SigLIP) and resized (bicubic,
    without antialiasing) to a square of `image_size`, or a rectangle of about as many pixels: 448 px and patches of 14
    give 32x32 tokens, one per latent position of a 256 px image at f8 (ReaLS). Both happen in float32. Register tokens
    are dropped. SigLIP has no CLS token, so its global feature is None. No parameter requires a gradient, no graph is
    kept, and the module never leaves eval mode.

    Differs from the reference: VA-VAE feeds pixels in [-1, 1] without ImageNet's normalisation.

    Args:
        model: the transformers model.
        image_size: side in pixels of the squares that the model sees; a multiple of its patch size.
        final_norm: give the tokens after the model's last LayerNorm, or (False) before it, as DINOv2's linear depth
            heads read them and an alignment network predicts them.

    Example:
        >>> teacher = FeatureTeacher.from_pretrained("facebook/dinov2-base", image_size=448)
        >>> patch, cls = teacher(torch.zeros(1, 3, 256, 256))
        >>> patch.shape, cls.shape
        (torch.Size([1, 768, 32, 32]), torch.Size([1, 768]))
    """

    model: Any
    mean: Tensor
    std: Tensor
    final_norm: bool | None

    def __init__(self, model: Any, *, image_size: int = 448, final_norm: bool = True):
        super().__init__()
        config = model.config
        if config.model_type not in MODEL_TYPES:
            raise ValueError(
                f"A feature teacher must be one of {', '.join(MODEL_TYPES)}; got a model of type "
                f"{config.model_type!r}."
            )
        if image_size <= 0 or image_size % config.patch_size:
            raise ValueError(
                f"The teacher's image size must be a positive multiple of its patch size {config.patch_size}; got "
                f"{image_size}."
            )
        self.final_norm = final_norm
        self.feature_size = int(config.hidden_size)
        self.has_global = config.model_type != _SIGLIP
        # Tokens come as [CLS, registers, patches].
        self.prefix_tokens = int(self.has_global) + int(getattr(config, "num_register_tokens", 0))
        self._set(model, image_size, int(config.patch_size), *MODEL_TYPES[config.model_type])

    def _set(self, model: Any, image_size: int, patch_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        """What every teacher has: the frozen model, and how images are shown to it."""
        self.model = model
        self.image_size, self.patch_size = image_size, patch_size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        image_size: int = 448,
        final_norm: bool = True,
        revision: str | None = None,
    ) -> FeatureTeacher:
        """The teacher of a Hub name ("facebook/dinov2-with-registers-large") or a directory, in float32."""
        model = load_vision_model(name_or_path, revision=revision)
        return cls(model, image_size=image_size, final_norm=final_norm)

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Which features these are: what an `AlignmentNetwork` notes of them in its config.

        The hash reads all weights once; of a directory only the last part of its path is noted.
        """
        name = str(getattr(self.model.config, "_name_or_path", "") or "")
        return {
            "feature_size": self.feature_size,
            "norm_eps": None if self.last_norm is None else self.last_norm.eps,
            "teacher": Path(name).name if Path(name).is_dir() else name or None,
            "teacher_type": self.model.config.model_type,
            "teacher_hash": weights_hash(self.model),
            "teacher_layers": [int(self.model.config.num_hidden_layers)],
            "teacher_image_size": self.image_size,
        }

    @property
    def last_norm(self) -> nn.LayerNorm | None:
        """The LayerNorm after the last block, None of a network without one."""
        names = ("norm", "layernorm", "post_layernorm")
        model = getattr(
            self.model, "vision_model", self.model
        )  # where transformers 5.0 has all of SigLIP's vision model
        return next(getattr(model, name) for name in names if hasattr(model, name))

    def train(self, mode: bool = True) -> FeatureTeacher:
        """Stays in eval mode whatever its parent does: features are targets, free of dropout and layer drop."""
        return super().train(False)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) the model sees: about the pixels of a square of `image_size`, in whole patches, hardly stretched."""
        scale = self.image_size / math.sqrt(height * width) / self.patch_size
        return round(height * scale) * self.patch_size, round(width * scale) * self.patch_size

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(h, w) of the features of images of the model's size: one for every patch."""
        height, width = images.shape[-2:]
        return height // self.patch_size, width // self.patch_size

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Patch features (B, D, h, w) and the global feature (B, D), float32, of pixels (B, 3 or 1, H, W) in [-1, 1];
        None where the model has no global one."""
        size = self.input_size(*pixels.shape[-2:])
        images = ((pixels.float() + 1.0) / 2.0 - self.mean) / self.std
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
        return self.look(images.to(next(self.model.parameters(), self.mean).dtype))

    def look(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `forward` gives, of normalised images of the model's size and number format."""
        # The others fit their table of positions to the image by themselves.
        options = {} if self.has_global else {"interpolate_pos_encoding": True}
        if self.final_norm:
            tokens = self.model(pixel_values=images, **options).last_hidden_state.float()
        else:
            tokens = self.model(pixel_values=images, output_hidden_states=True, **options).hidden_states[-1].float()
        patch = tokens[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, self.grid(images))
        return patch.contiguous(), tokens[:, 0] if self.has_global else None


def teacher_identity(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Which files a vision model is, without loading it: its name, and a hash of config and weights where they are.

    Of a directory the name is the last part of its path; of a Hub name, all of it, and the files are those in the
    cache or on the Hub.

    Example:
        >>> teacher_identity("facebook/dinov2-base")
        {'teacher': 'facebook/dinov2-base', 'files': '5e0b1c7f9d0c3f7e'}
    """
    name = str(name_or_path)
    files = [hub_file(name, file) for file in ("config.json", "model.safetensors")]
    digest = None if None in files else hashlib.sha256("".join(map(hash_file, filter(None, files))).encode())
    called = Path(name).resolve().name if Path(name).is_dir() else name
    return {"teacher": called, "files": digest.hexdigest()[:16] if digest else None}


def teacher_difference(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """How two of `teacher_identity` differ, in words, or None: in their files where both are known, else by name."""
    known = stored.get("files") and given.get("files")
    if stored["files" if known else "teacher"] == given["files" if known else "teacher"]:
        return None
    return f"{stored['teacher']} ({stored.get('files')}) is not {given['teacher']} ({given.get('files')})"


def load_vision_model(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Any:
    """A transformers model in float32, of a directory or a Hub name; weights from model.safetensors only, and all.

    Example:
        >>> load_vision_model("facebook/dinov2-large").config.hidden_size
        1024
    """
    from transformers import AutoModel

    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    options |= {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    try:
        with looking_for(name_or_path, "a feature network of transformers") as known:
            model, found = AutoModel.from_pretrained(name_or_path, **options, **known)
    except OSError as error:
        where = "" if Path(name_or_path).exists() else f" ({str(error).rstrip('.')})"
        raise FileNotFoundError(
            f"There are no weights at {name_or_path}, which must be a directory with config.json and "
            f"model.safetensors, or a Hub name{where}. Fetch it with `hf download` to a directory, and name that."
        ) from error
    except Exception as error:  # a config or weights of another shape fail in many ways
        raise ValueError(
            f"The config.json and model.safetensors of {name_or_path} are not those of a model: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    if missing := len(found["missing_keys"]):
        # transformers draws them at random, and says so in a warning only.
        raise ValueError(
            f"{name_or_path} must hold all weights of a {model.config.model_type}; it lacks {missing} tensors."
        )
    return model.vision_model if model.config.model_type == "siglip" else model
