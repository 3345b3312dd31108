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
import shlex
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
from torch.utils.data import DataLoader

from ..extensions import loaded_extensions
from ..files import require_writable
from ..provenance import versions
from ..randomness import StepRandomness, preserved_global_state, reseed_global
from . import command_line
from .arguments import RunArguments
from .checkpoints import find_checkpoint, publish, read_module, resumed_step, write_checkpoint
from .console import start_logging
from .dry_run import SavedActivations, first_example, report
from .launch import StopSignal, build_accelerator, wrap
from .optimization import (
    ExponentialAverage,
    NonfiniteGuard,
    OptimizedModule,
    build_optimizer,
    check_master_weights,
    learning_rate_factor,
)
from .tracking import Meter, Tracking

logger = logging.getLogger(__name__)

DRY_RUN_STEPS = 4  # what a step saves may depend on its random draw, so the largest of a few counts


class TrainingRun:
    """One run of a training script.

    Args:
        arguments: a checked `RunArguments`.
        others: the script's further argument dataclasses; saved, and compared on resume.
        name: of the project in trackers and on the progress bar.

    Attributes:
        step: optimizer steps done so far; during the loop, the number of the step being computed (0-based).
        randomness: `StepRandomness` of the current micro-batch.
        device, is_main, accelerator, output_dir, max_train_steps: as their names say; max_train_steps is None until
            `loader` where num_train_epochs decides.

    An unwritable output_dir, and one that holds a run which is not resumed, are refused (see `find_checkpoint`).
    """

    def __init__(self, arguments: RunArguments, *others: Any, name: str) -> None:
        self.arguments, self.name = arguments, name
        self.output_dir = Path(arguments.output_dir)
        self.accelerator = build_accelerator(arguments)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        level = logging.INFO if self.is_main else logging.ERROR
        start_logging(level)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = arguments.allow_tf32
        reseed_global(arguments.seed, 0, 0, 0)
        # Without the resumption: what is saved is to repeat the run, not to open it again.
        self._resolved = {**command_line.resolved(arguments, *others), "resume_from_checkpoint": None}
        self._checkpoint = find_checkpoint(arguments.resume_from_checkpoint, self.output_dir, warn=self.is_main)
        self.step = 0
        if self._checkpoint is not None:
            self.step = resumed_step(self._checkpoint, self._facts(), warn=self.is_main)
        self.max_train_steps = arguments.max_train_steps
        self.randomness = StepRandomness(
            arguments.seed, self.accelerator.process_index, self.accelerator.num_processes
        )
        self._modules: dict[str, OptimizedModule] = {}
        self._frozen: list[nn.Module] = []
        self._meter, self._guard = Meter(), NonfiniteGuard(self.device)
        self._tracking: Tracking | None = None
        self._stop, self._saved_step, self._micro, self._factor = StopSignal(), self.step, 0, 1.0
        if not arguments.dry_run:
            self._claim_output_dir()

    # ------------------------------------------------------------------ what is trained

    def add(
        self,
        name: str,
        module: nn.Module,
        *,
        learning_rate: float | None = None,
        optimizer: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        ema: bool = False,
    ) -> nn.Module:
        """Registers a module to be optimized and gives back what the step must call (autocast and DDP around it).

        On resume its weights, optimizer state and EMA are those of the checkpoint. Freeze what shall not learn before.

        Args:
            name: key in checkpoints and logs.
            module: float32; only parameters with requires_grad are optimized.
            learning_rate: peak value; None takes --learning_rate.
            optimizer: "adamw" or "adam", with `betas` and `weight_decay`.
            ema: keep a moving average, if --use_ema allows; read it through `averaged(name)`.
        """
        if name in self._modules:
            raise ValueError(f"The run already has a module called {name!r}.")
        parameters = check_master_weights(name, module)
        module.to(self.device)
        average = ExponentialAverage(module, self.arguments.ema_decay) if ema and self.arguments.use_ema else None
        rate = self.arguments.learning_rate if learning_rate is None else learning_rate
        built = build_optimizer(optimizer, parameters, lr=rate, betas=betas, weight_decay=weight_decay)
        entry = OptimizedModule(name, module, module, built, rate, average)
        if self._checkpoint is not None:
            entry.load_state_dict(read_module(self._checkpoint, name))
        if self.arguments.compile:
            module.compile()
        entry.wrapped = wrap(self.accelerator, module)
        self._modules[name] = entry
        return entry.wrapped

    def add_frozen(self, module: nn.Module) -> nn.Module:
        """Moves a module that only helps (LPIPS, a teacher, a VAE) to the device, frozen and in eval mode."""
        self._frozen.append(module.to(self.device).requires_grad_(False).eval())
        return module

    def module(self, name: str) -> nn.Module:
        """The bare module, without DDP."""
        return self._modules[name].module

    def averaged(self, name: str) -> nn.Module:
        """The EMA of a module, in eval mode, or the module itself where the run keeps none."""
        entry = self._modules[name]
        return entry.module if entry.ema is None else entry.ema.module

    # ------------------------------------------------------------------ the loop

    def loader(
        self, dataset: Any, *, batch_size: int | None = None, collate: Callable[[list[Any]], Any] | None = None
    ) -> DataLoader:
        """Endless micro-batches of this rank, starting where a resumed run stopped without reading what came before.

        Args:
            dataset: has len() and `get(index, generator)`; the NumPy generator is seeded by (seed, draw number).
            batch_size: per rank and micro-batch; None takes --train_batch_size.
            collate: as in DataLoader; None stacks.
        """
        from ..data.order import DrawDataset, DrawSampler, collate_draws, leave_interrupts

        batch_size = batch_size or self.arguments.train_batch_size
        accumulation = self.arguments.gradient_accumulation_steps
        if self.max_train_steps is None:
            per_step = batch_size * accumulation * self.accelerator.num_processes
            self.max_train_steps = math.ceil(self.arguments.num_train_epochs * len(dataset) / per_step)
        sampler = DrawSampler(
            len(dataset),
            batch_size,
            seed=self.arguments.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            start_batch=self.step * accumulation,
        )
        workers = self.arguments.dataloader_num_workers
        return DataLoader(
            DrawDataset(dataset, seed=self.arguments.seed),
            batch_sampler=sampler,
            num_workers=workers,
            worker_init_fn=leave_interrupts,
            collate_fn=collate or collate_draws,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
        )

    def steps(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yields micro-batches on the device until max_train_steps; does the bookkeeping between them.

        Before each micro-batch all random generators are set for (seed, rank, step, micro-batch). After the last one
        of a step: clipping, NaN guard, optimizers, EMA, logs, checkpoint. SIGTERM (or SIGUSR1, which schedulers send
        before a time limit) writes a checkpoint at the next step boundary and ends the program with status 0; several
        ranks agree on that at the next multiple of logging_steps. After max_nonfinite_steps steps in a row with NaN or
        infinite gradients it raises RuntimeError.
        """
        if self.max_train_steps is None:
            raise ValueError("The run's length is unknown: pass --max_train_steps, or build the loader by run.loader.")
        if self.arguments.dry_run:
            yield from self._dry_run(loader)
        kept = self.arguments.ema_decay**self.max_train_steps
        if self.is_main and kept > 0.5 and any(entry.ema is not None for entry in self._modules.values()):
            logger.warning(
                "--ema_decay %g over %d steps: %.0f %% of the average will be the weights it started from. For so "
                "short a run lower it, or use --no_use_ema.",
                self.arguments.ema_decay,
                self.max_train_steps,
                100 * kept,
            )
        self._tracking = Tracking(
            self.output_dir,
            self.accelerator,
            report_to=self.arguments.report_to,
            name=self.name,
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
                    with self.accelerator.accumulate(*(entry.wrapped for entry in self._modules.values())):
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
        """True in the first micro-batch after every so many optimizer steps, and of step 0 where `at_start`."""
        return bool(every) and self._micro == 0 and (self.step > 0 or at_start) and self.step % every == 0

    @contextmanager
    def validation(self) -> Iterator[None]:
        """No gradients, modules in eval mode, and the random stream of training left as it was."""
        call = self.randomness.call
        modes = {module: module.training for entry in self._modules.values() for module in entry.module.modules()}
        for entry in self._modules.values():
            entry.module.eval()
        try:
            with preserved_global_state(), torch.no_grad():
                yield
        finally:
            self.randomness.call = call
            for module, mode in modes.items():
                module.training = mode

    def log(self, values: Mapping[str, Tensor | float]) -> None:
        """Adds to the means that are read every logging_steps; no waiting for the device. Same names on every rank."""
        self._meter.add(values, self.device)

    def log_figures(self, values: Mapping[str, float]) -> None:
        """Measured values of the present step, written at once; on the main process only."""
        if self._tracking is not None:
            self._tracking.figures(self.step, values)

    def log_images(self, name: str, images: np.ndarray | Sequence[Image.Image]) -> None:
        """Images (uint8 NHWC or PIL) to validation/<step>_<name>.png and the tracker; on the main process only."""
        if self._tracking is not None:
            self._tracking.images(self.step, name, images)

    def finish(self, save: Callable[[Path], None]) -> None:
        """Calls `save(directory)` on the main process and moves what it wrote to the root of output_dir.

        Raises:
            RuntimeError: not one step was taken, since all had NaN or infinite gradients.
        """
        self.accelerator.wait_for_everyone()
        self._report()
        in_a_row, _ = self._guard.read()
        if 0 < in_a_row == self._guard.steps:
            self._stop_at_nonfinite(in_a_row)
        if self.is_main:
            publish(self.output_dir, save)
            logger.info("Finished after %d steps; the result is in %s.", self.step, self.output_dir)
        self.accelerator.wait_for_everyone()
        self._close()

    # ------------------------------------------------------------------ inside

    @property
    def global_batch_size(self) -> int:
        """Examples per optimizer step over all ranks and micro-batches."""
        arguments = self.arguments
        per_rank = arguments.train_batch_size * arguments.gradient_accumulation_steps
        return per_rank * self.accelerator.num_processes

    def settings(self) -> dict[str, Any]:
        """What the run's card says of its training."""
        return {
            "optimizer_steps": self.step,
            "global_batch_size": self.global_batch_size,
            "learning_rate": self.arguments.learning_rate,
            "mixed_precision": self.accelerator.mixed_precision,
            "ema_decay": self.arguments.ema_decay if self.arguments.use_ema else None,
            "seed": self.arguments.seed,
        }

    def provenance(self) -> dict[str, Any]:
        """What the run's card says of how it was made."""
        return {"versions": versions(), "extensions": loaded_extensions(), "command": shlex.join(sys.argv)}

    def save_checkpoint(self) -> None:
        """Writes the state after `step` steps, unless it is there already."""
        if self._saved_step != self.step and self.is_main:

            def write(directory: Path) -> None:
                for name, entry in self._modules.items():
                    torch.save(entry.state_dict(), directory / f"{name}.pt")
                command_line.save_resolved(self._resolved, directory)

            path = write_checkpoint(
                self.output_dir,
                step=self.step,
                write=write,
                facts=self._facts(),
                limit=self.arguments.checkpoints_total_limit,
            )
            logger.info("Checkpoint %s.", path)
        self._saved_step = self.step
        self.accelerator.wait_for_everyone()

    def _facts(self) -> dict[str, Any]:
        world_size = self.accelerator.num_processes
        return {
            "global_batch_size": self.global_batch_size,
            "world_size": world_size,
            "extensions": loaded_extensions(),
            "arguments": self._resolved,
        }

    def _claim_output_dir(self) -> None:
        if self.is_main:
            require_writable(self.output_dir / "resolved_arguments.json")
            command_line.save_resolved(self._resolved, self.output_dir)
        self.accelerator.wait_for_everyone()

    def _next_batch(self, batches: Iterator[Any]) -> Any:
        batch = send_to_device(next(batches), self.device, non_blocking=True)
        self.randomness.at(self.step, self._micro)
        reseed_global(self.arguments.seed, self.accelerator.process_index, self.step, self._micro)
        return batch

    def _optimize(self) -> None:
        active = [entry for entry in self._modules.values() if entry.received_gradients]
        if not active:
            raise RuntimeError("No module received a gradient in this step; call run.backward(loss) in the loop.")
        assert self.max_train_steps is not None  # steps() refuses to start without
        self._factor = learning_rate_factor(
            self.arguments.lr_scheduler,
            self.step,
            warmup_steps=self.arguments.lr_warmup_steps,
            total_steps=self.max_train_steps,
        )
        norms = {entry.name: entry.gradient_norm() for entry in active}
        nonfinite = (~torch.isfinite(torch.stack(list(norms.values()))).all()).float()
        for entry in active:
            if self.arguments.max_grad_norm is not None:
                entry.clip(self.arguments.max_grad_norm, norms[entry.name])
            entry.step(entry.learning_rate * self._factor, nonfinite)
            entry.update_ema(nonfinite)
            entry.optimizer.zero_grad(set_to_none=True)
        self._guard.count(nonfinite)
        self._meter.add({f"gradient_norm/{name}": norm for name, norm in norms.items()}, self.device)

    def _after_step(self) -> None:
        self._tracking.advance()
        logging_due = self.step % self.arguments.logging_steps == 0 or self.step == self.max_train_steps
        if logging_due:
            self._report()
        if self.arguments.checkpointing_steps and self.step % self.arguments.checkpointing_steps == 0:
            self.save_checkpoint()
        # Ranks must agree to stop; asking every step would make each wait for the slowest.
        if self.accelerator.num_processes > 1 and logging_due:
            flag = torch.tensor(float(self._stop.received), device=self.device)
            self._stop.received = bool(self.accelerator.reduce(flag, reduction="sum").item())
        if self._stop.received and (self.accelerator.num_processes == 1 or logging_due):
            self.save_checkpoint()
            self._close()
            logger.info("Stopped by a signal after step %d; continue with --resume_from_checkpoint latest.", self.step)
            sys.exit(0)

    def _report(self) -> None:
        values = self._meter.read(self.accelerator)
        if not values or self._tracking is None:
            return
        in_a_row, total = self._guard.read()
        values["learning_rate"] = self.arguments.learning_rate * self._factor
        values["nonfinite_steps"] = total
        if in_a_row and self.is_main:
            logger.warning("The last %d steps up to %d were skipped: NaN or infinite.", in_a_row, self.step)
        for name, entry in self._modules.items():
            if entry.ema is not None:
                values[f"ema_distance/{name}"] = entry.ema_distance()
        self._tracking.scalars(self.step, values, images_per_step=self.global_batch_size)
        if in_a_row >= self.arguments.max_nonfinite_steps:
            self._stop_at_nonfinite(in_a_row)

    def _stop_at_nonfinite(self, in_a_row: int) -> NoReturn:
        self.save_checkpoint()
        self._close()
        raise RuntimeError(
            f"Loss or gradients were NaN or infinite in {in_a_row} steps in a row, up to step {self.step}. The "
            f"weights are untouched by them and saved in {self.output_dir}/checkpoints. Lower --learning_rate, set "
            "--max_grad_norm, or look for broken input; then continue with --resume_from_checkpoint latest."
        )

    def _close(self) -> None:
        if self._tracking is not None:
            self._tracking.close()
        self.accelerator.end_training()

    def _dry_run(self, loader: Iterable[Any]) -> Iterator[Any]:
        modules = [*self._frozen, *(entry.module for entry in self._modules.values())]
        saved, batches, first_step = SavedActivations(modules), iter(loader), self.step
        for self.step in range(first_step, first_step + DRY_RUN_STEPS):
            batch = send_to_device(first_example(next(batches)), self.device)
            self.randomness.at(self.step, 0)
            reseed_global(self.arguments.seed, self.accelerator.process_index, self.step, 0)
            with saved.measure():
                yield batch
            for entry in self._modules.values():
                entry.optimizer.zero_grad(set_to_none=True)
        text = report(
            self._modules.values(),
            self._frozen,
            activation_bytes_per_example=saved.largest,
            batch_size=self.arguments.train_batch_size,
            checkpoints_kept=self.arguments.checkpoints_total_limit,
        )
        if self.is_main:
            sys.stdout.write(text + "\n")
        sys.exit(0)
