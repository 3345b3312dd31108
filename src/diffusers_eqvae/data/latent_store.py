"""Latent store: the posteriors of a data set in a few memory-mapped safetensors files.

    store/
      manifest.json                what the store holds (see `LatentStoreWriter.finish`), and a digest of each shard
      shard-00000.safetensors      "moments" (n, views, c, h, w), or "tokens" (n, views, h, w) uint16; "labels" (n,)
                                   int64 where the data has labels; "crc32" (n, views) int64 of each row with its
                                   label, which every read checks
      mean_std.json, vae/          the normalisation and the autoencoder it was made with (training/encode_latents.py)

Shard s holds the examples s * shard_size ... in the data set's order, whoever wrote it; its header carries the
settings and its own statistics, so a store is the same for any number of processes and any number of restarts.
c = 2C for moments (mean and logvar) and C for a deterministic autoencoder. A second view is the mirrored image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..autoencoders import Posterior
from ..classes import ClassTable
from ..directories import OutputDirectory
from ..files import atomic_path, write_json
from ..latents import LatentStatistics
from ..provenance import require_same_autoencoder
from .latent_format import (
    FORMAT_VERSION,
    MANIFEST,
    METADATA_KEY,
    NUMPY_DTYPES,
    TORCH_DTYPES,
    ShardHeader,
    StoreSettings,
    content_digest,
    manifest_digest,
    read_manifest,
    shard_name,
)
from .report import DataError

_32_BITS = 0xFFFFFFFF


def _checksums(moments: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """(n, views) int64: the crc32 of each row's bytes, begun with its label."""
    seeds = [0] * len(moments) if labels is None else (labels & _32_BITS).tolist()
    rows = zip(moments, seeds, strict=True)
    return np.array([[crc32(view.data, seed) for view in row] for row, seed in rows], dtype=np.int64)


def _raw(values: Tensor) -> np.ndarray:
    """The bits of a tensor as integers of their width."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]).numpy()


class LatentStoreWriter:
    """Writes a store shard by shard; several processes may write different shards of one store.

    One of them claims the directory for all (`output.claim(*names)`, the others with `lock=False`); a writer that is
    alone does so with its first shard. `inputs` are never written to.

    Example:
        >>> writer = LatentStoreWriter("latents/images", settings)
        >>> for shard in writer.pending()[0]:
        ...     writer.write_shard(shard, moments[settings.examples(shard)])
        >>> manifest = writer.finish(autoencoder=autoencoder_identity(vae))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: StoreSettings,
        *,
        inputs: Mapping[str, str | os.PathLike[str] | None] = {},
    ) -> None:
        self.path = Path(path)
        self.settings = settings
        self.output = OutputDirectory(self.path, kind="latent store", inputs=inputs)

    @property
    def names(self) -> list[str]:
        """What a finished store consists of; `output.claim` with them before anything is written."""
        shards = [shard_name(shard) for shard in range(self.settings.num_shards)]
        return [*shards, MANIFEST, "mean_std.json", "vae", "verify.png"]

    def pending(self, rank: int = 0, world_size: int = 1) -> tuple[list[int], list[str]]:
        """The shards this rank still has to write (s % world_size == rank), and complaints about unreadable ones.

        Finished shards are recognised by header, length and settings; a truncated one counts as unwritten and is
        named in the complaints; one of other settings is refused.
        """
        shards, complaints = [], []
        for shard in range(rank, self.settings.num_shards, world_size):
            path = self.path / shard_name(shard)
            if not path.exists():
                shards.append(shard)
                continue
            try:
                header = ShardHeader.read(path)
            except ValueError as error:
                shards.append(shard)
                complaints.append(str(error))
                continue
            header.check(path, self.settings, shard)
        return shards, complaints

    def write_shard(
        self, shard: int, moments: Tensor, *, labels: Tensor | None = None, skipped: Sequence[str] = ()
    ) -> None:
        """Writes one shard so that it is either absent or complete.

        Args:
            shard: its number.
            moments: (n, views, c, h, w), or tokens (n, views, h, w), in the store's dtype, on the CPU, for the
                examples of that shard.
            labels: (n,) int64.
            skipped: names of images that could not be read and were replaced.
        """
        settings = self.settings
        shape = (len(settings.examples(shard)), settings.views, *settings.shape)
        if moments.shape != shape or moments.dtype != TORCH_DTYPES[settings.dtype]:
            raise ValueError(
                f"Shard {shard} must hold {settings.tensor} {shape} of {settings.dtype}; "
                f"got {tuple(moments.shape)} of {moments.dtype}."
            )
        if settings.labelled != (labels is not None) or (labels is not None and labels.shape != shape[:1]):
            raise ValueError(f"Shard {shard} must hold {shape[0] if settings.labelled else 'no'} labels.")
        if settings.codebook_size is not None:
            if (highest := int(moments.numpy().max())) >= settings.codebook_size:
                raise ValueError(
                    f"Shard {shard} must hold tokens below {settings.codebook_size}, the size of the codebook; got "
                    f"{highest}."
                )
        elif not torch.isfinite(torch.stack(moments.aminmax())).all():  # aminmax carries NaN; several times faster
            raise ValueError(
                f"The encoder gave values in shard {shard} that are not finite in {settings.dtype}; "
                "store float32 or bfloat16, or check the autoencoder."
            )
        self.output.claim(*self.names)
        self.output.require_lock()
        tensors = {settings.tensor: moments.contiguous()} | ({} if labels is None else {"labels": labels.long()})
        raw = {name: _raw(values) for name, values in tensors.items()}
        raw["crc32"] = _checksums(raw[settings.tensor], raw.get("labels"))
        tensors["crc32"] = torch.from_numpy(raw["crc32"])
        notes = {
            "format_version": FORMAT_VERSION,
            "shard": shard,
            "settings": settings.to_json(),
            "statistics": self._statistics(moments),
            "skipped": list(skipped),
            "content": content_digest(raw),
        }
        metadata = {METADATA_KEY: json.dumps(notes, sort_keys=True)}
        with atomic_path(self.path / shard_name(shard)) as sibling:
            save_file(tensors, sibling, metadata=metadata)

    def statistics(self) -> LatentStatistics:
        """Statistics of all shards, merged in their order, so equal to the last bit however they were written."""
        merged = LatentStatistics()
        for header in self._headers():
            merged.merge(LatentStatistics.from_state_dict(header.notes["statistics"]))
        return merged

    def token_counts(self) -> list[int]:
        """How often each vector of the codebook is stored."""
        counts = [header.notes["statistics"]["token_counts"] for header in self._headers()]
        return np.sum(counts, axis=0).tolist()

    def finish(
        self,
        *,
        autoencoder: Mapping[str, Any] | None,
        id2label: dict[int, str] | None = None,
        report: Mapping[str, Any] | None = None,
        content: str | None = None,
    ) -> dict[str, Any]:
        """Writes and returns the manifest.

        Keys: format_version, settings, autoencoder, id2label, class_counts, statistics, report, skipped (names),
        shards (file, num_examples, bytes, digest of the header, which holds that of the content), content (of all
        images, where it is known) and digest (of all these).

        Args:
            autoencoder: its `autoencoder_identity`, with the normalisation that training will use.
            id2label: class names.
            report: `DataReport.to_json` of the images.
            content: "everything" of the images' `data_identity`.
        """
        self.output.claim(*self.names)
        headers = self._headers()
        classes = ClassTable()
        if self.settings.labelled:
            maps = (h.map(self.path / shard_name(s), "labels", np.int64) for s, h in enumerate(headers))
            classes = ClassTable.of_labels(
                np.concatenate(list(maps)), [name for _, name in sorted((id2label or {}).items())]
            )
        manifest = {
            "format_version": FORMAT_VERSION,
            "settings": self.settings.to_json(),
            "autoencoder": autoencoder,
            **classes.to_config(),
            "statistics": {"token_counts": self.token_counts()}
            if self.settings.is_tokens
            else self.statistics().state_dict(),
            "report": dict(report or {}),
            "content": content,
            "skipped": [name for header in headers for name in header.notes["skipped"]],
            "shards": [
                {
                    "file": shard_name(shard),
                    "num_examples": len(self.settings.examples(shard)),
                    "bytes": (self.path / shard_name(shard)).stat().st_size,
                    "header": header.digest,
                }
                for shard, header in enumerate(headers)
            ],
        }
        manifest["digest"] = manifest_digest(manifest)
        write_json(self.path / MANIFEST, manifest)
        self.output.release()
        return manifest

    def _headers(self) -> list[ShardHeader]:
        headers = []
        for shard in range(self.settings.num_shards):
            path = self.path / shard_name(shard)
            headers.append(ShardHeader.read(path))
            headers[-1].check(path, self.settings, shard)
        return headers

    def _statistics(self, moments: Tensor) -> dict[str, Any]:
        """Of what is stored, after its rounding, in batches that no memory limit or process count decides."""
        if self.settings.is_tokens:
            counts = np.bincount(moments.numpy().ravel(), minlength=self.settings.codebook_size or 0)
            return {"token_counts": counts.tolist()}
        statistics = LatentStatistics()
        for chunk in moments.split(self.settings.batch_size):
            posterior = Posterior.from_moments(chunk.flatten(0, 1), deterministic=self.settings.kind == "latents")
            statistics.update(posterior.mean, posterior.logvar)
        return statistics.state_dict()


