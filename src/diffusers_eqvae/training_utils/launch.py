"""The processes of a script: which ones a launcher started, and how one ends after an error that a user can mend."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, LoggerType, parse_flag_from_env
from torch import nn

from ..directories import OutputDirectory
from ..errors import run_program
from .arguments import RunArguments

# Where accelerate finds how many processes there are.
PROCESS_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def runs_on_cpu() -> bool:
    """Whether there is no accelerator, or ACCELERATE_USE_CPU says not to use it.

    accelerate must be told: else it takes the ranks that torchrun starts on a CPU for programs on their own.
    """
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def is_alone_with_several_devices() -> bool:
    """Whether no launcher has started this process, and there is more than one accelerator that it may use."""
    launched = any(name in os.environ for name in PROCESS_COUNTS)
    return not launched and not runs_on_cpu() and torch.accelerator.device_count() > 1


def require_device(name: str) -> torch.device:
    """The device of this name, tried by an empty tensor; refused where it cannot be used."""
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {name} cannot be used: {error}") from error


def build_state() -> PartialState:
    """The processes of a script that does not train; they wait at its end for the slowest, however long."""
    _refuse_lone_process()
    return PartialState(cpu=runs_on_cpu(), timeout=timedelta(days=7))


def _refuse_lone_process() -> None:
    """`accelerate launch --cpu --num_processes 2` sets a master's address and starts one process, without a word."""
    counted = any(name in os.environ for name in PROCESS_COUNTS)
    if parse_flag_from_env("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ and not counted:
        raise ValueError(
            "accelerate launch --cpu starts one process only, whatever --num_processes says. Start more by "
            f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 {sys.argv[0]} ..., or leave --num_processes out."
        )


def _refuse_other_parallelism() -> None:
    for name in ("FSDP", "DeepSpeed", "Megatron_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}"):
            raise ValueError(
                f"{name} is not supported: every process keeps whole weights, averages and optimizer states, and an "
                "autoencoder's adaptive weights read the gradient of one layer. Launch data parallel: accelerate "
                "launch --multi_gpu, or distributed_type: MULTI_GPU in the config that accelerate reads."
            )


def run_script(main: Callable[[], object]) -> NoReturn:
    """Ends the program with what `main` has to say: status 0, or one sentence and status 2 for what a user can mend.

    See `errors.run_program`, which says what that is.
    """
    sys.exit(run_program(Path(sys.argv[0]).name, main))


def claim(output: OutputDirectory, *names: str, lock: bool = True, break_lock: bool = False) -> None:
    """`output.claim`, whose refusal names the flag."""
    try:
        output.claim(*names, lock=lock, break_lock=break_lock)
    except ValueError as error:
        raise ValueError(str(error).replace("pass break_lock=True", "give --break_lock")) from error


# The other ranks wait while the main process validates, measures statistics and saves.
LONGEST_WAIT = timedelta(hours=2)


def build_accelerator(arguments: RunArguments) -> Accelerator:
    """An Accelerator for one process or many, with its tracker; a dry run has none.

    Raises:
        ValueError: float16, wherever it was asked for, sharded weights, a launcher that starts one process where
            more were asked for, or a tracker that is not installed.
    """
    _refuse_lone_process()
    _refuse_other_parallelism()
    precision = arguments.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise ValueError(
            f"Mixed precision must be no or bf16; got {precision}. float16 ends at 65504, which activations and sums "
            "over pixels exceed: the run would end in NaN. Use --mixed_precision bf16 (CPUs, and NVIDIA cards from "
            "Ampere on: A100, RTX 30), or no on older cards (V100, T4, RTX 20)."
        )
    trackers = find_trackers(arguments.report_to)
    return Accelerator(
        cpu=runs_on_cpu(),
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        mixed_precision=precision,
        log_with=None if arguments.dry_run or not trackers else trackers,
        project_dir=None if arguments.dry_run else Path(arguments.output_dir) / "logs",
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=False),
            InitProcessGroupKwargs(timeout=LONGEST_WAIT),
        ],
        step_scheduler_with_optimizer=False,
    )


TRACKERS = ("tensorboard", "wandb", "trackio")


def find_trackers(report_to: str) -> list[str]:
    """The names of the trackers that --report_to means.

    Raises:
        ValueError: one that is not installed (accelerate would go on without it), or "all" where none is.
    """
    installed = [name for name in TRACKERS if LoggerType(name) in get_available_trackers()]
    wanted = {"none": [], "all": installed or ["all"]}.get(report_to, [report_to])
    if missing := [name for name in wanted if name not in installed]:
        package = TRACKERS[0] if report_to == "all" else missing[0]
        raise ValueError(f"--report_to {report_to} needs a package: pip install {package}. Or use --report_to none.")
    return wanted


def compile_in_place(module: nn.Module) -> None:
    """torch.compile, with a backward that may be walked more than once: adaptive weights read gradients before it.

    A transform of latents draws their size, and torch 2.14's inductor cannot sort the strides of a view of symbolic
    size ("cannot determine truth value of Relational"); it does not sort them where they are to be exact.
    """
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    functorch.donated_buffer = False
    module.compile(options={"strict_output_strides": True} if hasattr(inductor, "strict_output_strides") else None)


def wrap(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """What the training step calls in the module's stead."""
    with warnings.catch_warnings():  # torch 2.15 renames the option, torch 2.6 knows only the old name
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return accelerator.prepare_model(module)


# What a run ends with that is to be started again: EX_TEMPFAIL of sysexits.h.
STOPPED = 75


class StopSignal:
    """Remembers a signal that came while `listening`, and when `max_hours` are over; the loop acts between steps."""

    def __init__(self, max_hours: float | None = None) -> None:
        self._received, self._max_hours, self._begun = "", max_hours, time.monotonic()

    def agreed(self, accelerator: Accelerator) -> str | None:
        """Why all processes are to stop; None as long as none is. Every process must call it."""
        over = self._max_hours is not None and time.monotonic() - self._begun >= 3600 * self._max_hours
        own = self._received or (f"--max_hours {self._max_hours:g}" if over else "")
        flag = torch.tensor(float(bool(own)), device=accelerator.device)
        anyone = accelerator.num_processes > 1 and accelerator.reduce(flag, reduction="sum").item() > 0
        return own or ("another process" if anyone else None)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Replaces the handlers inside; Python allows that in the main thread only, elsewhere nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGUSR1)
        previous = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
