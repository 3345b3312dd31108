"""The files of a latent store (see `latent_store`): settings, shard headers, the manifest, atomic publication."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import read_json, require_format_version
from .report import DataError

FORMAT_VERSION = 3  # 1 knew its autoencoder by one string; 2 had neither digests nor a crc32 per row
MANIFEST = "manifest.json"
METADATA_KEY = "latent_store"  # A single key: safetensors does not keep the order of several.
TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint16": torch.uint16,
}
FLOATS = ("float32", "float16", "bfloat16")
# numpy has no bfloat16; its bits travel as int16.
NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.int16, "uint16": np.uint16}
_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint16": "U16"}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U16": 2, "I64": 8}
_RAW = {"F32": np.int32, "F16": np.int16, "BF16": np.int16, "U16": np.int16, "I64": np.int64}
# What a store may hold -> the name of the tensor that holds it, in a shard and in a batch.
KINDS = {"moments": "moments", "latents": "moments", "tokens": "tokens"}
MAX_CODEBOOK_SIZE = 2**16
LABEL_BITS = 0xFFFFFFFF  # of a class id, which the crc32 of its row begins with
_MAX_HEADER_BYTES = 100_000_000  # The limit of the safetensors format.


@dataclass(frozen=True)
class FeatureSettings:
    """Features that a frozen network gives of an image, for regularizers to read.

    Args:
        shape: (F, h, w) over the image, or (F,) of all of it.
        dtype: "float32", "float16" or "bfloat16".
        identity: of the network that gives them; JSON values, compared by what reads them.

    Example:
        >>> FeatureSettings((768, 16, 16), "float16", {"teacher": "facebook/dinov2-base"})
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    identity: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in FLOATS:
            raise ValueError(f"The dtype of features must be one of {FLOATS}; got {self.dtype!r}.")
        object.__setattr__(self, "shape", tuple(self.shape))

    @property
    def bytes(self) -> int:
        """Disk space of one image's."""
        return prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "dtype": self.dtype, "identity": dict(self.identity)}


