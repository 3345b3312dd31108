"""Names of models, which are directories here or repositories on the Hub, and what is said where they are neither."""

from __future__ import annotations

import difflib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_session, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import nn

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0
T = TypeVar("T")
# diffusion_pytorch_model.fp16.safetensors, in shards as diffusion_pytorch_model.fp16-00001-of-00002.safetensors
_VARIANT = re.compile(r"diffusion_pytorch_model\.(?P<name>[^./]+?)(-\d{5}-of-\d{5})?\.(safetensors|bin)")


@contextmanager
def looking_for(name: str | os.PathLike[str], what: str) -> Iterator[dict[str, Any]]:
    """The options that loading `name` needs beside its own; inside, a failure names what was looked for and where.

    Where the Hub cannot be reached they keep a loader to its cache, which spares a minute of retries.

    Args:
        what: it ought to be, e.g. "a pipeline".

    Raises:
        OSError: a name that is neither a directory here nor, as far as can be seen, a repository.
        ValueError: a directory whose files say or hold something else.

    Example:
        >>> with looking_for("facebook/dinov2-base", "a teacher") as options:
        ...     model = AutoModel.from_pretrained("facebook/dinov2-base", **options)
    """
    if Path(name).exists():
        try:
            yield {}
        except MemoryError:
            raise
        except Exception as error:  # a file of another shape makes a loader raise almost anything
            if isinstance(error, ValueError | OSError) and str(name) in str(error):
                raise
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(
                f"{name} cannot be loaded as {what}: {_one_line(error)}. Its config.json or weights are not as they "
                "were saved; save or download it again."
            ) from error
        return
    _require_repository_name(str(name))
    why = hub_silence()
    try:
        with warnings.catch_warnings():  # diffusers still passes it to huggingface_hub, which warns of that
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks", category=UserWarning)
            yield {} if why is None else {"local_files_only": True}
    except (OSError, HFValidationError) as error:
        detail = f"the Hub cannot be asked ({why}), nor is it in its cache" if why else _one_line(error)
        raise OSError(
            f"{name} is not {what}: there is no such directory here{_neighbour(name)}, and {detail}."
        ) from error


def load_pretrained(load: Callable[..., T], name: str | os.PathLike[str], what: str, **location: Any) -> T:
    """`load(name, **location)`; where its weights are there in one variant only (fp16), with that variant.

    Args:
        load: a `from_pretrained`.
        what: as `looking_for` takes it.
        location: `subfolder`, `revision` and whatever else `load` takes.

    Raises:
        OSError: as `looking_for`; or there are weights, in several variants, and the message names the files.
        ValueError: as `looking_for`; or weights that are missing, not finite, or of another size than the config says.

    Example:
        >>> load_pretrained(AutoencoderKL.from_pretrained, "vae", "an autoencoder", dtype=torch.float32)
    """
    with looking_for(name, what) as options:
        try:
            return _whole(load, name, **location, **options)
        except ValueError as error:
            if "ignore_mismatched_sizes" not in str(error):  # which is diffusers' advice, and would draw new weights
                raise
            detail = str(error).partition(" because ")[2].partition(". If you want")[0]
            raise ValueError(
                f"{name} cannot be loaded as {what}: its weights are not of the size that its config says ({detail}); "
                "use both files of one model."
            ) from error
        except OSError as error:
            variant = _only_variant(name, error, **location)
            return _whole(load, name, variant=variant, **location, **options)


def _only_variant(
    name: str | os.PathLike[str],
    error: OSError,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    **_: Any,
) -> str:
    """Of weights that could not be loaded, the variant that there is; raises OSError where that is not the reason."""
    files = _weight_files(name, subfolder, revision)
    if damaged := [file for file in files if Path(file).name in str(error)]:
        reason = "is cut short or damaged; save or download it again"
        if damaged[0].endswith(".bin"):
            reason = (
                "is not read: it is damaged, or needs code to be read, and none is run. Have its author save the "
                "tensors alone, as .safetensors"
            )
        raise OSError(f"{damaged[0]} of {name} {reason}.") from error
    found = [match for match in map(_VARIANT.fullmatch, (Path(file).name for file in files)) if match]
    variants = sorted({match["name"] for match in found})
    if len(variants) > 1:
        raise OSError(
            f"{name} has weights in the variants {', '.join(variants)} ({', '.join(files)}) and none without one; "
            "rename those that you mean to the same name without the variant."
        ) from error
    if variants:
        logger.warning("%s has weights of the variant %s only (%s); they are loaded.", name, variants[0], files)
        return variants[0]
    if "no file named" in str(error):
        folder = Path(name, subfolder or "")
        raise OSError(
            f"{folder} holds no weights (diffusion_pytorch_model.safetensors); save or download it again."
        ) from error
    raise error


