"""Directories that a program fills over time: whose they are, who writes there now, and what may be replaced.

A directory of ours holds `.eqvae.json`, which says what it is and which names in it were written; only those are ever
replaced or deleted. While a program writes, `.eqvae.lock` beside it names that program.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .files import UNFINISHED, delete, read_json, require_format_version, temporary_sibling, write_json

FORMAT_VERSION = 1
RECORD = ".eqvae.json"
LOCK = ".eqvae.lock"
HEARTBEAT_SECONDS = 30.0
STALE_SECONDS = 600.0
_LEFTOVER = re.compile(rf".*\.[0-9a-f]{{16}}\{UNFINISHED}")
_held: set[str] = set()  # tokens of this process


class DirectoryLock:
    """One writer at a time: a file that names its owner (host, boot, pid namespace, pid, start time, a token).

    The owner touches it every 30 s. It is taken over at once where its owner ran under this boot and pid namespace and
    is gone, or is this very process; from any other owner once it has not been touched for 10 minutes by the clock of
    the file server.

    Example:
        >>> lock = DirectoryLock("runs/x")
        >>> lock.acquire()
        >>> lock.release()
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.path = Path(directory) / LOCK
        self.token = secrets.token_hex(8)
        self._pid = os.getpid()
        self._released = threading.Event()

    def acquire(self, *, break_lock: bool = False) -> None:
        """Takes the lock; raises ValueError, naming its owner, where another program has it.

        `break_lock` takes it from whomever.
        """
        while True:
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
                break
            except FileExistsError:
                self._take_over(break_lock=break_lock)
        with open(descriptor, "w") as file:
            json.dump({**_this_process(), "token": self.token, "since": time.strftime("%F %T %z")}, file)
        _held.add(self.token)
        atexit.register(self.release)
        threading.Thread(target=self._stay_alive, daemon=True, name=f"lock of {self.path.parent}").start()

    def require(self) -> None:
        """Raises ValueError where another program has taken the lock over, as after a suspended night."""
        if _owner(self.path).get("token") != self.token:
            raise ValueError(
                f"{self.path.parent} was taken over by another program ({_called(_owner(self.path))}) while this one "
                "stood still or was told to give it up; nothing more is written there. Look at which of them is to go "
                "on."
            )

    def release(self) -> None:
        """Gives the lock back; without effect where it is not held, or in a fork of its owner."""
        if self._pid == os.getpid() and self.token in _held:
            self._released.set()
            _held.discard(self.token)
            atexit.unregister(self.release)
            if _owner(self.path).get("token") == self.token:
                self.path.unlink(missing_ok=True)

    def _stay_alive(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                if _owner(self.path).get("token") == self.token:
                    os.utime(self.path)
            except OSError:  # the file server may be away for a while
                continue

    def _take_over(self, *, break_lock: bool) -> None:
        """Removes the lock that is there, or refuses to."""
        owner = _owner(self.path)
        untouched = _seconds_untouched(self.path)
        own = owner.get("pid") == self._pid and owner.get("token") in _held
        if not (break_lock or own or _is_gone(owner) or untouched > STALE_SECONDS):
            raise ValueError(
                f"{self.path.parent} is being written to by {_called(owner)}, last heard of {untouched:.0f} s ago. "
                f"Wait for its end (one that is gone is noticed after {STALE_SECONDS / 60:.0f} minutes), choose "
                "another directory, or, where you know that it does not run any more, pass break_lock=True."
            )
        aside = temporary_sibling(self.path)
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return  # its owner, or another heir, was faster
        if _owner(aside).get("token") != owner.get("token"):
            aside.rename(self.path)  # meanwhile an heir had made it its own
            return
        aside.unlink()


class OutputDirectory:
    """A directory that one program fills: looked at first, claimed once there is nothing left that may be refused.

    Free is one that is absent or empty, and one that holds `.eqvae.json` of the same kind; any other is refused, as is
    one that is, holds or lies in something that is read.

    Args:
        path: of the directory.
        kind: what it is to be; a directory of another kind is refused.
        inputs: name -> file or directory that the program reads, as far as it exists; links are followed.

    Attributes:
        names: what has been written to it, by this program or the one that it continues.

    Example:
        >>> output = OutputDirectory("runs/samples", kind="set of samples", inputs={"model": "runs/sit"})
        >>> output.claim("samples.npz", "png")
        >>> output.release()
    """

    def __init__(
        self, path: str | os.PathLike[str], *, kind: str, inputs: Mapping[str, str | os.PathLike[str] | None] = {}
    ) -> None:
        self.path, self.kind = Path(path), kind
        self._lock: DirectoryLock | None = None
        self._claimed = False
        require_apart(self.path, inputs)
        require_creatable(self.path)
        self.names = self._look()

    @property
    def is_new(self) -> bool:
        """Whether no program has written to it."""
        return not (self.path / RECORD).is_file()

    def claim(self, *names: str, lock: bool = True, break_lock: bool = False) -> None:
        """Creates the directory, locks it and makes `names` (of files and folders in it) its program's own.

        Half-written files of a program that was killed are removed.

        Args:
            lock: False for all but one of the processes that fill it together, after that one has it.
            break_lock: take the lock from another program, which must not run any more.
        """
        if self._claimed:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if lock:
                self._lock = DirectoryLock(self.path)
                self._lock.acquire(break_lock=break_lock)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {error}. Name another directory.") from error
        self.names = self._look()  # again, now that nobody else writes
        if lock:
            for leftover in filter(is_leftover, list(self.path.iterdir())):
                delete(leftover)
            self.add(*names)
        self._claimed = True

    def add(self, *names: str) -> None:
        """Makes further names its program's own before they are written; refuses what somebody else wrote."""
        new = [name for name in names if name not in self.names]
        if foreign := [name for name in new if os.path.lexists(self.path / name)]:
            raise ValueError(
                f"{self.path} holds {_listed(foreign)}, which this program has not written and would replace; move "
                "that away."
            )
        if new or self.is_new:
            self.names = [*self.names, *new]
            content = {"format_version": FORMAT_VERSION, "kind": self.kind, "names": self.names}
            write_json(self.path / RECORD, content)

    def delete(self, *names: str) -> None:
        """Deletes those of the names that the program wrote."""
        for name in names:
            if name in self.names:
                delete(self.path / name)

    def require_lock(self) -> None:
        """Raises ValueError where another program has taken the directory over."""
        if self._lock is not None:
            self._lock.require()

    def release(self) -> None:
        """Lets other programs write to it."""
        if self._lock is not None:
            self._lock.release()
        self._lock, self._claimed = None, False

    def _look(self) -> list[str]:
        """The names that are ours; refuses a directory that is not."""
        record = self.path / RECORD
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} cannot be written: it is a file. Name a directory.")
        if not record.is_file():
            present = sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []
            if foreign := [name for name in present if name != LOCK and not _LEFTOVER.fullmatch(name)]:
                raise ValueError(
                    f"{self.path} holds {_listed(foreign)} and no {RECORD}, so it is not a {self.kind} that may be "
                    "continued or replaced; choose a new or an empty directory."
                )
            return []
        try:
            content = read_json(record, needs={"format_version": int, "kind": str, "names": list})
        except ValueError as error:
            raise ValueError(f"{record} is damaged ({error}); choose another directory.") from error
        version, kind = content["format_version"], content["kind"]
        require_format_version(version, FORMAT_VERSION, path=record, remedy="choose another directory")
        if kind != self.kind:
            raise ValueError(f"{self.path} is a {kind}, and this would be a {self.kind}; choose another directory.")
        return _entries(content["names"], record)


