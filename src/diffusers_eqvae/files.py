"""Files that are either whole or absent, whatever ends their writing; weights and arrays read without running code."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

# The most that a byte of a zip archive can unpack to, in bytes.
_DEFLATE_RATIO = 1032
UNFINISHED = ".tmp"
JSON_KINDS = {dict: "a mapping", list: "a list", str: "a text", int: "a whole number", float: "a number"}
JSON_KINDS |= {bool: "true or false"}


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """A hidden sibling to write to; when the block ends, it has the name `path`.

    The parent folders are created; the sibling is a new file under a name that nobody can foresee. An error in the
    block leaves `path` as it was and no sibling; a kill may leave the sibling, which ends in .tmp. Where `durable`,
    the content is on disk before the name is, and the name when this returns, so a power cut changes nothing; that
    costs two flushes per file, too many for thousands of small ones.

    Example:
        >>> with atomic_path("figures/grid.png") as sibling:
        ...     image.save(sibling, format="png")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sibling = temporary_sibling(path)
    mode = _create(sibling)
    try:
        with disk_trouble_explained(path, remedy="What was whole before still is; start again afterwards."):
            yield sibling
            sibling.chmod(mode)  # whatever wrote it: safetensors puts another file in its place
            if durable:
                flush_to_disk(sibling)
        os.replace(sibling, path)
    except BaseException:
        sibling.unlink(missing_ok=True)
        raise
    if durable:
        flush_to_disk(path.parent)


def _create(path: Path) -> int:
    """A new empty file; its mode is what this user's new files have."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def share(directory: Path) -> None:
    """Gives the files below the mode of this user's new files: safetensors lets their owner alone read its own.

    Example:
        >>> vae.save_pretrained("runs/x/vae")
        >>> share(Path("runs/x/vae"))
    """
    probe = temporary_sibling(directory / "probe")
    mode = _create(probe)
    probe.unlink()
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def temporary_sibling(path: Path) -> Path:
    """A hidden name beside `path` that nobody can foresee; short, since that of `path` may be as long as names get."""
    return path.with_name(f".{secrets.token_hex(8)}{UNFINISHED}")


def flush_to_disk(path: Path) -> None:
    """Returns when a file, or the names in a directory, would survive a power cut; on POSIX systems only."""
    if os.name != "posix":  # Windows opens no directories, and flushes no file that is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(path: Path) -> None:
    """Returns when a file, or a directory with all below it, would survive a power cut."""
    for entry in [*path.rglob("*"), path]:
        flush_to_disk(entry)


def replace_directory(source: Path, target: Path) -> None:
    """Moves a file or directory to `target`, which is never half old and half new: what is there is moved aside first.

    Example:
        >>> replace_directory(Path("runs/x/step-8.tmp"), Path("runs/x/step-8"))
    """
    if target.is_dir():
        old = temporary_sibling(target)
        target.rename(old)
        source.rename(target)
        delete(old)
    else:
        os.replace(source, target)


def delete(path: Path) -> None:
    """Deletes a file, a link (not what it leads to), or a directory, which first gets a name that nothing reads."""
    if path.is_dir() and not path.is_symlink():
        aside = temporary_sibling(path)
        path.rename(aside)
        shutil.rmtree(aside)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def disk_trouble_explained(path: str | os.PathLike[str], *, remedy: str = "") -> Iterator[None]:
    """Makes one sentence, with what was written and what to do, of what libraries say of a disk that takes no more.

    torch says "unexpected pos 64 vs 0", safetensors has an error of its own. Other errors pass as they are.

    Example:
        >>> with disk_trouble_explained("runs/x", remedy="Resume from the newest checkpoint afterwards."):
        ...     vae.save_pretrained("runs/x")
    """
    try:
        yield
    except Exception as error:
        number = _system_error(error)
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        folder = next(each for each in (Path(path), *Path(path).parents) if each.is_dir())
        free = shutil.disk_usage(folder).free / 1e6
        raise OSError(
            f"{path} could not be written: {os.strerror(number)} ({free:.0f} MB are free). Make room there, or move "
            f"the directory to a larger disk. {remedy}".rstrip()
        ) from error


def _system_error(error: BaseException | None) -> int | None:
    """The system's number of what went wrong below an error, as far as it says one."""
    while error is not None:
        said = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
        if number is not None:
            return number
        error = error.__cause__ or error.__context__
    return None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text that is either whole or absent: `write_text("report.html", page)`."""
    with atomic_path(path) as sibling:
        sibling.write_text(text, encoding="utf-8")


def write_npz(path: str | os.PathLike[str], **arrays: Any) -> None:
    """Writes an uncompressed .npz that is either whole or absent: `write_npz("x.npz", arr_0=samples)`."""
    with atomic_path(path) as sibling, open(sibling, "wb") as file:
        np.savez(file, **arrays)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes `strict_json(content)` that is either whole or absent."""
    write_text(path, strict_json(content))


