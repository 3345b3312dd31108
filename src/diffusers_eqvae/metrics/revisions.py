"""Which weights a model has: a hash of their own, and the commit of the Hub where its loader knew one."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from .features import hash_tensors

# How the Hub's cache lays files out: models--OWNER--NAME/snapshots/COMMIT/...
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})(?:/|$)")


def model_revision(model: nn.Module) -> str:
    """ "weights <16 hex digits>", with "commit <40 hex digits>, " before it where the model came from a known commit.

    The hash is `features.hash_tensors` of the model in its dtype. A commit is what the loader noted in the config
    (transformers) or the snapshot in the Hub's cache that the model was loaded from (the parts of a diffusers
    pipeline). Of a model loaded by name neither is left, and no commit is stated: the name does not say which
    revision was asked for.
    """
    config: Any = getattr(model, "config", {})
    commit = config.get("_commit_hash") if hasattr(config, "get") else getattr(config, "_commit_hash", None)
    if not commit:
        found = _SNAPSHOT.search(str(getattr(config, "_name_or_path", "") or "").replace("\\", "/"))
        commit = found[1] if found else None
    weights = f"weights {hash_tensors(model)}"
    return f"commit {commit}, {weights}" if commit else weights
