"""From images to a latent store: the work of training/encode_latents.py, without its command line."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..autoencoders import (
    decode,
    downsampling_factor,
    encode,
    encoder_features,
    is_deterministic,
    latent_channels,
    require_fitting,
)
from ..images import adm_center_crop, evenly_spaced, grid, to_pixels
from ..provenance import autoencoder_identity
from ..tokens import codebook, decode_tokens, quantize
from .image_datasets import ImageSource, PixelDataset
from .image_features import FeatureNetwork
from .latent_format import TORCH_DTYPES, StoreSettings, feature_tensor
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
        settings: dtype, views, shard_size, batch_size, mixed_precision and features of `StoreSettings`.

    Example:
        >>> options = {"dtype": "bfloat16", "views": 2, "shard_size": 4096, "batch_size": 32}
        >>> store_settings(vae, source, resolution=256, description={"dataset": "photographs"}, **options).shape
        (8, 32, 32)
    """
    factor, deterministic = downsampling_factor(vae), is_deterministic(vae)
    require_fitting(resolution, vae)
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


def describe_features(settings: StoreSettings) -> list[str]:
    """What each kind of features costs, in words.

    Example:
        >>> describe_features(settings)
        ['features vae_encoder: 512 x 16 x 16 float16 = 262 kB a view, 16 times the moments, 1.07 GB in all']
    """
    own = settings.without(settings.features)
    latents = (own.bytes(1) - 8 * own.labelled) / own.views
    views = settings.num_examples * settings.views
    return [
        f"features {name}: {' x '.join(map(str, each.shape))} {each.dtype} = {each.bytes / 1e3:.3g} kB a view, "
        f"{each.bytes / latents:.3g} times the {settings.tensor}, {views * each.bytes / 1e9:.3g} GB in all"
        for name, each in settings.features.items()
    ]


class _ImagesInOrder(Dataset):
    """Examples as a store keeps them: centre crop, label, and the index of the image that was readable."""

    def __init__(self, source: ImageSource, resolution: int) -> None:
        self.source = source
        self.resolution = resolution

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label, used = self.source.read(index)
        pixels = to_pixels(adm_center_crop(image, self.resolution), self.source.channels)
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
    networks: Sequence[FeatureNetwork] = (),
    kept: Callable[[int], Mapping[str, Any]] = lambda shard: {},
) -> Iterator[dict[str, Any]]:
    """Yields each of the shards as the arguments of `LatentStoreWriter.write_shard`.

    A batch never crosses a shard, so what a forward sees does not depend on who runs it. `progress` is called with the
    images encoded since the last call. What `kept` gives of a shard (`LatentStoreWriter.kept`) is not computed again.

    Args:
        networks: those that give the features in `settings`.

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
    for (shard, examples), batch in zip(batches, loader, strict=True):
        if examples[0] == settings.examples(shard)[0]:
            held = dict(kept(shard))
            rows = {settings.tensor: held["moments"], **held["features"]} if held else {}
            parts: dict[str, list[Tensor]] = {name: [] for name in settings.rows if name not in rows}
            labels, skipped = [], []
        pixels = batch["pixels"].to(device, non_blocking=True)
        for name, values in _encode_views(vae, pixels, settings, networks, wanted=parts).items():
            parts[name].append(values)
        labels.append(batch["label"])
        replaced = batch["index"][batch["index"] != batch["used"]]
        skipped += [source.name(index) for index in replaced.tolist()]
        progress(len(examples))
        if examples[-1] == settings.examples(shard)[-1]:
            rows |= {name: torch.cat(values) for name, values in parts.items()}
            known = torch.cat(labels) if settings.labelled else None
            if held and (held["skipped"] != skipped or (known is not None and not torch.equal(held["labels"], known))):
                raise DataError(
                    f"Other images of shard {shard} can be read now than when it was encoded, so features would stand "
                    "beside latents of others; encode the data into another directory."
                )
            moments = rows.pop(settings.tensor)
            yield {"shard": shard, "moments": moments, "labels": known, "skipped": skipped, "features": rows}


def _encode_views(
    vae: nn.Module,
    pixels: Tensor,
    settings: StoreSettings,
    networks: Sequence[FeatureNetwork] = (),
    *,
    wanted: Container[str],
) -> dict[str, Tensor]:
    """Those of `settings.rows` that are wanted, (B, views, ...) in the store's dtypes, on the CPU."""
    asked = [each for each in networks if any(feature_tensor(name) in wanted for name in each.features)]
    half = settings.mixed_precision == "bf16"
    views = []
    for view in (pixels, pixels.flip(-1))[: settings.views]:
        given: dict[str, Tensor] = {}
        with torch.autocast(pixels.device.type, torch.bfloat16) if half else nullcontext():
            seen: list[Tensor] = []
            if settings.tensor in wanted or any(each.reads_encoder for each in asked):
                with encoder_features(vae) as seen:
                    posterior = encode(vae, view.contiguous(memory_format=torch.channels_last))
                given[settings.tensor] = posterior.moments
            for each in asked:
                given |= each(view, seen)
        if settings.is_tokens and settings.tensor in wanted:
            given[settings.tensor] = quantize(posterior.mode(), codebook(vae)).tokens
        dtypes = {name: TORCH_DTYPES[dtype] for name, (_, dtype) in settings.rows.items() if name in wanted}
        views.append({name: given[name].to(dtype) for name, dtype in dtypes.items()})
    return {name: torch.stack([view[name] for view in views], dim=1).cpu().contiguous() for name in views[0]}


def _distance(store: LatentStore, name: str, stored: Tensor, fresh: Tensor) -> float:
    """In standard deviations, of the means of moments; the share of tokens that differ."""
    if name == "tokens":
        return float((stored.int() != fresh.int()).float().mean())
    values = [each.float() for each in (stored, fresh)]
    means = [store.posterior(each).mean for each in values] if name == store.settings.tensor else values
    return float((means[0] - means[1]).abs().mean() / means[1].std().clamp_min(1e-6))


@torch.no_grad()
def verify_store(
    store: LatentStore,
    vae: nn.Module,
    source: ImageSource,
    *,
    networks: Sequence[FeatureNetwork] = (),
    rows: int = 16,
    device: torch.device | str = "cpu",
) -> None:
    """Reads the whole store against its digests, and encodes evenly spaced images again, whose rows must agree.

    Raises:
        ValueError: a damaged shard, or a row whose means are more than a tenth of their standard deviation away (of
            whose tokens more than a tenth are others, or whose features are as far away).

    Example:
        >>> verify_store(LatentStore("latents/images", vae=vae), vae, source)
    """
    store.verify()
    store.read_features(*store.settings.features)
    images, settings = _ImagesInOrder(source, store.settings.resolution), store.settings
    for index in evenly_spaced(len(store), rows):
        pixels = images[index]["pixels"][None].to(device)
        fresh = _encode_views(vae, pixels, settings, networks, wanted=settings.rows)
        for view, name in product(range(settings.views), fresh):
            stored = store.get_many([index], view=view)[name]
            distance = _distance(store, name, stored, fresh[name][:, view])
            if distance > 0.1:
                raise DataError(
                    f"Row {index} of {store.path} is not what {source.name(index)} encodes to now ({name}: "
                    f"{distance:.2g} away, where .1 is allowed); encode the images into another directory."
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