class LatentStore(Dataset):
    """Random access to a store: {"moments": (c, h, w) in the stored dtype, "class_labels": id where labelled}; in a
    store of tokens {"tokens": (h, w) uint16, ...}.

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
        self._maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._labels: np.ndarray | None = None
        if vae is not None:
            require_same_autoencoder(self.autoencoder, vae, whose=f"the store {self.path}")

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
        """A batch: {"moments": (B, c, h, w) or "tokens": (B, h, w); "class_labels": (B,) int64 where labelled}.

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
        seeds = [0] * len(wanted) if labels is None else (labels & _32_BITS).tolist()
        shards, rows = np.divmod(wanted, self.settings.shard_size)
        out = np.empty((len(wanted), *self.settings.shape), dtype=NUMPY_DTYPES[self.settings.dtype])
        places = zip(shards.tolist(), rows.tolist(), views.tolist(), seeds, out, strict=True)
        for shard, row, each_view, seed, target in places:
            opened = self._maps.get(shard)
            shard_moments, checksums = self._open(shard) if opened is None else opened
            target[...] = shard_moments[row, each_view]
            if crc32(target.data, seed) != checksums[row, each_view]:
                raise self._damaged(shard, f"example {shard * self.settings.shard_size + row} is not what was written")
        moments = torch.from_numpy(out)
        if self.settings.dtype == "bfloat16":
            moments = moments.view(torch.bfloat16)
        labelled = {} if labels is None else {"class_labels": torch.from_numpy(labels)}
        return {self.settings.tensor: moments} | labelled

    def _open(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """The shard's memory maps, opened on first use: in the worker that uses it, not before a fork."""
        path, header, dtype = self.path / shard_name(shard), self._headers[shard], NUMPY_DTYPES[self.settings.dtype]
        self._maps[shard] = header.map(path, self.settings.tensor, dtype), header.map(path, "crc32", np.int64)
        return self._maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}
