"""From images to a latent store: the work of training/encode_latents.py, without its command line."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
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
from ..tokens import codebook, decode_tokens, quantize
from .image_datasets import ImageSource, PixelDataset
from .latent_format import TORCH_DTYPES, StoreSettings
from .latent_store import LatentStore
from .order import leave_interrupts
from .report import DataError

logger = logging.getLogger(__name__)


def store_settings(
    vae: nn.Module,
    source: ImageSource,
    *,
    resolution: int,
    description: dict[str, Any],
    tokens: bool = False,
    **settings: Any,
) -> StoreSettings:
    """The settings of a store of `source` encoded by `vae` as centre crops of `resolution` pixels.

    Args:
        tokens: store the tokens of a codebook, as uint16, instead of posteriors.
        description: names of the data; their identity is added.
        settings: dtype, views, shard_size, batch_size and mixed_precision of `StoreSettings`.

    Example:
        >>> options = {"dtype": "bfloat16", "views": 2, "shard_size": 4096, "batch_size": 32}
        >>> store_settings(vae, source, resolution=256, description={"dataset": "photographs"}, **options).shape
        (8, 32, 32)
    """
    factor, deterministic = downsampling_factor(vae), is_deterministic(vae)
    require_fitting(resolution, factor)
    side = resolution // factor
    source.expect(resolution)
    identity = autoencoder_identity(vae)
    if tokens:
        settings |= {"kind": "tokens", "shape": (side, side), "dtype": "uint16", "codebook_size": len(codebook(vae))}
        settings |= {"codebook": identity["codebook"]["float32"]}
    else:
        channels = latent_channels(vae) * (1 if deterministic else 2)
        settings |= {"kind": "latents" if deterministic else "moments", "shape": (channels, side, side)}
    return StoreSettings(
        num_examples=len(source),
        resolution=resolution,
        downsampling_factor=factor,
        labelled=source.labels is not None,
        encoder=identity["encoder"]["float32"],
        source={**description, **source.identity},
        **settings,
    )


def check_disk(path: Path, needed_bytes: int) -> str:
    """What the store needs and what the disk has, in words; refuses a disk that is too small.

    Example:
        >>> check_disk(Path("latents/images"), 16_384)
        '0.000 GB still to write, 81.2 GB free at latents'
    """
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    text = f"{needed_bytes / 1e9:.3f} GB still to write, {free / 1e9:.1f} GB free at {existing}"
    if needed_bytes > free:
        raise ValueError(
            f"The disk is too small for this store: {text}. Choose another directory, a dtype of 16 bits, or one view."
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
    settings: StoreSettings,
    shards: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    progress: Callable[[int], object] = lambda count: None,
) -> Iterator[dict[str, Any]]:
    """Yields each of the shards as the arguments of `LatentStoreWriter.write_shard`.

    A batch never crosses a shard, so what a forward sees does not depend on who runs it. `progress` is called with the
    images encoded since the last call.

    Example:
        >>> for shard in encode_shards(vae, source, writer.settings, writer.pending()[0]):
        ...     writer.write_shard(**shard)
    """
    batches: list[tuple[int, range]] = []
    for shard in shards:
        examples = settings.examples(shard)
        for start in range(0, len(examples), settings.batch_size):
            batches.append((shard, examples[start : start + settings.batch_size]))
    loader = DataLoader(
        _ImagesInOrder(source, settings.resolution),
        batch_sampler=[list(examples) for _, examples in batches],
        num_workers=num_workers,
        worker_init_fn=leave_interrupts,
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
        progress(len(examples))
        if examples[-1] == settings.examples(shard)[-1]:
            known = torch.cat(labels) if settings.labelled else None
            yield {"shard": shard, "moments": torch.cat(moments), "labels": known, "skipped": skipped}
            moments, labels, skipped = [], [], []


def _encode_views(vae: nn.Module, pixels: Tensor, settings: StoreSettings) -> Tensor:
    """(B, views, c, h, w), or (B, views, h, w) of tokens, in the store's dtype, on the CPU."""
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    half = settings.mixed_precision == "bf16"
    views = []
    for view in (pixels, pixels.flip(-1))[: settings.views]:
        with torch.autocast(pixels.device.type, torch.bfloat16) if half else nullcontext():
            posterior = encode(vae, view)
        tokens = quantize(posterior.mode(), codebook(vae)).tokens if settings.is_tokens else None
        values = posterior.moments if tokens is None else tokens
        views.append(values.to(TORCH_DTYPES[settings.dtype]))
    return torch.stack(views, dim=1).cpu().contiguous()


def _distance(store: LatentStore, stored: Tensor, fresh: Tensor) -> float:
    """In standard deviations of the means; the share of tokens that differ."""
    if store.settings.is_tokens:
        return float((stored.int() != fresh.int()).float().mean())
    means = [store.posterior(each.float()).mean for each in (stored, fresh)]
    return float((means[0] - means[1]).abs().mean() / means[1].std().clamp_min(1e-6))


@torch.no_grad()
def verify_store(
    store: LatentStore, vae: nn.Module, source: ImageSource, *, rows: int = 16, device: torch.device | str = "cpu"
) -> None:
    """Reads the whole store against its digests, and encodes evenly spaced images again, whose rows must agree.

    Raises:
        ValueError: a damaged shard, or a row whose means are more than a tenth of their standard deviation away (of
            whose tokens more than a tenth are others).

    Example:
        >>> verify_store(LatentStore("latents/images", vae=vae), vae, source)
    """
    store.verify()
    images, settings = _ImagesInOrder(source, store.settings.resolution), store.settings
    for index in evenly_spaced(len(store), rows):
        fresh = _encode_views(vae, images[index]["pixels"][None].to(device), settings)[0]
        for view in range(settings.views):
            stored = store.get_many([index], view=view)[settings.tensor]
            distance = _distance(store, stored, fresh[view : view + 1])
            if distance > 0.1:
                raise DataError(
                    f"Row {index} of {store.path} is not what {source.name(index)} encodes to now "
                    f"({distance:.2g} away, where .1 is allowed); encode the images into another directory."
                )


@torch.no_grad()
def verification_image(
    store: LatentStore, vae: nn.Module, source: ImageSource, *, rows: int = 4, device: torch.device | str = "cpu"
) -> Image.Image:
    """Images beside what the store's posterior means decode to, one column per view.

    Example:
        >>> verification_image(LatentStore("latents/images", vae=vae), vae, source).save("verify.png")
    """
    indices = evenly_spaced(len(store), rows)
    images = PixelDataset(source, resolution=store.settings.resolution)
    columns = [torch.stack([images[index]["pixel_values"] for index in indices])]
    for view in range(store.settings.views):
        stored = store.get_many(indices, view=view)[store.settings.tensor].to(device)
        if store.settings.is_tokens:
            pixels = decode_tokens(vae, stored.long())
        else:
            pixels = decode(vae, store.posterior(stored.float()).mode())
        columns.append(pixels.float().cpu())
    captions = ("image", "decoded", "decoded, mirrored")[: len(columns)]
    return grid([list(row) for row in zip(*columns, strict=True)], captions)