@dataclass(frozen=True)
class StoreSettings:
    """What decides a store's content; two runs with equal settings and equal data write equal bytes.

    Args:
        num_examples: N images.
        shape: (c, h, w) of one posterior's moments; (h, w) of tokens.
        dtype: "float32", "float16" or "bfloat16", as stored; "uint16" for tokens.
        views: 1, or 2 where the mirrored image is encoded too.
        kind: "moments" (mean and logvar), "latents" (deterministic autoencoder) or "tokens" (of a codebook).
        batch_size: images per forward of the encoder (its rounding depends on it).
        resolution: side of the images in pixels.
        downsampling_factor: pixels per latent position.
        encoder: its hash as float32, of `autoencoder_identity`.
        mixed_precision: "no" or "bf16", how the encoder computed.
        codebook, codebook_size: its hash as float32 and its number of vectors, of tokens.
        source: which data (name, split, columns, `provenance.data_identity`); free, compared for equality.
        features: what is stored beside the latents of every view, by name.

    Example:
        >>> settings.num_shards, settings.examples(0), settings.bytes(4096) / 1e6
        (3, range(0, 4096), 67.1)
    """

    num_examples: int
    shape: tuple[int, ...]
    dtype: str
    views: int
    kind: str
    shard_size: int
    batch_size: int
    resolution: int
    downsampling_factor: int
    labelled: bool
    encoder: str
    mixed_precision: str = "no"
    source: dict[str, Any] = field(default_factory=dict)
    codebook: str | None = None
    codebook_size: int | None = None
    features: dict[str, FeatureSettings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_examples", "shard_size", "batch_size", "resolution", "downsampling_factor"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        for name, known in (("dtype", tuple(TORCH_DTYPES)), ("views", (1, 2)), ("kind", tuple(KINDS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}; got {getattr(self, name)!r}.")
        if self.is_tokens != (self.dtype == "uint16") or self.is_tokens != (self.codebook_size is not None):
            raise ValueError(
                "Tokens are stored as uint16 with the size of their codebook, and nothing else is; got "
                f"{self.kind} as {self.dtype} with codebook_size {self.codebook_size}."
            )
        if self.codebook_size is not None and not 0 < self.codebook_size <= MAX_CODEBOOK_SIZE:
            raise ValueError(
                f"A store of tokens takes codebooks of 1 .. {MAX_CODEBOOK_SIZE} vectors; got {self.codebook_size}."
            )
        object.__setattr__(self, "shape", tuple(self.shape))
        stated: Mapping[str, Any] = self.features
        features = {n: FeatureSettings(**each) if isinstance(each, dict) else each for n, each in stated.items()}
        object.__setattr__(self, "features", features)

    @property
    def is_tokens(self) -> bool:
        return self.kind == "tokens"

    @property
    def tensor(self) -> str:
        """Name of what is stored, in a shard and in a batch: "moments" or "tokens"."""
        return KINDS[self.kind]

    @property
    def rows(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """What is stored of every view: tensor -> (shape, dtype) of one row."""
        own = {self.tensor: (self.shape, self.dtype)}
        return own | {feature_tensor(name): (each.shape, each.dtype) for name, each in self.features.items()}

    def without(self, features: Iterable[str]) -> StoreSettings:
        """The same but for these features."""
        kept = {name: each for name, each in self.features.items() if name not in features}
        return replace(self, features=kept)

    @property
    def num_shards(self) -> int:
        return -(-self.num_examples // self.shard_size)

    def examples(self, shard: int) -> range:
        """The data set's indices that a shard holds."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_examples))

    def bytes(self, num_examples: int) -> int:
        """Disk space of that many examples, without headers."""
        view = sum(prod(shape) * TORCH_DTYPES[dtype].itemsize for shape, dtype in self.rows.values())
        return num_examples * (self.views * view + 8 * self.labelled)

    def to_json(self) -> dict[str, Any]:
        stated = {key: value for key, value in asdict(self).items() if value is not None and key != "features"}
        features = {name: each.to_json() for name, each in self.features.items()}
        return stated | {"shape": list(self.shape)} | ({"features": features} if features else {})


def feature_tensor(name: str) -> str:
    """What features are called in a shard and in a batch."""
    return f"features.{name}"


def checksum_tensor(tensor: str) -> str:
    """Where the crc32 of a tensor's rows are: int64 (n, views). Those of features begin with that of their latents."""
    return f"crc32.{tensor}" if tensor.startswith("features.") else "crc32"


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


@dataclass(frozen=True)
class ShardHeader:
    """A shard file's header: where its tensors lie, what its writer noted, and a digest of both."""

    tensors: dict[str, Any]
    data_start: int
    notes: dict[str, Any]
    digest: str

    @classmethod
    def read(cls, path: Path) -> ShardHeader:
        """Refuses a file that is absent, cut short, or not a shard."""
        remedy = "delete it and encode the data again with the same settings: only this shard is written anew"
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length <= _MAX_HEADER_BYTES:
                    raise ValueError("no header")
                raw = file.read(length)
            tensors = json.loads(raw)
            metadata = tensors.pop("__metadata__")
            header = cls(tensors, 8 + length, json.loads(metadata[METADATA_KEY]), digest_of(raw))
            expected = header.data_start + max(map(_end_of_tensor, tensors.values()))
        except FileNotFoundError:
            raise ValueError(f"The shard {path} is missing; encode the data again.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a readable shard ({error}); {remedy}.") from error
        actual = path.stat().st_size
        if actual != expected:
            raise ValueError(
                f"The shard {path} is truncated: it should have {expected} bytes, not {actual}; {remedy}."
            )
        return header

    def map(self, path: Path, name: str, dtype: Any) -> np.ndarray:
        """A tensor of the shard as a read-only array backed by the file."""
        entry = self.tensors[name]
        offset = self.data_start + entry["data_offsets"][0]
        # A plain view: numpy.memmap's own indexing costs several times more.
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=tuple(entry["shape"])).view(np.ndarray)

    def content_digest(self, path: Path) -> str:
        """Of all tensors as they lie in the file; see `content_digest`."""
        tensors = self.tensors.items()
        return content_digest({name: self.map(path, name, _RAW[entry["dtype"]]) for name, entry in tensors})

    def lacking(self, settings: StoreSettings) -> list[str]:
        """The features of `settings` that the shard was written without."""
        return [name for name in settings.features if name not in self.notes.get("settings", {}).get("features", {})]

    def check(self, path: Path, settings: StoreSettings, shard: int) -> None:
        """Refuses a shard of another format, or one that was written with other settings, naming them."""
        version = self.notes.get("format_version")
        remedy = "use another output directory, or delete the old store and encode the data again"
        require_format_version(version, FORMAT_VERSION, path=path, remedy=remedy)
        wanted, written = _flat(settings.to_json()), _flat(self.notes.get("settings", {}))
        differing = [
            f"{key} (shard: {written.get(key)}, now: {wanted.get(key)})"
            for key in sorted(wanted.keys() | written.keys())
            if wanted.get(key) != written.get(key)
        ]
        if differing:
            raise ValueError(
                f"The shard {path} was written with other settings: {', '.join(differing)}. "
                "Use the same settings, another output directory, or delete the old store."
            )
        places = [len(settings.examples(shard)), settings.views]
        expected = {
            name: ([*places, *shape], _SAFETENSORS_DTYPES[dtype]) for name, (shape, dtype) in settings.rows.items()
        }
        expected |= {checksum_tensor(name): (places, "I64") for name in settings.rows}
        expected |= {"labels": (places[:1], "I64")} if settings.labelled else {}
        found = {name: (entry["shape"], entry["dtype"]) for name, entry in self.tensors.items()}
        if self.notes.get("shard") != shard or found != expected or not _all_finite(self.notes.get("statistics")):
            raise ValueError(f"{path} does not hold what its name and settings say; delete it and encode it again.")


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """With the entries of `source` and of each of the features as settings of their own."""
    features = settings.get("features", {})
    parts = {"source": settings.get("source", {})} | {feature_tensor(name): features[name] for name in features}
    inner = {f"{part}.{key}": value for part, entries in parts.items() for key, value in entries.items()}
    return {key: value for key, value in settings.items() if key not in ("source", "features")} | inner


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def content_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Of a shard's tensors, by name."""
    digest = hashlib.sha256()
    for _, values in sorted(arrays.items()):
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()[:16]


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Of all that a manifest says besides its own digest."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return digest_of(json.dumps(content, sort_keys=True).encode())


def _end_of_tensor(entry: Mapping[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end or end - begin != prod(entry["shape"]) * _BYTES[entry["dtype"]]:
        raise ValueError(f"a tensor of shape {entry['shape']} does not lie at bytes {begin} to {end}")
    return int(end)


def _all_finite(statistics: Any) -> bool:
    if isinstance(statistics, Mapping):
        return all(map(_all_finite, statistics.values()))
    if isinstance(statistics, list):
        return all(map(_all_finite, statistics))
    return statistics is None or math.isfinite(statistics)


def foreign_layout(path: Path) -> str | None:
    """What other programs' latents a directory holds, in words, or None.

    Example:
        >>> foreign_layout(Path("imagenet256_features"))
        'one .npy file per image, as the extraction of DiT and SiT writes them'
    """
    for file in path.glob("*.safetensors") if path.is_dir() else ():
        with file.open("rb") as stream:
            header = stream.read(min(8 + int.from_bytes(stream.read(8), "little"), 1 << 16))
        if b'"latents"' in header:
            return (
                "latents, latents_flip and labels in .safetensors files, as the extraction of LightningDiT writes them"
            )
    if path.is_dir() and next(
        (each for depth in ("*.npy", "*/*.npy", "*/*/*.npy") for each in path.glob(depth)), None
    ):
        return "one .npy file per image, as the extraction of DiT and SiT writes them"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """What a finished store says about itself; refuses an unfinished or changed one and one of another format.

    Example:
        >>> read_manifest(Path("latents/images"))["class_counts"]
        {'0': 732, '1': 650}
    """
    try:
        manifest = read_json(path / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        if layout := foreign_layout(path):
            raise DataError(
                f"{path} holds {layout}, and not a latent store: such files say neither which autoencoder made them "
                "nor what the posteriors were, so they cannot be read; encode the images into a directory of its own."
            ) from None
        raise ValueError(
            f"{path} does not hold a {MANIFEST}, so it is not a finished latent store; encode the data (again: "
            "finished shards are kept)."
        ) from None
    found = manifest.get("format_version")
    require_format_version(found, FORMAT_VERSION, path=path / MANIFEST, remedy="encode the data again")
    if manifest.get("digest") != manifest_digest(manifest):
        raise DataError(
            f"{path / MANIFEST} has been changed since it was written, as its digest shows: run the encoding again "
            "with the same settings, which writes it anew from the shards."
        )
    return manifest
