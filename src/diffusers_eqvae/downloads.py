"""Files of weights that others publish at an address, outside the Hub: fetched once, into torch's cache."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import constants


def published_file(url: str, *, sha256: str, what: str, instead: str, name: str | None = None) -> Path:
    """The file in torch's cache ($TORCH_HOME), fetched where it is not there and a network may be used.

    Args:
        sha256: what the SHA-256 of its bytes begins with; other bytes are not kept.
        what: needs the file, as an error names it.
        instead: how to name a local copy.
        name: in the cache, if not the last part of the address.

    Raises:
        FileNotFoundError: it is not there and cannot be fetched, or `HF_HUB_OFFLINE` is set.

    Example:
        >>> published_file(INCEPTION_URL, sha256="6726825d", what="FID", instead="name a local copy")
        PosixPath('.../torch/hub/checkpoints/weights-inception-2015-12-05-6726825d.pth')
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / (name or url.rpartition("/")[2])
    if path.is_file():
        return path
    remedy = f"download {url} to {path}, or {instead}."
    if constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(f"{what} needs {path.name}, which is not cached, and HF_HUB_OFFLINE is set: {remedy}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(f"{what} needs {path.name}, which could not be fetched ({error}): {remedy}") from error
    return path