def _whole(load: Callable[..., T], name: str | os.PathLike[str], **options: Any) -> T:
    """A model, or a pipeline, whose files hold its weights, finite ones, and no others.

    diffusers leaves empty what is lacking, drops what is too much, and takes any value.
    """
    with _dropped_weights() as dropped:
        loaded = load(name, **options)
    if dropped:
        raise ValueError(
            f"{name} holds weights that its config has no place for ({', '.join(dropped)}); use both files of one "
            "model, or take out of the file what is not its own."
        )
    for part in getattr(loaded, "components", {"": loaded}).values():
        if not isinstance(part, nn.Module):
            continue
        if empty := [weight for weight, tensor in part.named_parameters() if tensor.is_meta]:
            more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
            raise ValueError(
                f"{name} lacks the weights {', '.join(empty[:3])}{more} of its {type(part).__name__}: the file is not "
                "whole, or of another version; save or download it again."
            )
        require_finite_weights(part, name)
    return loaded


def require_finite_weights(model: nn.Module, name: str | os.PathLike[str]) -> None:
    """Refuses a model with NaN or infinity in its parameters or buffers.

    Example:
        >>> require_finite_weights(vae, "runs/eq-vae")
    """
    broken = [weight for weight, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ValueError(
            f"{name} holds weights that are NaN or infinite ({', '.join(broken[:3])}{more} of its "
            f"{type(model).__name__}); take an earlier model, or download it again."
        )


@contextmanager
def _dropped_weights() -> Iterator[list[str]]:
    """What diffusers says, in a warning only, of weights in a file that it has not used."""
    logger, said = logging.getLogger("diffusers.models.modeling_utils"), list[str]()

    def note(record: logging.LogRecord) -> bool:
        _, found, names = record.getMessage().partition(" were not used when initializing ")
        said.extend([f"{' '.join(names.split())[:200]} ..."] if found else [])
        return not found

    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addFilter(note)
    try:
        yield said
    finally:
        logger.removeFilter(note)
        logger.setLevel(level)


def _weight_files(name: str | os.PathLike[str], subfolder: str | None, revision: str | None) -> list[str]:
    """Files of weights below the folder, by path, in order."""
    if Path(name).exists():
        files = [path.relative_to(name).as_posix() for path in Path(name).rglob("*")]
    else:
        try:
            files = HfApi().list_repo_files(str(name), revision=revision)
        except (OSError, HFValidationError):
            return []
    inside = f"{subfolder}/" if subfolder else ""
    return sorted(file for file in files if file.startswith(inside) and Path(file).suffix in (".safetensors", ".bin"))


def hub_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a directory or Hub repository; None where it holds none, or cannot be found itself."""
    if Path(name).exists():
        path = Path(name, file)
        return path if path.is_file() else None
    try:
        validate_repo_id(name)
        only = hub_silence() is not None
        return Path(hf_hub_download(name, file, revision=revision, local_files_only=only))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        return None  # whatever is wrong with the name, loading the model says it better


@cache
def hub_silence() -> str | None:
    """Why the Hub does not answer, or None; asked once a process, and only where something is looked for there."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE_S)
    except Exception as error:  # of whatever HTTP library this version of huggingface_hub stands on
        return f"{constants.ENDPOINT}: {_one_line(error)}"
    return None


def _require_repository_name(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise FileNotFoundError(f"There is no directory {name}{_neighbour(name)}.") from error


def _neighbour(name: str | os.PathLike[str]) -> str:
    """What lies where `name` would, spelled alike."""
    path = Path(name)
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")
