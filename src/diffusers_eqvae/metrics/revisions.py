"""Which weights a model has: the commit of the Hub they came from, or a hash of their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from .features import hash_tensors

# How the Hub's cache lays files out: models--OWNER--NAME/snapshots/COMMIT/...
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})(?:/|$)")


def model_revision(model: nn.Module) -> str:
    """ "commit <40 hex digits>" of a model loaded from the Hub or its cache, else "weights <16 hex digits>".

    The latter is `features.hash_tensors` of the model in its dtype. The commit is taken from the config, the path in
    the cache, or what the cache holds as the repository's main revision, never from the network.
    """
    config: Any = getattr(model, "config", {})
    commit = config.get("_commit_hash") if hasattr(config, "get") else getattr(config, "_commit_hash", None)
    commit = commit or _commit_of_path(str(getattr(config, "_name_or_path", "") or ""))
    return f"commit {commit}" if commit else f"weights {hash_tensors(model)}"


def _commit_of_path(name: str) -> str | None:
    found = _SNAPSHOT.search(name.replace("\\", "/"))
    if found or Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return found[1] if found else None
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", "model_index.json"):
        cached = try_to_load_from_cache(name, file)
        if isinstance(cached, str):
            found = _SNAPSHOT.search(cached.replace("\\", "/"))
            return found[1] if found else None
    return None
