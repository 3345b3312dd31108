"""TrainingRun: the bookkeeping of a training script, so that the script itself shows only the mathematics.

    run = TrainingRun(run_arguments, other_arguments, name="transformer")
    model = run.add("transformer", model, ema=True)
    loader = run.loader(dataset)
    for batch in run.steps(loader):
        loss = ...                      # noise comes from run.randomness
        run.backward(loss)
        run.log({"loss": loss})
    run.finish(save)

It owns the accelerator, seeds, gradient accumulation, clipping, the NaN guard, EMA, checkpoints and exact resume,
tracking and the dry run. It knows nothing about models or losses.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor, nn

from ..data.report import DataError
from ..directories import OutputDirectory
from ..extensions import loaded_extensions
from ..options import inputs_of, reading_options
from ..provenance import module_identity
from ..randomness import StepRandomness, preserved_global_state, reseed_global
from . import command_line
from .arguments import RunArguments
from .best import BestCheckpoint
from .checkpoint_writer import CheckpointWriter
from .checkpoints import Ancestry, find_checkpoint, publish, read_module
from .console import start_logging
from .dry_run import dry_run
from .examples import rank_loader
from .launch import STOPPED, StopSignal, build_accelerator, claim, compile_in_place, wrap
from .nonfinite import NonfiniteGuard, require_finite, too_many_in_a_row
from .optimization import (
    ExponentialAverage,
    OptimizedModule,
    check_master_weights,
    evaluating,
    learning_rate_factor,
    step_all,
    warn_of_slow_average,
)
from .optimizers import build_optimizer
from .tracking import METRICS_FILE, Meter, Tracking
from .uploads import SNAPSHOT, Uploads

logger = logging.getLogger(__name__)

# What a run writes besides its result.
OWN = (
    "checkpoints",
    "resolved_arguments.json",
    command_line.RESOLVED_ARGUMENTS,
    METRICS_FILE,
    "logs",
    "validation",
    SNAPSHOT,
)


class TrainingRun:
    """One run of a training script.

    Args:
        arguments: a checked `RunArguments`.
        others: the script's further argument dataclasses; saved, and compared on resume.
        name: of the project in trackers and on the progress bar.

    Attributes:
        modules, frozen: what has been added, by name, and what only helps.
        step: optimizer steps done so far; during the loop, the number of the step being computed (0-based).
        randomness: `StepRandomness` of the current micro-batch.
        best: by --keep_best; a script tells it what will be measured (`BestCheckpoint.require`).
        device, is_main, accelerator, output_dir, max_train_steps: as their names say; max_train_steps is None until
            `loader` where num_train_epochs decides.

    An output_dir that cannot be written to, is not a run's, or holds one which is not resumed, is refused (see
    `OutputDirectory` and `find_checkpoint`), as is a resumed run that would be another one (see `Ancestry`). It is
    written to from `steps` or `finish` on, when all that may be refused has been.
    """

    def __init__(self, arguments: RunArguments, *others: Any, name: str) -> None:
        self.arguments, self.name = arguments, name
        self.output_dir = Path(arguments.output_dir)
        self.accelerator = build_accelerator(arguments)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        start_logging(logging.INFO if self.is_main else logging.ERROR)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = arguments.allow_tf32
        reseed_global(arguments.seed, 0, 0, 0)
        # Without the resumption: what is saved is to repeat the run, not to open it again.
        self._resolved = {**command_line.resolved(arguments, *others), "resume_from_checkpoint": None}
        self._resolved |= {"allow_changes": [], "break_lock": False}
        inputs = inputs_of(arguments, *others)
        self._output = OutputDirectory(self.output_dir, kind=f"{name} training run", inputs=inputs)
        self._checkpoint = find_checkpoint(arguments.resume_from_checkpoint, self.output_dir, warn=self.is_main)
        facts = {"global_batch_size": self.global_batch_size, "world_size": self.accelerator.num_processes}
        self._ancestry = Ancestry(
            self._checkpoint,
            {**facts, "extensions": loaded_extensions(), "arguments": self._resolved},
            allowed=arguments.allow_changes,
            by_identity=reading_options(*others),
            warn=self.is_main,
        )
        self.step = self._ancestry.step
        self.max_train_steps = arguments.max_train_steps
        self.randomness = StepRandomness(
            arguments.seed, self.accelerator.process_index, self.accelerator.num_processes
        )
        self.modules: dict[str, OptimizedModule] = {}
        self.frozen: list[nn.Module] = []
        self._meter, self._guard = Meter(), NonfiniteGuard(self.device, **self._ancestry.skipped)
        self._tracking: Tracking | None = None
        self.best = BestCheckpoint(arguments.keep_best, self._ancestry.best)
        limit = arguments.checkpoints_total_limit
        self._writer = CheckpointWriter(
            self._output, self._ancestry, best=self.best, limit=limit, arguments=self._resolved
        )
        self._uploads = Uploads(self.output_dir, arguments)
        self._stop, self._micro, self._factor = StopSignal(arguments.max_hours), 0, 1.0

    # ------------------------------------------------------------------ what is trained

    def add(
        self,
        name: str,
        module: nn.Module,
        *,
        learning_rate: float | None = None,
        optimizer: str = "adamw",
        ema: bool = False,
        **options: Any,
    ) -> nn.Module:
        """Registers a module to be optimized and gives back what the step must call (autocast and DDP around it).

        On resume its weights, optimizer state and EMA are those of the checkpoint. Freeze what shall not learn before.

        Args:
            name: key in checkpoints and logs.
            module: float32; only parameters with requires_grad are optimized.
            learning_rate: peak value; None takes --learning_rate.
            optimizer: its name, see `build_optimizer`; `options` are its betas, eps and weight_decay (0 unless given).
            ema: keep a moving average, if --use_ema allows; read it through `averaged(name)`.
        """
        if name in self.modules:
            raise ValueError(f"The run already has a module called {name!r}.")
        check_master_weights(name, module)
        self._ancestry.identify(name, module_identity(module))
        module.to(self.device)
        average = ExponentialAverage(module, self.arguments.ema_decay) if ema and self.arguments.use_ema else None
        rate = self.arguments.learning_rate if learning_rate is None else learning_rate
        built = build_optimizer(optimizer, module, lr=rate, **{"weight_decay": 0.0, **options})
        entry = OptimizedModule(name, module, module, built, rate, average, optimizer_name=optimizer)
        if self._checkpoint is not None:
            entry.load_state_dict(read_module(self._checkpoint, name))
        if self.arguments.compile:
            compile_in_place(module)
        entry.wrapped = wrap(self.accelerator, module)
        self.modules[name] = entry
        return entry.wrapped

    def add_frozen(self, module: nn.Module, *, measures_only: bool = False) -> nn.Module:
        """Moves a module that only helps (LPIPS, a teacher, a VAE) to the device, frozen and in eval mode.

        A resumed run must have the same ones; of those that only measure, another may be given.
        """
        module.requires_grad_(False).eval()
        if not measures_only:
            before = sum(type(each) is type(module) for each in self.frozen)  # two teachers are two things
            name = type(module).__name__ + (f" {before + 1}" if before else "")
            self._ancestry.identify(name, module_identity(module))
        self.frozen.append(module.to(self.device))
        return module

    def module(self, name: str) -> nn.Module:
        """The bare module, without DDP."""
        return self.modules[name].module

    def averaged(self, name: str) -> nn.Module:
        """The EMA of a module, in eval mode, or the module itself where the run keeps none."""
        entry = self.modules[name]
        return entry.module if entry.ema is None else entry.ema.module

    # ------------------------------------------------------------------ the loop

    def loader(
        self, dataset: Any, *, batch_size: int | None = None, collate: Callable[[list[Any]], Any] | None = None
    ) -> Iterable[Any]:
        """Endless micro-batches of this rank, starting where a resumed run stopped without reading what came before.

        Args:
            dataset: has len() and `get(index, generator)`, whose NumPy generator is seeded by (seed, draw number), or
                is a `PixelStream`. Its `identity`, where it has one, is compared with that of the resumed run.
            batch_size: per rank and micro-batch; None takes --train_batch_size.
            collate: as in DataLoader; None stacks.
        """
        return rank_loader(self, self._ancestry, dataset, batch_size=batch_size, collate=collate)

    def steps(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yields micro-batches on the device until max_train_steps; does the bookkeeping between them.

        Before each micro-batch all random generators are set for (seed, rank, step, micro-batch). After the last one
        of a step: clipping, NaN guard, optimizers, EMA, logs, checkpoint. SIGTERM, SIGUSR1 (which schedulers send
        before a time limit) and the end of max_hours write a checkpoint at the next step boundary and end the program
        with status 75 (`launch.STOPPED`); several ranks agree on that at the next multiple of logging_steps. After
        max_nonfinite_steps steps in a row with NaN or infinite gradients it raises ValueError, and weights that are
        not finite are never saved over finite ones.
        """
        if self.max_train_steps is None:
            raise ValueError("The run's length is unknown: pass --max_train_steps, or build the loader by run.loader.")
        if self.arguments.dry_run:
            yield from dry_run(self, loader)
        if self.is_main and any(entry.ema is not None for entry in self.modules.values()):
            warn_of_slow_average(self.arguments.ema_decay, self.max_train_steps)
        self._claim()
        self._tracking = Tracking(
            self.output_dir,
            self.accelerator,
            name=self.name,
            project=self.arguments.tracker_project_name or self.name,
            arguments=self._resolved,
            step=self.step,
            total_steps=self.max_train_steps,
        )
        batches = iter(loader)
        with self._stop.listening():
            while self.step < self.max_train_steps:
                for micro in range(self.arguments.gradient_accumulation_steps):
                    self._micro = micro
                    batch = self._next_batch(batches)
                    with self.accelerator.accumulate(*(entry.wrapped for entry in self.modules.values())):
                        yield batch
                self._optimize()
                self.step += 1
                self._after_step()
        if self.arguments.checkpointing_steps:
            self.save_checkpoint()

    def backward(self, loss: Tensor, *, inputs: Sequence[Tensor] | None = None, retain_graph: bool = False) -> None:
        """Accumulates the gradients of loss / gradient_accumulation_steps, into `inputs` only where given.

        Those of a loss that is not finite are NaN, on all ranks, so that the step is skipped (|NaN| has gradient 0).
        """
        factor = torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
        self.accelerator.backward(factor * loss, inputs=inputs, retain_graph=retain_graph)

    def due(self, every: int | None, *, at_start: bool = False) -> bool:
        """In the first micro-batch after every so many steps, and of step 0 where `at_start`; never in a dry run."""
        begun = self._micro == 0 and (self.step > 0 or at_start) and not self.arguments.dry_run
        return bool(every) and begun and self.step % every == 0

    @contextmanager
    def validation(self) -> Iterator[None]:
        """No gradients, modules in eval mode, and the random stream of training left as it was."""
        call = self.randomness.call
        logger.info("Validating after %d steps.", self.step)
        try:
            with evaluating(self.modules.values()), preserved_global_state(), torch.no_grad():
                yield
        finally:
            self.randomness.call = call

    def log(self, values: Mapping[str, Tensor | float]) -> None:
        """Adds to the means that are read every logging_steps; no waiting for the device. Same names on every rank."""
        self._meter.add(values, self.device)

    def log_figures(self, values: Mapping[str, float]) -> None:
        """Measured values of the present step, written at once; on the main process only.

        Where they are the best yet by --keep_best (`best`), the checkpoint of this step is kept.
        """
        if self._tracking is not None:
            self._tracking.figures(self.step, values)
        if self.is_main and self.best.improves(self.step, values, self.modules.values()):
            self._save()

    def log_images(self, name: str, images: np.ndarray | Sequence[Image.Image]) -> None:
        """Images (uint8 NHWC or PIL) to validation/<step>_<name>.png and the tracker; on the main process only."""
        if self._tracking is not None:
            self._tracking.images(self.step, name, images)

    def finish(self, save: Callable[[Path], None]) -> None:
        """Calls `save(directory)` on the main process and moves what it wrote to the root of output_dir.

        Raises:
            ValueError: not one step was taken, since all had NaN or infinite gradients, or the weights are not finite.
        """
        self._claim()
        self.accelerator.wait_for_everyone()
        self._report()
        require_finite(self.modules.values(), step=self.step, output_dir=self.output_dir)
        in_a_row, total = self._guard.read()
        if 0 < in_a_row == self._guard.steps:
            self._stop_at_nonfinite(in_a_row)
        if self.is_main:
            self._output.require_lock()
            try:
                publish(self._output, save, keep=OWN)
            except BaseException:
                self._save()  # what was trained is not lost with what could not be published
                raise
            skipped = f", {total} of them skipped (NaN or infinite)" if total else ""
            logger.info("Finished after %d steps%s; the result is in %s.", self.step, skipped, self.output_dir)
            self.best.say(self.output_dir)
        self.accelerator.wait_for_everyone()
        self._close()

    def push(self) -> None:
        """Publishes the finished run on the Hub, if --push_to_hub says so; a push that fails ends the program."""
        if self.arguments.push_to_hub and self.is_main and not self._uploads.finish():
            sys.exit(1)

    def push_meanwhile(self, save: Callable[[Path], None]) -> None:
        """Pushes what `save(directory)` writes now in the background, every --push_every steps; never fails."""
        if self.is_main and self.due(self.arguments.push_every):
            with self.validation():
                self._uploads.start(self.step, save, self.modules.values())

    # ------------------------------------------------------------------ inside

    @property
    def global_batch_size(self) -> int:
        """Examples per optimizer step over all ranks and micro-batches."""
        per_rank = self.arguments.train_batch_size * self.arguments.gradient_accumulation_steps
        return per_rank * self.accelerator.num_processes

    @property
    def changes(self) -> list[dict[str, Any]]:
        """What differs from the checkpoint that was resumed, as allowed."""
        return self._ancestry.changes

    @property
    def skipped_steps(self) -> int:
        """How many steps had NaN or infinite gradients; waits for the device."""
        return self._guard.read()[1]

    def save_checkpoint(self, *, wait: bool = True) -> None:
        """Writes the state after `step` steps, unless it is there already; refuses weights that are not finite."""
        if self._writer.step != self.step:
            require_finite(self.modules.values(), step=self.step, output_dir=self.output_dir)
            self._save()
        self._writer.step = self.step
        if wait:
            self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        if self.is_main:
            self._writer.write(self.step, self.modules.values(), skipped=self._guard.counts())

    def _claim(self) -> None:
        if self.is_main:
            claim(self._output, *OWN, break_lock=self.arguments.break_lock)
            if not self.step and find_checkpoint(self.arguments.resume_from_checkpoint, self.output_dir, warn=False):
                raise ValueError(f"Another program has trained in {self.output_dir} meanwhile; start this one again.")
            command_line.save_resolved(self._resolved, self.output_dir)
        self.accelerator.wait_for_everyone()

    def _next_batch(self, batches: Iterator[Any]) -> Any:
        try:
            batch = send_to_device(self._tracking.fetch(batches), self.device, non_blocking=True)
        except DataError:
            if self.arguments.checkpointing_steps and self._micro == 0:
                self.save_checkpoint(wait=False)  # other ranks may have their batches
            raise
        self.randomness.at(self.step, self._micro)
        reseed_global(self.arguments.seed, self.accelerator.process_index, self.step, self._micro)
        return batch

    def _optimize(self) -> None:
        active = [entry for entry in self.modules.values() if entry.received_gradients]
        if not active:
            raise RuntimeError("No module received a gradient in this step; call run.backward(loss) in the loop.")
        self._factor = learning_rate_factor(
            self.arguments.lr_scheduler,
            self.step,
            warmup_steps=self.arguments.lr_warmup_steps,
            total_steps=self.max_train_steps or 1,
        )
        norms, nonfinite = step_all(active, factor=self._factor, max_grad_norm=self.arguments.max_grad_norm)
        self._guard.count(nonfinite)
        self._meter.add({f"gradient_norm/{name}": norm for name, norm in norms.items()}, self.device)
        self._meter.close_step(nonfinite)

    def _after_step(self) -> None:
        self._tracking.advance()
        logging_due = self.step % self.arguments.logging_steps == 0 or self.step == self.max_train_steps
        if logging_due:
            self._report()
        if self.arguments.checkpointing_steps and self.step % self.arguments.checkpointing_steps == 0:
            self.save_checkpoint()
        # Ranks must agree to stop; asking every step would make each wait for the slowest.
        ask = logging_due or self.accelerator.num_processes == 1
        if ask and (reason := self._stop.agreed(self.accelerator)):
            self.save_checkpoint()
            self._close()
            logger.info("Stopped by %s after step %d; --resume_from_checkpoint latest goes on.", reason, self.step)
            sys.exit(STOPPED)

    def _report(self) -> None:
        values = self._meter.read(self.accelerator)
        if not values or self._tracking is None:
            return
        in_a_row, total = self._guard.read()
        values["learning_rate"] = self.arguments.learning_rate * self._factor
        values["nonfinite_steps"] = total
        if self.is_main:
            self._guard.say(self.step)
        for name, entry in self.modules.items():
            if entry.ema is not None:
                values[f"ema_distance/{name}"] = entry.ema_distance()
        self._tracking.scalars(self.step, values, images_per_step=self.global_batch_size)
        if in_a_row >= self.arguments.max_nonfinite_steps:
            self._stop_at_nonfinite(in_a_row)

    def _stop_at_nonfinite(self, in_a_row: int) -> NoReturn:
        self.save_checkpoint()
        self._close()
        raise too_many_in_a_row(in_a_row, step=self.step, output_dir=self.output_dir)

    def _close(self) -> None:
        if self._tracking is not None:
            self._tracking.close()
        self.accelerator.end_training()
        self._output.release()
