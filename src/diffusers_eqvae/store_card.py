"""The card of a latent store that is published as a data set."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import DatasetCardData
from markupsafe import Markup

from .data.latent_format import MANIFEST, StoreSettings
from .data.latent_store import LatentStore
from .latents import LatentNormalization
from .templates import is_hub_id, render_template

STATISTICS = "mean_std.json"
STORED = {
    "moments": "mean and logvar of every posterior",
    "latents": "deterministic latents",
    "tokens": "tokens, indices of a codebook",
}
SHOWN_CLASSES = 10
# The Hub's categories of size: below so many examples -> its word.
SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}


def is_store(directory: Path) -> bool:
    """Whether a directory is a finished latent store."""
    return (directory / MANIFEST).is_file()


def render_store_card(
    directory: Path, *, repo_id: str | None = None, license: str | None = None, size_bytes: int
) -> str:
    """README.md of a store: what it holds, its autoencoder and normalisation, how to read it.

    Args:
        repo_id: it is loaded from; the directory where None.
        license: of the images, as whoever publishes them states it; the card says that it is unknown where None.
        size_bytes: of all files.

    Example:
        >>> render_store_card(Path("latents/images"), size_bytes=10**9).splitlines()[0]
        '---'
    """
    store = LatentStore(directory)
    settings, source = store.settings, store.settings.source.get("dataset")
    dataset = source if isinstance(source, str) and is_hub_id(source) else None
    mean, std = _normalization(directory, settings)
    card_data = DatasetCardData(
        license=" ".join(license.split()) if license else None,
        source_datasets=[dataset] if dataset else None,
        size_categories=[_size(settings.num_examples)],
        tags=["latents", "diffusers", "diffusers_eqvae"],
    )
    return render_template(
        "latent_store.md",
        card_data=Markup(card_data.to_yaml()),
        name=(repo_id or directory.resolve().name).split("/")[-1],
        repo_id=repo_id or "path/to/this/directory",
        license=license,
        dataset=dataset,
        settings=settings,
        stored=STORED[settings.kind],
        size=f"{size_bytes / 1e6:.1f} MB",
        skipped=len(store.manifest["skipped"]),
        labels=list(store.id2label.values()),
        MOST=SHOWN_CLASSES,
        autoencoder=store.autoencoder or {"class": "unknown"},
        mean=mean,
        std=std,
    )


def _normalization(directory: Path, settings: StoreSettings) -> tuple[list[float], list[float]]:
    """Mean and std per channel; none of tokens, nor where none was written."""
    path = directory / STATISTICS
    if settings.is_tokens or not path.is_file():
        return [], []
    mean, std = LatentNormalization.from_json(path).mean_and_std
    return list(mean), list(std)


def _size(count: int) -> str:
    return next((word for limit, word in SIZES.items() if count < limit), "n>10M")
