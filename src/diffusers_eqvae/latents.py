"""Between raw latents and latents: the normalisation, and the statistics it is made from.

This is the only place of the package where latents are shifted or scaled. diffusers' configs know two conventions:

    latents = (raw - mean) * scaling_factor / std      where latents_mean and latents_std are given (SDXL)
    latents = (raw - shift_factor) * scaling_factor    elsewhere (SD: shift 0; SD3)

Some autoencoders keep it elsewhere than in their config (FLUX.2, RAE), perhaps with values that differ by position;
`autoencoder_classes` says where.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .autoencoder_classes import class_of, uncompiled
from .files import read_json, write_json

ENTRIES = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")
MEAN_AND_STD_UNREAD = (
    "The pipelines of Stable Diffusion 1.5, Stable Diffusion 3, FLUX and Sana do not read latents_mean and "
    "latents_std (those of SDXL do)"
)
SHIFT_UNREAD = "The pipelines of Stable Diffusion 1.5 and SDXL do not read shift_factor (those of SD3 and FLUX do)"
TOLERANCE = 0.01  # in standard deviations: what does not matter


def latent_channels(vae: Any) -> int:
    """C of latents (B, C, h, w) of an autoencoder; for a VQ model the width of its codebook."""
    return int(class_of(vae).channels(vae.config))


@dataclass(frozen=True)
class LatentNormalization:
    """An affine map of raw latents, per channel, and its inverse.

    Args:
        mean: of raw latents: one number per channel, or a single one for all (ReaLS), or None.
        std: likewise, positive; given exactly when `mean` is.
        scaling_factor: positive; 1.0 when mean and std are what normalises.
        shift_factor: 0.0 when mean and std are given.
        tile: (p, q) where mean and std also differ by position, and repeat every p rows and q columns: C * p * q
            values, those of a channel side by side and row by row (the packed channels of FLUX.2).

    Raises:
        ValueError: mean without std or the reverse, different lengths, a std or scaling_factor that is not positive,
            a shift_factor beside a mean: the two conventions would contradict each other.

    Example:
        >>> normalization = LatentNormalization(scaling_factor=0.18215)
        >>> latents = normalization.normalize(torch.ones(1, 4, 32, 32))
        >>> torch.allclose(normalization.denormalize(latents), torch.ones(1, 4, 32, 32))
        True
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    tile: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"latents_mean and latents_std must be given together; got {self.mean} and {self.std}.")
        if not (_is_finite(self.shift_factor) and _is_scale(self.scaling_factor)):
            raise ValueError(
                "scaling_factor must be positive and shift_factor finite, as float32 holds them; "
                f"got {self.scaling_factor} and {self.shift_factor}."
            )
        if self.mean is None or self.std is None:
            if self.tile != (1, 1):
                raise ValueError(f"latents_tile={self.tile} says where latents_mean repeats, and there is none.")
            return
        if len(self.mean) % math.prod(self.tile):
            raise ValueError(
                f"latents_mean needs {math.prod(self.tile)} values per channel, for the places of "
                f"latents_tile={self.tile}; got {len(self.mean)} in all."
            )
        if not len(self.mean) == len(self.std) >= 1:
            raise ValueError(
                "latents_mean and latents_std need one value per channel, or one in all; "
                f"got {len(self.mean)} and {len(self.std)} values."
            )
        if not (all(map(_is_finite, self.mean)) and all(map(_is_scale, self.std))):
            raise ValueError(
                "latents_mean must be finite and latents_std positive, as float32 holds them; "
                f"got {self.mean} and {self.std}."
            )
        if self.shift_factor != 0.0:
            raise ValueError(
                f"latents_mean and shift_factor={self.shift_factor} both shift the latents; set shift_factor to 0."
            )

    def normalize(self, raw_latents: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> latents, computed in float32 or better, in the dtype that came."""
        shift, scale = self._shift_and_scale(raw_latents)
        return ((raw_latents.to(_math_dtype(raw_latents)) - shift) * scale).to(raw_latents.dtype)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> raw latents, computed in float32 or better, in the dtype that came."""
        shift, scale = self._shift_and_scale(latents)
        return (latents.to(_math_dtype(latents)) / scale + shift).to(latents.dtype)

    @classmethod
    def from_vae(cls, vae: Any) -> LatentNormalization:
        """What a diffusers autoencoder's config says, or its state where that is what normalises (FLUX.2, RAE).

        Raises:
            ValueError: it says it of another number of channels.
        """
        normalization = cls.from_config(class_of(vae).stated(vae))
        normalization._check_channels(latent_channels(vae))
        return normalization

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LatentNormalization:
        """From latents_mean, latents_std, scaling_factor and shift_factor, each of which may be absent or None.

        Values per channel are read in the shapes C, (C, 1, 1) and (1, C, 1, 1).
        """
        stated: dict[str, Any] = {key: config.get(key) for key in ENTRIES}
        values = {key: None if value is None else _values(key, value) for key, value in stated.items()}
        for key in ("scaling_factor", "shift_factor"):
            if values[key] is not None and np.ndim(stated[key]):
                raise ValueError(f"{key} must be one number; got {stated[key]} of shape {np.shape(stated[key])}.")
        scaling_factor, shift_factor = values["scaling_factor"] or (1.0,), values["shift_factor"] or (0.0,)
        tile = tuple(config.get("latents_tile") or (1, 1))
        return cls(values["latents_mean"], values["latents_std"], scaling_factor[0], shift_factor[0], tile)

    @classmethod
    def from_statistics(cls, statistics: LatentStatistics, *, scalar: bool = False) -> LatentNormalization:
        """To zero mean and unit variance per channel, or over all channels together where `scalar` (ReaLS).

        The scalar form is shift_factor = mean and scaling_factor = 1 / std, which the pipelines of SD3 and FLUX read.
        """
        if scalar:
            return cls(scaling_factor=1.0 / statistics.scalar_std, shift_factor=statistics.scalar_mean)
        return cls(mean=tuple(statistics.mean), std=tuple(statistics.std))

    @property
    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(raw - mean) / std is this normalisation, whatever it is made of; one number each, or one per channel."""
        std = tuple(value / self.scaling_factor for value in self.std or (1.0,))
        return self.mean or (self.shift_factor,), std

    def unread(self, vae: Any) -> str | None:
        """Which pipelines of diffusers do not read this from an autoencoder that it was written to, in a sentence
        without its end, or None."""
        if class_of(vae).pipelines_read_it:
            return None
        if self.mean is not None:
            return MEAN_AND_STD_UNREAD
        shift = abs(self.shift_factor * self.scaling_factor)
        return f"{SHIFT_UNREAD}; it is {shift:.3g} standard deviations" if shift > TOLERANCE else None

    def to_config(self) -> dict[str, Any]:
        """latents_mean, latents_std, scaling_factor, shift_factor as a diffusers autoencoder's config spells them.

        latents_tile, of which diffusers knows nothing, is there where values differ by position.
        """
        by_place = {} if self.tile == (1, 1) else {"latents_tile": list(self.tile)}
        return by_place | {
            "latents_mean": None if self.mean is None else list(self.mean),
            "latents_std": None if self.std is None else list(self.std),
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
        }

    def apply_to(self, vae: Any) -> None:
        """Writes this normalisation into the autoencoder's config, from where save_pretrained and from_vae take it.

        It goes where the class keeps it, and its pipelines in diffusers read it: into the running mean and variance
        of FLUX.2's batch norm, into the buffers of an RAE. A single mean and std is spelled out for every channel,
        which is what diffusers' pipelines expect.

        Raises:
            ValueError: as many means as neither 1 nor the autoencoder's latent channels, or values by position.
        """
        if self.tile != (1, 1):
            raise ValueError(
                f"A normalisation that differs by position (latents_tile={self.tile}) is read, and not written; "
                "measure one per channel."
            )
        config, channels = self.to_config(), latent_channels(vae)
        if self.mean is not None and self.std is not None:
            self._check_channels(channels)
            config["latents_mean"] = repeated(self.mean, channels)
            config["latents_std"] = repeated(self.std, channels)
        class_of(vae).state(uncompiled(vae), config)

    def save_json(self, path: str | os.PathLike[str], *, num_samples: int | None = None) -> None:
        """Writes mean_std.json, atomically: the map (raw - mean) / std that this normalisation is.

        Keys: "mean" and "std", the scalars over all channels (ReaLS' format); "latents_mean" and "latents_std", the
        lists per channel; "num_samples", how many images they were measured on; "latents_tile", where it repeats.
        """
        mean, std = self.mean_and_std
        scalar_mean, scalar_std = over_channels(mean, std)
        content = {
            "mean": scalar_mean,
            "std": scalar_std,
            "latents_mean": list(mean),
            "latents_std": list(std),
            "num_samples": num_samples,
        }
        if self.tile != (1, 1):
            content["latents_tile"] = list(self.tile)
        write_json(path, content)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> LatentNormalization:
        """Reads mean_std.json: the lists per channel where present, else ReaLS' scalars {"mean", "std"}.

        Raises:
            ValueError: neither pair is there.
        """
        content = read_json(path)
        for mean, std in (("latents_mean", "latents_std"), ("mean", "std")):
            if mean in content and std in content:
                try:
                    tile = tuple(content.get("latents_tile") or (1, 1)) if mean == "latents_mean" else (1, 1)
                    return cls(mean=_values(mean, content[mean]), std=_values(std, content[std]), tile=tile)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
        raise ValueError(f'{path} must hold {{"mean": ..., "std": ...}} or "latents_mean" and "latents_std" lists.')

    def _shift_and_scale(self, latents: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """(shift, scale) of latents = (raw - shift) * scale."""
        if self.mean is None or self.std is None:
            return self.shift_factor, self.scaling_factor
        self._check_channels(latents.shape[1])
        scale = tuple(self.scaling_factor / value for value in self.std)
        device, dtype = latents.device, _math_dtype(latents)
        shift_and_scale = [_per_channel(values, self.tile, device, dtype) for values in (self.mean, scale)]
        if self.tile != (1, 1):
            height, width = latents.shape[-2:]
            rows, columns = self.tile
            if height % rows or width % columns:
                raise ValueError(
                    f"This normalisation repeats every {rows} x {columns} positions, which must divide the "
                    f"latents' height and width; got {height} x {width}."
                )
            shift_and_scale = [each.repeat(1, 1, height // rows, width // columns) for each in shift_and_scale]
        return shift_and_scale[0], shift_and_scale[1]

    def _check_channels(self, channels: int) -> None:
        own = 0 if self.mean is None else len(self.mean) // math.prod(self.tile)
        if own not in (0, 1, channels):
            raise ValueError(
                f"This normalisation is for latents of {own} channels; got {channels}. "
                "It belongs to another autoencoder: measure it again on this one."
            )


class LatentStatistics:
    """Exact mean and standard deviation of raw latents, one pass, in float64, mergeable over ranks.

    For a posterior N(m, v) per latent position, raw latents have the mean E[m] and, by the law of total variance, the
    variance Var[m] + E[v]: that of sampling enters exactly, without sampling. Batches are joined by Chan, Golub and
    LeVeque's update (1979), which Welford's is the one-by-one case of. Standard deviations are the population's.

    Example:
        >>> statistics = LatentStatistics()
        >>> statistics.update(torch.tensor([[[[1.0, 3.0]]]]))
        >>> statistics.mean, statistics.std
        ([2.0], [1.0])
    """

    def __init__(self) -> None:
        self.num_samples = 0
        self._count = 0  # latent positions per channel
        self._mean: Tensor | None = None
        self._m2: Tensor | None = None  # sum of squared deviations of the posterior means
        self._variance_sum: Tensor | None = None  # sum of the posterior variances

    def update(self, posterior_mean: Tensor, logvar: Tensor | None = None) -> None:
        """Takes in posteriors (B, C, h, w); `logvar` None = deterministic."""
        if posterior_mean.ndim != 4 or (logvar is not None and logvar.shape != posterior_mean.shape):
            raise ValueError(
                "Statistics take a posterior mean (B, C, h, w) and a logvar of the same shape; got "
                f"{tuple(posterior_mean.shape)} and {None if logvar is None else tuple(logvar.shape)}."
            )
        if posterior_mean.numel() == 0:
            return
        # In place, in one buffer and without transposed copies: this is half of what writing a latent store costs.
        values = posterior_mean.detach().to(torch.float64, copy=True)
        over = (0, 2, 3)
        mean = values.mean(over)
        batch = LatentStatistics()
        batch.num_samples, batch._count = posterior_mean.shape[0], values[:, 0].numel()
        batch._mean = mean.cpu()
        batch._m2 = values.sub_(mean[:, None, None]).square_().sum(over).cpu()
        batch._variance_sum = torch.zeros_like(batch._mean)
        if logvar is not None:
            batch._variance_sum = values.copy_(logvar.detach()).exp_().sum(over).cpu()
        self.merge(batch)

    def merge(self, other: LatentStatistics) -> None:
        """Takes in what `other` has seen, as if it had been seen here."""
        if other._mean is None or other._m2 is None or other._variance_sum is None:
            return
        if self._mean is None or self._m2 is None or self._variance_sum is None:
            self._mean, self._m2 = other._mean.clone(), other._m2.clone()
            self._variance_sum = other._variance_sum.clone()
        else:
            if len(self._mean) != len(other._mean):
                raise ValueError(
                    "Only statistics of equally many latent channels can be merged; "
                    f"got {len(self._mean)} and {len(other._mean)}."
                )
            delta, total = other._mean - self._mean, self._count + other._count
            self._mean = self._mean + delta * (other._count / total)
            self._m2 = self._m2 + other._m2 + delta.square() * (self._count * other._count / total)
            self._variance_sum = self._variance_sum + other._variance_sum
        self._count += other._count
        self.num_samples += other.num_samples

    @property
    def mean(self) -> list[float]:
        """Per channel."""
        return self._moments()[0].tolist()

    @property
    def std(self) -> list[float]:
        """Per channel, of samples of the posteriors."""
        return self._moments()[1].sqrt().tolist()

    @property
    def scalar_mean(self) -> float:
        """Over all channels together."""
        return over_channels(self.mean, self.std)[0]

    @property
    def scalar_std(self) -> float:
        """Over all channels together, which includes how the channels' means differ."""
        return over_channels(self.mean, self.std)[1]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain numbers that survive JSON bit for bit."""
        state: dict[str, Any] = {"num_samples": self.num_samples, "count": self._count}
        for name, value in (("mean", self._mean), ("m2", self._m2), ("variance_sum", self._variance_sum)):
            state[name] = None if value is None else value.tolist()
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> LatentStatistics:
        """The inverse of `state_dict`."""
        statistics = cls()
        statistics.num_samples, statistics._count = int(state["num_samples"]), int(state["count"])
        if statistics._count:
            statistics._mean, statistics._m2, statistics._variance_sum = (
                torch.tensor(state[name], dtype=torch.float64) for name in ("mean", "m2", "variance_sum")
            )
        return statistics

    def _moments(self) -> tuple[Tensor, Tensor]:
        if self._mean is None or self._m2 is None or self._variance_sum is None:
            raise ValueError("Statistics need at least one posterior; call update() first.")
        return self._mean, (self._m2 + self._variance_sum) / self._count


@lru_cache(maxsize=32)
def _per_channel(values: tuple[float, ...], tile: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1, C, p, q); kept, since a copy to the device would wait for it at every step."""
    with torch.inference_mode(False):  # a tensor born in inference mode could not serve a later training step
        return torch.tensor(values, dtype=dtype, device=device).view(1, -1, *tile)


def _math_dtype(latents: Tensor) -> torch.dtype:
    return torch.promote_types(latents.dtype, torch.float32)


_LIMITS = torch.finfo(torch.float32)


def _is_finite(value: float) -> bool:
    return abs(value) <= _LIMITS.max


def _is_scale(value: float) -> bool:
    return _LIMITS.tiny <= value <= _LIMITS.max


def over_channels(mean: Sequence[float], std: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over all channels of equal size, from those of each."""
    center = math.fsum(mean) / len(mean)
    variance = math.fsum(s**2 + (m - center) ** 2 for m, s in zip(mean, std, strict=True)) / len(mean)
    return center, math.sqrt(variance)


def repeated(values: tuple[float, ...], channels: int) -> list[float]:
    return list(values) * (channels if len(values) == 1 else 1)


def _values(key: str, value: Any) -> tuple[float, ...]:
    """One number, or one per channel in the shapes C, (C, 1, 1) or (1, C, 1, 1)."""
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    flat = array.ndim <= 1 or array.shape in ((array.size, 1, 1), (1, array.size, 1, 1))
    if array.dtype.kind not in "if" or not array.size or not flat:
        shape = "no numbers" if array.dtype.kind not in "if" else f"the shape {array.shape}"
        raise ValueError(
            f"{key} must be a number, or one per channel in the shape C, (C, 1, 1) or (1, C, 1, 1); it has {shape}."
        )
    return tuple(float(each) for each in array.ravel())
