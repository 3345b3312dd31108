"""Makes diffusers load this package's classes: the only file that touches diffusers' loading tables.

diffusers resolves a pipeline's `_class_name` by `getattr(diffusers, name)`, a component by `getattr(library, name)`,
and accepts a library name from the Hub only if it is in `LOADABLE_CLASSES`. There is no public registry, so
`tests/pipelines/test_registration.py` holds this file against the installed diffusers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import diffusers
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

logger = logging.getLogger(__name__)

LIBRARY = __name__.partition(".")[0]
SAVE_AND_LOAD = ("save_pretrained", "from_pretrained")
# The package must expose these three under the same names: diffusers looks the base classes up on the library.
BASE_CLASSES = ("ModelMixin", "SchedulerMixin", "DiffusionPipeline")


def register(classes: Iterable[type]) -> None:
    """Lets `DiffusionPipeline`, `AutoModel` and the classes themselves load what `classes` saved.

    Saves then write `["diffusers_eqvae", name]` instead of a module path, so files may move without breaking published
    repositories. Calling it again changes nothing.

    Args:
        classes: models, schedulers and pipelines. A name that diffusers defines itself is left to diffusers and named
            in the log: components still load as ours, `DiffusionPipeline` and `AutoModel` take diffusers' class.
    """
    LOADABLE_CLASSES[LIBRARY] = {name: list(SAVE_AND_LOAD) for name in BASE_CLASSES}
    for cls in classes:
        present = getattr(diffusers, cls.__name__, None)
        if present is None or present.__module__.partition(".")[0] == LIBRARY:
            setattr(diffusers, cls.__name__, cls)
        else:
            logger.warning("diffusers defines %s itself; it is not replaced by %s.", cls.__name__, cls.__module__)
