"""What a run sends to the Hub: its result, and on the way what there is by then."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..files import delete, replace_directory, temporary_sibling
from ..hub import push_run
from .arguments import RunArguments
from .optimization import OptimizedModule
from .tracking import METRICS_FILE, images_of

logger = logging.getLogger(__name__)

SNAPSHOT = "pushed"  # the folder of what was last sent on the way


class Uploads:
    """Pushes as --push_to_hub and the options beside it say; call it on the main process only.

    Args:
        output_dir: of the run; what is sent on the way is kept in it until the end, so that a push that failed can be
            repeated.
    """

    def __init__(self, output_dir: Path, arguments: RunArguments) -> None:
        self.output_dir, self.arguments = output_dir, arguments
        self._running: threading.Thread | None = None

    def start(self, step: int, save: Callable[[Path], None], entries: Iterable[OptimizedModule] = ()) -> None:
        """Saves by `save(directory)` and pushes that in the background; not while the last such push still goes on.

        Nor where the weights of `entries` are not finite, or cannot be written.
        """
        if self._running is not None and self._running.is_alive():
            logger.warning("The push before is still going on; there is none of step %d.", step)
            return
        if not all(entry.is_finite() for entry in entries):
            logger.warning("Nothing is pushed of step %d: its weights are NaN or infinite.", step)
            return
        snapshot = self.output_dir / SNAPSHOT
        aside = temporary_sibling(snapshot)
        try:
            aside.mkdir()
            save(aside)
            for path in (self.output_dir / METRICS_FILE, *images_of(self.output_dir, step)):
                target = aside / path.relative_to(self.output_dir)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
            replace_directory(aside, snapshot)
        except OSError as error:  # a full disk, say, which need not end the training
            logger.warning("Nothing is pushed of step %d: %s.", step, error)
            return
        finally:
            delete(aside)
        self._running = threading.Thread(
            target=self._push, args=(snapshot,), kwargs={"commit_message": f"Step {step}"}, daemon=True
        )
        self._running.start()

    def finish(self) -> bool:
        """Pushes the finished run, after what is still going on; whether that worked."""
        if self._running is not None:
            self._running.join()
        delete(self.output_dir / SNAPSHOT)
        return self._push(self.output_dir)

    def _push(self, directory: Path, **options: Any) -> bool:
        given = self.arguments
        named: dict[str, Any] = {"private": given.hub_private, "revision": given.hub_revision}
        named["hub_images"] = given.hub_images
        return push_run(directory, given.hub_model_id or self.output_dir.resolve().name, **named, **options)