def written_names(directory: str | os.PathLike[str]) -> list[str] | None:
    """The names in a directory that its program wrote; None where there is no record of them.

    Example:
        >>> written_names("runs/eq-vae")
        ['checkpoints', 'metrics.jsonl', 'logs', 'config.json', 'diffusion_pytorch_model.safetensors']
    """
    record = Path(directory) / RECORD
    return _entries(read_json(record, needs={"names": list})["names"], record) if record.is_file() else None


def _entries(names: list[Any], record: Path) -> list[str]:
    """Names of a record, of which each must be an entry of its directory: they may be deleted."""
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or "\0" in name:
            raise ValueError(f"{record} names {name!r}, which is not in its directory; choose another directory.")
    return names


def require_apart(
    output: str | os.PathLike[str], inputs: Mapping[str, str | os.PathLike[str] | None], *, called: str = "output"
) -> None:
    """Refuses an output that is, holds or lies in something that is read; links are followed.

    It may lie in a directory of ours (samples beside the pipeline that they are drawn from), since nothing in there is
    read but what its program wrote.

    Example:
        >>> require_apart("runs/x/samples", {"model": "runs/x"})
    """
    target = Path(output).resolve()
    for name, given in inputs.items():
        if given is None or not os.path.exists(given):
            continue
        source = Path(given).resolve()
        relation = "is" if source == target else "holds" if target in source.parents else None
        if source in target.parents and not target.is_file() and not (source / RECORD).is_file():
            relation = "lies in"
        if relation:
            raise ValueError(
                f"The {called} {output} {relation} {given}, which is read here ({name}); what is read is never "
                "written to: choose another place."
            )


