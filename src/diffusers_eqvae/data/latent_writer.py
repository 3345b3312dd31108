"""Writes a latent store shard by shard, each absent or complete; see `latent_store` for what it consists of."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zlib import crc32

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..autoencoders import Posterior
from ..classes import ClassTable
from ..directories import OutputDirectory
from ..files import atomic_path, write_json
from ..latents import LatentStatistics
from .latent_format import (
    FORMAT_VERSION,
    LABEL_BITS,
    MANIFEST,
    METADATA_KEY,
    NUMPY_DTYPES,
    TORCH_DTYPES,
    ShardHeader,
    StoreSettings,
    checksum_tensor,
    content_digest,
    manifest_digest,
    shard_name,
)

logger = logging.getLogger(__name__)


def _checksums(values: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """(n, views) int64: the crc32 of each row's bytes, begun with its seed (n, views)."""
    rows = zip(values, seeds.tolist(), strict=True)
    return np.array(
        [[crc32(view.data, seed) for view, seed in zip(row, each, strict=True)] for row, each in rows], dtype=np.int64
    )


def _raw(values: Tensor) -> np.ndarray:
    """The bits of a tensor as integers of their width."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]).numpy()


def _described(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{shape} of {str(dtype).removeprefix('torch.')}"


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
        named in the complaints; one of other settings is refused. One that only lacks features counts as unwritten:
        `kept` gives what it holds.
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
            lacking = header.lacking(self.settings)
            header.check(path, self.settings.without(lacking), shard)
            shards += [shard] if lacking else []
        return shards, complaints

    def kept(self, shard: int) -> dict[str, Any]:
        """What a shard that lacks features holds, as arguments of `write_shard`; {} where nothing can be kept."""
        path = self.path / shard_name(shard)
        try:
            header = ShardHeader.read(path)
        except ValueError:
            return {}
        settings = self.settings.without(header.lacking(self.settings))
        header.check(path, settings, shard)
        if header.content_digest(path) != header.notes["content"]:
            logger.warning("Encoding the shard %s again: its content does not agree with its digest.", path)
            return {}

        def read(name: str, dtype: str) -> Tensor:
            values = torch.from_numpy(header.map(path, name, NUMPY_DTYPES[dtype]).copy())
            return values.view(TORCH_DTYPES[dtype])

        tensors = {name: read(name, dtype) for name, (_, dtype) in settings.rows.items()}
        labels = torch.from_numpy(header.map(path, "labels", np.int64).copy()) if settings.labelled else None
        moments = tensors.pop(settings.tensor)
        return {"moments": moments, "labels": labels, "skipped": header.notes["skipped"], "features": tensors}

    def write_shard(
        self,
        shard: int,
        moments: Tensor,
        *,
        labels: Tensor | None = None,
        skipped: Sequence[str] = (),
        features: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Writes one shard so that it is either absent or complete.

        Args:
            shard: its number.
            moments: (n, views, c, h, w), or tokens (n, views, h, w), in the store's dtype, on the CPU, for the
                examples of that shard.
            labels: (n,) int64.
            skipped: names of images that could not be read and were replaced.
            features: "features.NAME" -> (n, views, F, h, w) or (n, views, F), in the dtype that the settings say.
        """
        settings = self.settings
        rows: dict[str, Tensor] = {settings.tensor: moments, **features}
        self._require_fitting(shard, rows, labels)
        self.output.claim(*self.names)
        self.output.require_lock()
        tensors = {name: values.contiguous() for name, values in rows.items()}
        raw = {name: _raw(values) for name, values in tensors.items()}
        seeds = np.zeros(moments.shape[:2], np.int64)
        if labels is not None:
            tensors["labels"] = labels.long()
            raw["labels"] = _raw(tensors["labels"])
            seeds = np.broadcast_to((raw["labels"] & LABEL_BITS)[:, None], seeds.shape)
        for name in rows:  # the latents first: features begin with the crc32 of theirs
            seeds = seeds if name == settings.tensor else raw["crc32"]
            raw[checksum_tensor(name)] = _checksums(raw[name], seeds)
            tensors[checksum_tensor(name)] = torch.from_numpy(raw[checksum_tensor(name)])
        notes = {
            "format_version": FORMAT_VERSION,
            "shard": shard,
            "settings": settings.to_json(),
            "statistics": self._statistics(moments),
            "skipped": list(skipped),
            "content": content_digest(raw),
        }
        metadata = {METADATA_KEY: json.dumps(notes, sort_keys=True)}
        if features:
            (self.path / MANIFEST).unlink(missing_ok=True)  # until every shard has them
        with atomic_path(self.path / shard_name(shard)) as sibling:
            save_file(tensors, sibling, metadata=metadata)

    def _require_fitting(self, shard: int, rows: Mapping[str, Tensor], labels: Tensor | None) -> None:
        """Refuses tensors that are not those which the settings announce, and values that the dtype cannot hold."""
        settings = self.settings
        places = (len(settings.examples(shard)), settings.views)
        expected = {name: ((*places, *shape), TORCH_DTYPES[dtype]) for name, (shape, dtype) in settings.rows.items()}
        for name in dict.fromkeys((*expected, *rows)):
            wanted, found = expected.get(name), rows.get(name)
            if wanted is None or found is None or wanted != (tuple(found.shape), found.dtype):
                raise ValueError(
                    f"Shard {shard} must hold {name} {'never' if wanted is None else _described(*wanted)}; "
                    f"got {'none' if found is None else _described(tuple(found.shape), found.dtype)}."
                )
        if settings.labelled != (labels is not None) or (labels is not None and labels.shape != places[:1]):
            raise ValueError(f"Shard {shard} must hold {places[0] if settings.labelled else 'no'} labels.")
        for name, values in rows.items():
            if name == "tokens":
                if (highest := int(values.numpy().max())) >= (settings.codebook_size or 0):
                    raise ValueError(
                        f"Shard {shard} must hold tokens below {settings.codebook_size}, the size of the codebook; "
                        f"got {highest}."
                    )
            # aminmax carries NaN; several times faster
            elif not torch.isfinite(torch.stack(values.aminmax())).all():
                given = "The encoder" if name == settings.tensor else f"The network of {name}"
                raise ValueError(
                    f"{given} gave values in shard {shard} that are not finite in {settings.rows[name][1]}; "
                    "store float32 or bfloat16, or check the network."
                )

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