def strict_json(content: Any) -> str:
    """JSON that every reader takes: NaN and infinity, for which it has no word, are null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(content), indent=2, allow_nan=False) + "\n"


def read_json(
    path: str | os.PathLike[str], *, needs: Mapping[str, type | tuple[type, ...]] | None = None
) -> dict[str, Any]:
    """The object in a JSON file; the file is named in whatever is said against it.

    Args:
        needs: the type of what must stand under a key.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a regular file, not UTF-8, not JSON, a list or a single value, or something else under a key.

    Example:
        >>> read_json("runs/eq-vae/config.json")["_class_name"]
        'AutoencoderKL'
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # reading a pipe would wait for its writer
        raise ValueError(f"{path} must be a JSON file; it is a folder, a pipe or a device.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path} is not a whole JSON file: {str(error).rstrip('.')}. Write it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object ({{...}}); it holds a {type(content).__name__}.")
    for key, kind in (needs or {}).items():
        if key not in content:
            raise ValueError(f"{path} must hold {key!r}; it holds {', '.join([*content][:5]) or 'nothing'}.")
        if not isinstance(content[key], kind):
            kinds = " or ".join(JSON_KINDS[each] for each in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{key!r} of {path} must be {kinds}; it is {JSON_KINDS.get(type(content[key]), 'null')}.")
    return content


def require_format_version(found: Any, current: int, *, path: str | os.PathLike[str], remedy: str) -> None:
    """Refuses a file of an older format, naming the remedy, or of a newer one, which a newer package reads.

    Example:
        >>> require_format_version(1, 2, path="store/manifest.json", remedy="encode the data again")
        Traceback (most recent call last):
        ValueError: store/manifest.json has format_version 1, older than 2, which is read here: encode the data again.
    """
    if found == current:
        return
    if isinstance(found, int) and found > current:
        raise ValueError(
            f"{path} has format_version {found}, newer than {current}: update diffusers_eqvae to read it."
        )
    raise ValueError(f"{path} has format_version {found}, older than {current}, which is read here: {remedy}.")


def read_weights(path: str | os.PathLike[str], *, allowed: Sequence[Any] = ()) -> dict[str, Any]:
    """What a .safetensors or a torch file (.pth, .pt, .bin) holds by name, on the CPU, without executing any of it.

    Args:
        allowed: classes that a torch file may hold beside tensors and plain values; or (class, name) for what is read
            as that class wherever the file says the name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is neither, is damaged, holds nothing by name, or needs code to be read.

    Example:
        >>> network.load_state_dict(read_weights("squeezenet1_1-b8a52dc0.pth"))
    """
    import torch
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():  # a folder too, or a pipe, which would be waited for
        raise FileNotFoundError(f"{path} is not a file of weights (.safetensors, .pth); name one.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes either reader raise almost anything
        # Not in torch's words: they advise to load without weights_only, which would run what the file says.
        needs_code = "unsupported global" in str(error).lower()
        reason = "it needs code to be read" if needs_code else "it is damaged or not a file of weights"
        raise ValueError(
            f"{path} is not read: {reason}. Have its author save the tensors alone, as .safetensors."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} must hold tensors by name; it holds a {type(state).__name__}.")
    return dict(state)


def map_npz_array(path: str | Path, key: str) -> np.ndarray:
    """An array of an uncompressed .npz as a memory map: it costs no memory until it is read.

    numpy maps .npy files only, and the references of ADM's evaluator are .npz files of 10 GB: the array's place is
    read from the headers of the archive.

    Raises:
        KeyError: no such array.
        ValueError: the array is compressed, one of Python objects, or shorter than its header says.
    """
    if _is_compressed(path, key):
        raise ValueError(f"{key} of {path} is compressed and cannot be mapped; write it with np.savez.")
    with _whole_archive(path) as archive:
        entry = archive.getinfo(f"{key}.npy")
    with open(path, "rb") as file:
        # A zip entry's data follow its local header: 30 bytes, of which the last four give the two lengths to skip.
        file.seek(entry.header_offset + 26)
        name_length, extra_length = np.frombuffer(file.read(4), "<u2")
        start = file.seek(int(name_length) + int(extra_length), os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(file)
        if dtype.hasobject:
            # What lies there is a pickle; mapped, it would be read as addresses.
            raise ValueError(f"{key} of {path} holds Python objects ({dtype}); write it as numbers.")
        there, claimed = entry.file_size - (file.tell() - start), math.prod(shape) * dtype.itemsize
        if claimed > there:
            # Mapped, it would go on into whatever follows in the file.
            raise ValueError(
                f"{key} of {path} is cut short: its header says {dtype} {shape}, which is {claimed} bytes, and "
                f"{there} are there. Write the file again."
            )
        order: Literal["C", "F"] = "F" if fortran_order else "C"
        return np.memmap(path, dtype=dtype, mode="r", offset=file.tell(), shape=shape, order=order)


def npz_keys(path: str | Path) -> list[str]:
    """Names of the arrays of an .npz; raises ValueError where the file is not a whole one."""
    with _whole_archive(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def open_npz_array(path: str | Path, key: str) -> np.ndarray:
    """An array of any .npz: a memory map, or loaded where it is compressed.

    Raises:
        KeyError: no such array.
        ValueError: an array of Python objects, which is never unpickled, or one shorter than its header says.
    """
    if not _is_compressed(path, key):
        return map_npz_array(path, key)
    return read_npz(path, key)[key]


def read_npz(path: str | Path, *keys: str) -> dict[str, np.ndarray]:
    """Arrays of an .npz by name, read into memory: `read_npz("part.npz", "arr_0", "arr_1")`.

    Raises:
        KeyError: no such array.
        ValueError: a file that is not a whole .npz, an array of Python objects, which is never unpickled, or one that
            claims to be larger than what is there can unpack to.
    """
    with _whole_archive(path):
        false = next(filter(None, (_false_claim(path, key) for key in keys)), None)
    if false:
        raise ValueError(false)
    with _whole_archive(path), np.load(path) as archive:
        return {key: archive[key] for key in keys}


def _false_claim(path: str | Path, key: str) -> str | None:
    """What is wrong with an array that is larger than its entry, or than deflate can unpack; nothing is unpacked."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{key}.npy")
        with archive.open(entry) as file:
            version = np.lib.format.read_magic(file)
            first = version == (1, 0)
            read_header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
            shape, _, dtype = read_header(file)
    claimed, there = math.prod(shape) * dtype.itemsize, min(entry.file_size, _DEFLATE_RATIO * entry.compress_size)
    if claimed <= there or dtype.hasobject:
        return None
    return (
        f"{key} of {path} cannot be read: it claims to be {dtype} {shape}, which is {claimed} bytes, and what is "
        f"there cannot unpack to more than {there}. The file is damaged or forged: write it again."
    )


@contextmanager
def _whole_archive(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """The archive, whose damage is named with its file wherever it shows while it is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a whole .npz archive: {error}. Write it again, with np.savez.") from error


def _is_compressed(path: str | Path, key: str) -> bool:
    with _whole_archive(path) as archive:
        return archive.getinfo(f"{key}.npy").compress_type != zipfile.ZIP_STORED