def require_replaceable(
    *paths: str | os.PathLike[str],
    inputs: Mapping[str, str | os.PathLike[str] | None] = {},
    ours: Callable[[Path], bool] = lambda path: False,
    companions: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Refuses files that cannot be written after long work, or that would replace what they must not.

    A file that is there is replaced only where `ours` says so of it; one of the `companions`, which are written with
    the first of the paths, where that is there and `ours`. Nothing is created.

    Example:
        >>> require_replaceable("results/eq-vae.json", inputs={"vae": "runs/eq-vae"})
    """
    files = [*map(Path, paths), *map(Path, companions)]
    for number, path in enumerate(files):
        require_creatable(path)
        if path.resolve() in [other.resolve() for other in files[:number]]:
            raise ValueError(f"{path} would be written twice, by two outputs of one command; give each a name.")
        if path.is_dir():
            raise ValueError(f"{path} cannot be written: it is a folder. Name a file.")
        for name, given in inputs.items():
            if given is not None and os.path.exists(given) and Path(given).resolve() == path.resolve():
                raise ValueError(f"{path} is read here ({name}) and would be replaced; name another file.")
        if os.path.lexists(path) and not _is_ours(path if number < len(paths) else files[0], ours):
            raise ValueError(
                f"{path} exists, and is not what this command wrote before and may replace; name another file, or "
                "remove it."
            )


def _is_ours(path: Path, ours: Callable[[Path], bool]) -> bool:
    try:
        return path.is_file() and ours(path)
    except (OSError, ValueError):  # what cannot be read is somebody else's
        return False


def is_leftover(path: Path) -> bool:
    """Whether it was being written, or deleted, when its program was killed."""
    return _LEFTOVER.fullmatch(path.name) is not None


def require_creatable(path: Path) -> None:
    """Refuses the name of a file or directory that cannot be made there, before the work; nothing is created.

    Example:
        >>> require_creatable(Path("results/eq-vae.json"))
    """
    remedy = "Name another place."
    try:
        str(path).encode()  # what is not UTF-8 stands in no log, record or card
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that is too long, or none
        raise ValueError(f"{path} cannot be written: {error}. {remedy}") from error
    whole = path.absolute()
    existing = next(each for each in (whole, *whole.parents) if os.path.lexists(each))
    folder = existing if existing != whole or path.is_dir() else existing.parent
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is not a directory. {remedy}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: {folder} is read-only for you. {remedy}")


def _this_process() -> dict[str, Any]:
    """Where and who this is, as far as the system says."""
    return {
        "host": socket.gethostname(),
        "boot_id": _read("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": os.readlink("/proc/self/ns/pid") if os.path.lexists("/proc/self/ns/pid") else None,
        "pid": os.getpid(),
        "start_time": _start_time(os.getpid()),
    }


def _is_gone(owner: Mapping[str, Any]) -> bool:
    """Whether the owner ran where this process can see that it does not run any more."""
    here = _this_process()
    if any(here[key] is None or owner.get(key) != here[key] for key in ("boot_id", "pid_namespace")):
        return False
    return owner.get("start_time") is not None and _start_time(owner["pid"]) != owner["start_time"]


def _start_time(pid: int) -> str | None:
    """Clock ticks from the boot to the start of a process; None where it does not run (a zombie does not)."""
    state, *fields = _read(f"/proc/{pid}/stat", "X").rpartition(")")[2].split()  # proc(5): state is the third field
    return None if state in ("Z", "X", "x") else fields[18]


def _read(path: str, absent: Any = None) -> Any:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return absent


def _owner(lock: Path) -> dict[str, Any]:
    """What a lock says; nothing where it is absent or its owner was killed while writing it."""
    try:
        content = json.loads(lock.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _called(owner: Mapping[str, Any]) -> str:
    if not owner:
        return "a program that has not said its name"
    return f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('since')})"


def _seconds_untouched(lock: Path) -> float:
    """By the clock of the file server: both times are its own."""
    probe = temporary_sibling(lock)
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        return probe.stat().st_mtime - lock.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # the lock has just been released
    finally:
        probe.unlink()


def _listed(names: Iterable[str], shown: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
