"""Latent store: the posteriors of a data set in a few memory-mapped safetensors files.

    store/
      manifest.json                what the store holds (see `LatentStoreWriter.finish`), and a digest of each shard
      shard-00000.safetensors      "moments" (n, views, c, h, w), or "tokens" (n, views, h, w) uint16; "labels" (n,)
                                   int64 where the data has labels; "crc32" (n, views) int64 of each row with its
                                   label, checked when it is first read; "features.NAME" (n, views, F, h, w) and
                                   "crc32.features.NAME", of each row with its latents' crc32
      mean_std.json, vae/          the normalisation and the autoencoder it was made with (training/encode_latents.py)

Shard s holds the examples s * shard_size ... in the data set's order, whoever wrote it; its header carries the
settings and its own statistics, so a store is the same for any number of processes and any number of restarts.
c = 2C for moments (mean and logvar) and C for a deterministic autoencoder. A second view is the mirrored image.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..autoencoders import Posterior
from ..classes import ClassTable
from ..latents import LatentStatistics
from ..provenance import require_same_autoencoder
from .latent_format import (
    LABEL_BITS,
    NUMPY_DTYPES,
    TORCH_DTYPES,
    ShardHeader,
    StoreSettings,
    checksum_tensor,
    feature_tensor,
    read_manifest,
    shard_name,
)
from .report import DataError


class _Rows(NamedTuple):
    """Every view of a shard's tensor as a row (n views, ...), the rows' crc32, and which rows agreed with theirs."""

    values: np.ndarray
    checksums: np.ndarray
    checked: bytearray


class LatentStore(Dataset):
    """Random access to a store: {"moments": (c, h, w) in the stored dtype, "class_labels": id where labelled}; in a
    store of tokens {"tokens": (h, w) uint16, ...}; and "features.NAME" of those that `read_features` chose.

    Args:
        path: directory of the store.
        vae: refuse the store unless it was made with this autoencoder and normalisation.

    `get_many` (which `DrawDataset` and `__getitems__` use) reads a batch in one call. A store that is unfinished,
    damaged, of another format or of another autoencoder is refused when it is opened.

    Example:
        >>> store = LatentStore("latents/images", vae=vae)
        >>> store.posterior(store.get_many(range(16))["moments"].float()).sample().shape
        torch.Size([16, 4, 32, 32])
    """

    def __init__(self, path: str | os.PathLike[str], *, vae: nn.Module | None = None) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.settings = StoreSettings(**self.manifest["settings"])
        self._headers: list[ShardHeader] = []
        for shard in range(self.settings.num_shards):
            self._headers.append(ShardHeader.read(self.path / shard_name(shard)))
            self._headers[-1].check(self.path / shard_name(shard), self.settings, shard)
            if self._headers[-1].digest != self.manifest["shards"][shard]["header"]:
                raise self._damaged(shard, "its header is not the one that the manifest knows")
        self._maps: dict[str, dict[int, _Rows]] = {}
        self._labels: np.ndarray | None = None
        self.reading: tuple[str, ...] = ()
        if vae is not None:
            require_same_autoencoder(self.autoencoder, vae, whose=f"the store {self.path}")

    def read_features(self, *names: str) -> None:
        """Makes every batch hold these features too, of the same view as the latents; the others are left unread.

        Raises:
            ValueError: one that the store does not hold.
        """
        for name in names:
            if name not in self.settings.features:
                held = ", ".join(self.settings.features) or "none"
                raise ValueError(f"The store {self.path} does not hold the features {name}, but {held}.")
        self.reading = names

    @property
    def autoencoder(self) -> dict[str, Any] | None:
        """`autoencoder_identity` of the store's own autoencoder, normalisation included."""
        return self.manifest["autoencoder"]

    @property
    def classes(self) -> ClassTable:
        """Names and counts by class id; empty without labels."""
        return ClassTable.from_config(self.manifest) or ClassTable()

    @property
    def id2label(self) -> dict[int, str]:
        return self.classes.id2label

    @property
    def num_classes(self) -> int:
        """Of the data set, including classes without examples; 0 without labels."""
        return len(self.classes)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of the latents, or (h, w) of tokens."""
        if self.settings.is_tokens:
            return self.settings.shape
        channels, height, width = self.settings.shape
        return channels if self.settings.kind == "latents" else channels // 2, height, width

    @property
    def labels(self) -> np.ndarray | None:
        """Class ids (N,) int64, or None."""
        if self._labels is None and self.settings.labelled:
            maps = (h.map(self.path / shard_name(s), "labels", np.int64) for s, h in enumerate(self._headers))
            labels = np.concatenate(list(maps))
            within = labels.min() >= 0 and labels.max() < len(self.classes)
            if not within or ClassTable.of_labels(labels, self.classes.names) != self.classes:
                raise DataError(
                    f"The labels in {self.path} are not those that its manifest counted, so a shard is damaged: "
                    "verify the store, which names it."
                )
            self._labels = labels
        return self._labels

    @property
    def identity(self) -> dict[str, Any]:
        """What the store is: its data (`provenance.data_identity`) and the digest of its manifest, so of everything.

        Example:
            >>> store.identity
            {'store': '1c7f...', 'images': 1382, 'files': '81c0...', ...}
        """
        return {"store": self.manifest["digest"], **self.settings.source}

    def verify(self) -> None:
        """Reads everything: refuses a shard whose content is not what was written, and names it."""
        for shard, header in enumerate(self._headers):
            if header.content_digest(self.path / shard_name(shard)) != header.notes["content"]:
                raise self._damaged(shard, "its content does not agree with its digest")

    def _damaged(self, shard: int, reason: str) -> DataError:
        return DataError(
            f"The shard {self.path / shard_name(shard)} is damaged: {reason}; delete it and encode the data again "
            "with the same settings: only this shard is written anew."
        )

    def statistics(self) -> LatentStatistics:
        """Mean and standard deviation of the latents; tokens have none."""
        self._require_latents()
        return LatentStatistics.from_state_dict(self.manifest["statistics"])

    @property
    def token_counts(self) -> list[int] | None:
        """How often each vector of the codebook is stored; None of latents."""
        return self.manifest["statistics"].get("token_counts")

    def _require_latents(self) -> None:
        if self.settings.is_tokens:
            raise ValueError(f"The store {self.path} holds tokens, not latents; encode it as posteriors for those.")

    def posterior(self, moments: Tensor) -> Posterior:
        """Of a batch of moments (B, c, h, w)."""
        self._require_latents()
        return Posterior.from_moments(moments, deterministic=self.settings.kind == "latents")

    def __len__(self) -> int:
        return self.settings.num_examples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.get(index)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return self.get_many(indices)

    def get(self, index: int, generator: np.random.Generator | None = None) -> dict[str, Tensor]:
        """One example; the view is drawn from `generator`, and the first without one."""
        words = None if generator is None else generator.integers(2**64, size=1, dtype=np.uint64)
        return {key: value[0] for key, value in self.get_many([index], words).items()}

    def get_many(self, indices: Sequence[int], words: np.ndarray | None = None, *, view: int = 0) -> dict[str, Tensor]:
        """A batch: {"moments": (B, c, h, w) or "tokens": (B, h, w); "class_labels": (B,) int64 where labelled}, and
        "features.NAME" (B, F, h, w) or (B, F) of each in `reading`, in its stored dtype.

        Args:
            indices: B examples, each in [0, N).
            words: (B,) uint64, random; bit 63 chooses the view of each example.
            view: which view without `words`: 0 as is, 1 mirrored.
        """
        if not 0 <= view < self.settings.views:
            raise IndexError(f"This store has {self.settings.views} view(s) of each image; got view {view}.")
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"Indices must lie in [0, {len(self)}); got {wanted.min()}..{wanted.max()}.")
        views = np.full(len(wanted), view)
        if words is not None and self.settings.views == 2:
            views = (words >> np.uint64(63)).astype(np.int64)
        labels = None if self.labels is None else self.labels[wanted]
        seeds = [0] * len(wanted) if labels is None else (labels & LABEL_BITS).tolist()
        shards, rows = np.divmod(wanted, self.settings.shard_size)
        places = list(zip(shards.tolist(), (self.settings.views * rows + views).tolist(), strict=True))
        batch = {self.settings.tensor: self._read(self.settings.tensor, places, seeds)}
        if self.reading:
            seeds = [int(self._rows(shard, self.settings.tensor).checksums[row]) for shard, row in places]
        for name in map(feature_tensor, self.reading):
            batch[name] = self._read(name, places, seeds)
        return batch | ({} if labels is None else {"class_labels": torch.from_numpy(labels)})

    def _read(self, name: str, places: list[tuple[int, int]], seeds: list[int]) -> Tensor:
        """Rows of a tensor, whose crc32 begin with `seeds`: refuses one that is not what was written.

        A row is checked when this process reads it first: later ones come from the same pages.

        Args:
            places: (shard, row) of each, where every view is a row.
        """
        shape, dtype = self.settings.rows[name]
        out, opened = np.empty((len(places), *shape), dtype=NUMPY_DTYPES[dtype]), self._maps.setdefault(name, {})
        for (shard, row), seed, target in zip(places, seeds, out, strict=True):
            values, checksums, checked = opened.get(shard) or self._rows(shard, name)
            target[...] = values[row]
            if not checked[row]:
                if crc32(target.data, seed) != checksums[row]:
                    example = shard * self.settings.shard_size + row // self.settings.views
                    raise self._damaged(shard, f"example {example} is not what was written")
                checked[row] = 1
        return torch.from_numpy(out).view(TORCH_DTYPES[dtype])

    def _rows(self, shard: int, name: str) -> _Rows:
        """A tensor's rows, opened on first use: in the worker that uses them, not before a fork."""
        opened = self._maps.setdefault(name, {})
        if shard not in opened:
            path, header, (shape, dtype) = (
                self.path / shard_name(shard),
                self._headers[shard],
                self.settings.rows[name],
            )
            values = header.map(path, name, NUMPY_DTYPES[dtype]).reshape(-1, *shape)
            checksums = header.map(path, checksum_tensor(name), np.int64).reshape(-1)
            opened[shard] = _Rows(values, checksums, bytearray(len(checksums)))
        return opened[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}
