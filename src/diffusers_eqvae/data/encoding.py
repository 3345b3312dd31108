"""From images to a latent store: the work of training/encode_latents.py, without its command line."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..autoencoders import decode, downsampling_factor, encode, is_deterministic, latent_channels, require_fitting
from ..images import adm_center_crop, evenly_spaced, grid, to_pixels
from ..provenance import autoencoder_identity
from .image_datasets import ImageSource, PixelDataset
from .latent_format import TORCH_DTYPES, StoreSettings
from .latent_store import LatentStore, LatentStoreWriter

logger = logging.getLogger(__name__)


def store_settings(
    vae: nn.Module,
    source: ImageSource,
    *,
    resolution: int,
    dtype: str,
    views: int,
    shard_size: int,
    batch_size: int,
    mixed_precision: str = "no",
    description: dict[str, Any] | None = None,
) -> StoreSettings:
    """The settings of a store of `source` encoded by `vae` at `resolution` pixels.

    Raises:
        ValueError: a resolution that the autoencoder's stride does not divide.
    """
    factor = downsampling_factor(vae)
    require_fitting(resolution, factor)
    deterministic = is_deterministic(vae)
    side = resolution // factor
    described = dict(description or {})
    if source.labels is not None:
        described["labels_sha256"] = hashlib.sha256(source.labels.astype("<i8").tobytes()).hexdigest()
    if (digest := source.files_digest()) is not None:
        described["files_sha256"] = digest
    return StoreSettings(
        num_examples=len(source),
        shape=(latent_channels(vae) * (1 if deterministic else 2), side, side),
        dtype=dtype,
        views=views,
        kind="latents" if deterministic else "moments",
        shard_size=shard_size,
        batch_size=batch_size,
        resolution=resolution,
        downsampling_factor=factor,
        labelled=source.labels is not None,
        encoder=autoencoder_identity(vae)["encoder"]["float32"],
        mixed_precision=mixed_precision,
        source=described,
    )


def check_disk(path: Path, needed_bytes: int) -> str:
    """What the store needs and what the disk has, in words.

    Raises:
        ValueError: the disk that holds `path` has less free space than needed.
    """
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    text = f"{needed_bytes / 1e9:.3f} GB still to write, {free / 1e9:.1f} GB free at {existing}"
    if needed_bytes > free:
        raise ValueError(
            f"The disk is too small for this store: {text}. Choose another --output_dir, --dtype bf16, or no --flip."
        )
    return text


class _ImagesInOrder(Dataset):
    """Examples as a store keeps them: centre crop, label, and the index of the image that was readable."""

    def __init__(self, source: ImageSource, resolution: int) -> None:
        self.source = source
        self.resolution = resolution

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label, used = self.source.read(index)
        pixels = to_pixels(adm_center_crop(image, self.resolution))
        return {"pixels": pixels, "label": -1 if label is None else label, "index": index, "used": used}


@torch.no_grad()
def encode_shards(
    vae: nn.Module,
    source: ImageSource,
    writer: LatentStoreWriter,
    *,
    shards: list[int],
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Encodes and writes the given shards; `progress` is called with the images done since the last call.

    A batch never crosses a shard, so what a forward sees does not depend on who runs it.
    """
    settings = writer.settings
    batches: list[tuple[int, range]] = []
    for shard in shards:
        examples = settings.examples(shard)
        for start in range(0, len(examples), settings.batch_size):
            batches.append((shard, examples[start : start + settings.batch_size]))
    loader = DataLoader(
        _ImagesInOrder(source, settings.resolution),
        batch_sampler=[list(examples) for _, examples in batches],
        num_workers=num_workers,
        pin_memory=torch.device(device).type == "cuda",
    )
    moments: list[Tensor] = []
    labels: list[Tensor] = []
    skipped: list[str] = []
    for (shard, examples), batch in zip(batches, loader, strict=True):
        moments.append(_encode_views(vae, batch["pixels"].to(device, non_blocking=True), settings))
        labels.append(batch["label"])
        replaced = batch["index"][batch["index"] != batch["used"]]
        skipped += [source.name(index) for index in replaced.tolist()]
        if examples[-1] == settings.examples(shard)[-1]:
            writer.write_shard(
                shard,
                torch.cat(moments),
                labels=torch.cat(labels) if settings.labelled else None,
                skipped=skipped,
            )
            moments, labels, skipped = [], [], []
        progress(len(examples))


def _encode_views(vae: nn.Module, pixels: Tensor, settings: StoreSettings) -> Tensor:
    """(B, views, c, h, w) in the store's dtype, on the CPU."""
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    half = settings.mixed_precision == "bf16"
    views = []
    for view in (pixels, pixels.flip(-1))[: settings.views]:
        with torch.autocast(pixels.device.type, torch.bfloat16) if half else nullcontext():
            posterior = encode(vae, view)
        views.append(posterior.moments.to(TORCH_DTYPES[settings.dtype]))
    return torch.stack(views, dim=1).cpu().contiguous()


@torch.no_grad()
def verification_image(
    store: LatentStore, vae: nn.Module, source: ImageSource, *, rows: int = 4, device: torch.device | str = "cpu"
) -> Image.Image:
    """Images beside what the store's posterior means decode to, one column per view."""
    indices = evenly_spaced(len(store), rows)
    images = PixelDataset(source, resolution=store.settings.resolution)
    columns = [torch.stack([images[index]["pixel_values"] for index in indices])]
    for view in range(store.settings.views):
        moments = store.get_many(indices, view=view)["moments"].to(device).float()
        columns.append(decode(vae, store.posterior(moments).mode()).float().cpu())
    captions = ("image", "decoded", "decoded, mirrored")[: len(columns)]
    return grid([list(row) for row in zip(*columns, strict=True)], captions)
