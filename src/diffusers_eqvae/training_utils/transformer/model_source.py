"""What `--model` may name: a preset, a JSON file, a saved model or its pipeline."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...autoencoders import is_pipeline
from ...files import read_json
from ...models.backbone import Backbone, backbone_class, backbones
from ..command_line import parse_overrides, read_model_config


@dataclass(frozen=True)
class ModelSource:
    """A backbone that is not built yet.

    Args:
        cls: its class.
        config: constructor arguments; of a saved model, what its config says.
        directory: of the saved weights to continue from, or None for new ones.
    """

    cls: type[Backbone]
    config: dict[str, Any]
    directory: Path | None = None

    @classmethod
    def find(cls, model: str, overrides: Sequence[str] = (), *, objective: str | None = None) -> ModelSource:
        """What `model` names, with constructor arguments over its own.

        Args:
            overrides: KEY=VALUE words; a saved model has its own arguments and takes none.
            objective: what a new model shall be trained by instead.

        Raises:
            ValueError: neither a model name, a JSON file nor a saved backbone; says which names there are.
        """
        source = cls._find(model)
        if source.directory is not None:
            if overrides:
                raise ValueError(f"The saved model {source.directory} takes no --config_overrides: it has its own.")
            if objective not in (None, source.objective):
                raise ValueError(
                    f"{source.directory} was trained by the objective {source.objective}; leave --objective "
                    f"{objective} out, or start a new model."
                )
            return source
        changed = parse_overrides(overrides, source.cls) | ({} if objective is None else {"objective": objective})
        return cls(source.cls, source.config | changed)

    @classmethod
    def _find(cls, model: str) -> ModelSource:
        path = Path(model)
        if path.is_dir():
            directory = path / "transformer" if is_pipeline(model) else path
            file = directory / "config.json"
            if not file.is_file():
                raise ValueError(f"{path} is neither a saved model nor a pipeline: there is no {file}.")
            saved = read_json(file, needs={"_class_name": str})
            kind = backbone_class(saved["_class_name"])
            return cls(kind, {key: value for key, value in saved.items() if not key.startswith("_")}, directory)
        if path.suffix == ".json":
            kind = backbone_class(_class_name(path))
            return cls(kind, read_model_config(path, kind))
        known = backbones()
        if model not in known:
            (nearest,) = difflib.get_close_matches(model, known, n=1, cutoff=0.0)
            families = ", ".join(dict.fromkeys(name.partition("/")[0] for name in known))
            raise ValueError(
                f"Unknown model {model!r}; the nearest is {nearest}. "
                f"There are {families} (most with a patch size behind them: SiT-B/2); or name a JSON file or a saved "
                "model."
            )
        return cls(known[model], dict(known[model].PRESETS[model]))

    @property
    def objective(self) -> str:
        """What it was made to be trained by."""
        return str(self.config.get("objective", inspect.signature(self.cls).parameters["objective"].default))


def _class_name(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"The model config {path} does not exist; it is a JSON file with constructor arguments.")
    name = read_json(path).get("_class_name")
    if name is None:
        classes = sorted({kind.__name__ for kind in backbones().values()})
        raise ValueError(f'{path} must say its "_class_name": one of {", ".join(classes)}.')
    return str(name)
