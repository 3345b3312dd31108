"""Makes diffusers load this package's classes: the only file that touches diffusers' loading tables.

diffusers resolves a pipeline's `_class_name` by `getattr(diffusers, name)`, a component by `getattr(library, name)`,
and accepts a library name from the Hub only if it is in `LOADABLE_CLASSES`. There is no public registry, so
`tests/pipelines/test_registration.py` holds this file against the installed diffusers.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
import sys
from collections.abc import Iterable, Iterator

import diffusers
from diffusers import BaseGuidance, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

logger = logging.getLogger(__name__)

LIBRARY = __name__.partition(".")[0]
SAVE_AND_LOAD = ("save_pretrained", "from_pretrained")
# diffusers looks these up, as attributes of the package, on the library of a saved component.
BASE_CLASSES = (ModelMixin, SchedulerMixin, DiffusionPipeline, BaseGuidance)
# Folder -> how the names of those modules begin that define classes which a saved file may name.
ROOMS: dict[str, str | tuple[str, ...]] = {
    "models": "",
    "schedulers": "scheduling_",
    "pipelines": ("pipeline_", "guider_"),
}
REMEDY = "A class of your own is there once its file is loaded: --extension FILE, or diffusers_eqvae.load_extension."


def register(classes: Iterable[type]) -> None:
    """Lets `DiffusionPipeline`, `AutoModel` and the classes themselves load what `classes` saved.

    Each becomes an attribute of this package and of diffusers. Saves then write `["diffusers_eqvae", name]` instead of
    a module path, so files may move without breaking published repositories. Calling it again changes nothing.

    Args:
        classes: models, schedulers, guiders and pipelines. A name that diffusers defines itself is left to it and
            named in the log: components still load as ours, `DiffusionPipeline` and `AutoModel` take diffusers' class.

    Raises:
        ValueError: a name belongs to another class of this package or of an extension; both owners are named.
    """
    package = sys.modules[LIBRARY]
    LOADABLE_CLASSES[LIBRARY] = {base.__name__: list(SAVE_AND_LOAD) for base in BASE_CLASSES}
    for cls in classes:
        owner = vars(package).get(cls.__name__)
        if owner is not None and (owner.__module__, owner.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"The class {cls.__name__} of {cls.__module__} cannot be registered: {owner.__module__} has taken "
                "that name. Choose another name."
            )
        present = getattr(diffusers, cls.__name__, None)
        if present is None or present is owner:
            setattr(diffusers, cls.__name__, cls)
        else:
            logger.warning("diffusers defines %s itself; it is not replaced by %s.", cls.__name__, cls.__module__)
        setattr(package, cls.__name__, cls)


def register_rooms() -> None:
    """Registers every model, scheduler, guider and pipeline of the package, by listing the folders of `ROOMS`."""
    register(cls for room, prefix in ROOMS.items() for cls in _classes(f"{LIBRARY}.{room}", prefix))


def require_class(name: str, source: str) -> None:
    """Refuses a class name of a saved file that nobody has defined."""
    if not hasattr(sys.modules[LIBRARY], name) and not hasattr(diffusers, name):
        raise ValueError(f"{source} needs the class {name}, which neither diffusers nor {LIBRARY} has. {REMEDY}")


def _classes(package: str, prefix: str | tuple[str, ...]) -> Iterator[type]:
    for entry in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if entry.name.startswith(prefix) and not entry.name.startswith("_"):
            module = importlib.import_module(f"{package}.{entry.name}")
            yield from (cls for cls in vars(module).values() if _is_saved(cls) and cls.__module__ == module.__name__)


def _is_saved(cls: object) -> bool:
    """Pipelines, and the models, schedulers and guiders with a constructor that diffusers can repeat from a config."""
    if not isinstance(cls, type) or not issubclass(cls, BASE_CLASSES):
        return False
    # @register_to_config leaves a mark; a base class has no such constructor
    return issubclass(cls, DiffusionPipeline) or hasattr(inspect.getattr_static(cls, "__init__"), "__wrapped__")
