"""Opens an app in the browser: sample, edit an image's latent, inspect an autoencoder, see clusters.

    eqvae app
    eqvae app --pipeline runs/sit --vae stabilityai/sd-vae-ft-mse --other_vae runs/eq-vae

Computes on this machine and answers to it alone, unless server_name says otherwise. What is uploaded lies in a
temporary folder that goes when the app ends.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

from diffusers_eqvae.demo.stages import AUTOENCODER, SHOWN_IN_APP, DemoArguments
from diffusers_eqvae.demo.workbench import Workbench
from diffusers_eqvae.errors import INTERRUPTED, explain
from diffusers_eqvae.model_card import METADATA_FILE
from diffusers_eqvae.options import Checked
from diffusers_eqvae.training_utils.command_line import parse
from diffusers_eqvae.training_utils.console import start_logging
from diffusers_eqvae.training_utils.launch import require_device, run_script

RUNS_ALONE = True

logger = logging.getLogger("app")

OWN = "the package's own"  # name of the autoencoder that comes with it
RESOLUTIONS = (64, 128, 256, 512)
SAMPLED = {"guidance_scale": 2.0, "guidance_interval": (0.0, 0.75), "num_inference_steps": 25}
SCALES, ENDS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0), (0.25, 0.5, 0.75, 1.0)
NO_PIPELINE = """There is no generator to sample from. `eqvae demo` trains two in minutes, with their
autoencoders; `eqvae app`, started again from the same directory, shows them. Name another with `--pipeline`.
"""


@dataclass
class AppArguments(Checked):
    """Which models the app shows, and to whom."""

    demo: str | None = field(
        default=None,
        metadata={
            "help": "Show what `eqvae demo` has left in this directory; unset, and with no model named, what it has "
            f"left in {DemoArguments.output_dir}."
        },
    )
    pipeline: str | None = field(
        default=None,
        metadata={"reads": "pipeline", "help": "Pipeline to sample from: a directory or Hub repository."},
    )
    vae: str | None = field(
        default=None,
        metadata={
            "reads": True,
            "help": "Autoencoder whose latents are edited; unset, the pipeline's, else the small one that comes with "
            "the package.",
        },
    )
    other_vae: str | None = field(
        default=None, metadata={"reads": True, "help": "A second autoencoder, shown beside it."}
    )
    resolution: int | None = field(
        default=None,
        metadata={
            "help": "Side in pixels that images are first shown at; unset, that of the pipeline's images, 64 for the "
            "autoencoder that comes with the package, else 256.",
            "range": "[16, 512]",
        },
    )
    device: str = field(default="cpu", metadata={"help": "Where the networks run, e.g. cuda."})
    server_name: str = field(
        default="127.0.0.1",
        metadata={"help": "Address that the app answers at: this machine's alone; 0.0.0.0 for all that reach it."},
    )
    server_port: int | None = field(
        default=None, metadata={"help": "Its port; unset, the first free one from 7860.", "range": "[1, 65535]"}
    )
    largest_upload_mb: int = field(default=20, metadata={"help": "Of one file, in MB.", "range": "(0, 1000]"})
    visitors_load: bool = field(
        default=False,
        metadata={
            "help": "Let visitors from other machines have any directory or Hub repository loaded by its name; on an "
            "address of this machine alone it is always so."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        named = any((self.pipeline, self.vae, self.other_vae))
        if self.demo and named:
            raise ValueError("--demo shows the models of a demo; leave it out, or --pipeline, --vae and --other_vae.")
        demo = Path(self.demo or DemoArguments.output_dir)
        parts = [demo / part for part in SHOWN_IN_APP]
        missing = [part for part in parts if not (part / METADATA_FILE).is_file()]
        if self.demo and missing:
            raise ValueError(
                f"{demo} is not a finished demo: {missing[0]} is missing or unfinished; "
                f"eqvae demo --output_dir {demo} makes one."
            )
        if not (named or missing):
            self.pipeline, self.vae, self.other_vae = map(str, parts)

    @property
    def names(self) -> dict[str, str]:
        """Name that is shown -> directory or Hub name of each autoencoder."""
        first = self.vae or self.pipeline or str(AUTOENCODER)
        given = [first] if self.other_vae is None else [first, self.other_vae]
        if len(set(given)) < len(given):
            raise ValueError(f"--other_vae is the same as --vae, {first}; name another, or leave it out.")
        short = [OWN if each == str(AUTOENCODER) else Path(each).name for each in given]
        shown = short if len(set(short)) == len(short) else given
        return dict(zip(shown, given, strict=True))

    @property
    def is_private(self) -> bool:
        """Whether only this machine reaches the app."""
        if self.server_name == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.server_name).is_loopback
        except ValueError:
            return False


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Where everything is written while the app runs; gone afterwards, also after SIGTERM, SIGHUP and Ctrl-C."""

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, stop) for number in ends}
    with tempfile.TemporaryDirectory(prefix="eqvae-app-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = None
            for number, handler in before.items():
                signal.signal(number, handler)


def import_gradio() -> Any:
    """gradio, which is to call home neither at its import nor later."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import gradio

    return gradio


def answering(gr: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """A button's function whose errors are shown as a sentence; those that nobody foresaw are logged."""

    @wraps(function)
    def called(*values: Any) -> Any:
        try:
            return function(*values)
        except Exception as error:
            sentence = explain(error)
            if sentence is None:
                logger.exception("What a button started has failed")
            shown = sentence or "This failed unexpectedly; the terminal says why."
            raise gr.Error(shown, duration=20, print_exception=False) from error

    return called


def build(gr: Any, bench: Workbench, *, resolution: int) -> Any:
    """The page: a tab for each thing to do."""
    with gr.Blocks(title="diffusers_eqvae", analytics_enabled=False) as page:
        gr.Markdown(
            "# Latents, looked at\nAutoencoders whose latents are easy to generate, and what is drawn from them."
        )
        with gr.Tab("Edit a latent"):
            edit_tab(gr, bench, resolution, page)
        with gr.Tab("Sample"):
            sample_tab(gr, bench)
        with gr.Tab("Health of an autoencoder"):
            health_tab(gr, bench, resolution)
        with gr.Tab("Clusters"):
            cluster_tab(gr, bench, resolution)
    return page.queue(max_size=32)


def answer(gr: Any, triggers: list[Any], function: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
    """Computes at each of the triggers; one computation runs at a time, on whichever tab."""
    called = answering(gr, function)
    gr.on(triggers, called, inputs, outputs, concurrency_limit=1, concurrency_id="models", trigger_mode="always_last")


def image_input(gr: Any, bench: Workbench, label: str, *, first: bool = False) -> Any:
    """An upload, with examples below where there are some."""
    shown = [str(path) for path in bench.examples[:5]]
    image = gr.Image(
        label=label,
        value=shown[0] if shown and first else None,
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=200,
    )
    # gradio would open it first, and say of a bad one what means nothing to a visitor.
    image.preprocess = lambda uploaded: None if uploaded is None else uploaded.path
    if shown:
        gr.Examples(shown, image, label="Or one of these:")
    return image


def resolution_input(gr: Any, resolution: int) -> Any:
    choices = sorted({*RESOLUTIONS, resolution})
    return gr.Dropdown(choices, value=resolution, label="Resolution", info="Side of the centre square, in pixels.")


def seed_input(gr: Any) -> Any:
    return gr.Number(0, precision=0, minimum=0, maximum=2**53, label="Seed", info="Same seed, same images.")


def edit_tab(gr: Any, bench: Workbench, resolution: int, page: Any) -> None:
    gr.Markdown(
        "An autoencoder turns an image into a small grid of numbers, its latent. Here **the latent is edited, not "
        "the image**, and then decoded. With a good latent the result is the edited image. dB says how near it comes, "
        "more is better; what the autoencoder makes of the edited image itself is as near as it could come."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            turns = gr.Radio(
                [(f"{90 * each}°", each) for each in range(4)], value=1, label="Rotate", info="To the left."
            )
            scale = gr.Slider(0.25, 1.0, 1.0, step=0.05, label="Scale")
            flip = gr.Checkbox(False, label="Mirror left and right")
            run = gr.Button("Edit the latent", variant="primary")
            image = image_input(gr, bench, "Your image", first=True)
            with gr.Accordion("Blend with a second image", open=False):
                other = image_input(gr, bench, "Second image")
                share = gr.Slider(0.0, 1.0, 0.0, step=0.05, label="Share of the second image")
            size = resolution_input(gr, resolution)
        with gr.Column(scale=3, min_width=320):
            says, shown = gr.Markdown(), gr.HTML()

    def edit(image: str, other: str, turns: int, flip: bool, scale: float, share: float, size: int) -> Any:
        return bench.edit(image, other, quarter_turns=turns, flip=flip, scale=scale, share=share, resolution=size)

    triggers = [run.click, turns.input, flip.input, scale.release, share.release, size.input]
    if bench.examples:
        triggers.append(page.load)
    answer(gr, triggers, edit, [image, other, turns, flip, scale, share, size], [shown, says])


def sample_tab(gr: Any, bench: Workbench) -> None:
    if bench.pipeline is None:
        gr.Markdown(NO_PIPELINE)
        return
    classes = bench.classes
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            labels = gr.Dropdown(
                classes, value=[each for _, each in classes[:4]], multiselect=True, max_choices=8, label="Classes"
            )
            run = gr.Button("Sample", variant="primary")
            each = gr.Slider(1, 4, 3, step=1, label="Images of each")
            scale = gr.Slider(
                1.0, 8.0, 2.0, step=0.1, label="Guidance scale", info="How strongly the class is insisted on; 1: not."
            )
            low = gr.Slider(0.0, 1.0, 0.0, step=0.05, label="Guided from noise level", info="0: the finished image.")
            high = gr.Slider(0.0, 1.0, 0.75, step=0.05, label="to noise level", info="1: pure noise.")
            steps = gr.Slider(1, 100, 25, step=1, label="Steps")
            seed = seed_input(gr)
        with gr.Column(scale=3, min_width=320):
            says, shown = gr.Markdown(), gr.HTML()

    def sample(labels: list[int], each: int, scale: float, low: float, high: float, steps: int, seed: int) -> Any:
        options = {"guidance_scale": scale, "guidance_interval": (low, high), "num_inference_steps": int(steps)}
        return bench.sample(labels, int(each), seed=int(seed), **options)

    answer(gr, [run.click], sample, [labels, each, scale, low, high, steps, seed], [shown, says])
    with gr.Accordion("Sweep: what scale and interval do to one image", open=False):
        label = gr.Dropdown(classes, value=classes[0][1], label="Class")
        scales = gr.CheckboxGroup(list(SCALES), value=[1.0, 2.0, 4.0], label="Guidance scales (rows)")
        ends = gr.CheckboxGroup(list(ENDS), value=list(ENDS), label="Guided from noise level 0 to (columns)")
        run = gr.Button("Sweep", variant="primary")
        sweep_says, sweep_shown = gr.Markdown(), gr.HTML()

        def sweep(label: int, scales: list[float], ends: list[float], steps: int, seed: int) -> Any:
            return bench.sweep(label, scales, ends, num_inference_steps=int(steps), seed=int(seed))

        answer(gr, [run.click], sweep, [label, scales, ends, steps, seed], [sweep_shown, sweep_says])


def health_tab(gr: Any, bench: Workbench, resolution: int) -> None:
    gr.Markdown(
        "Is an autoencoder's latent space easy to work with? Measured on images: how well it reconstructs, whether "
        "transformed latents decode, how its latents are distributed."
    )
    names, typed = list(bench.locations), bench.may_load
    what = "Or type a directory or Hub repository." if typed else "Of this app."
    second = names[1] if len(names) > 1 else ""
    with gr.Row():
        vae = gr.Dropdown(names, value=names[0], allow_custom_value=typed, label="Autoencoder", info=what)
        other = gr.Dropdown(
            ["", *names], value=second, allow_custom_value=typed, label="Beside it", info="Or nothing."
        )
        size = resolution_input(gr, resolution)
        count = gr.Slider(4, 64, 16, step=1, label="Images", info="As many of those below.")
    label = "Images to measure on" + (
        " (without any: emoji that the small autoencoder has not seen)" * bool(bench.examples)
    )
    files = gr.File(label=label, file_count="multiple", height=120)
    run = gr.Button("Measure", variant="primary")

    def inspect(vae: str, other: str, files: list[str] | None, size: int, count: int) -> Any:
        return bench.inspect([vae, other], files, resolution=size, num_images=int(count))

    says, card = gr.Markdown(), gr.Image(show_label=False, interactive=False, format="png", visible=True)
    answer(gr, [run.click], inspect, [vae, other, files, size, count], [card, says])


def cluster_tab(gr: Any, bench: Workbench, resolution: int) -> None:
    gr.Markdown("What does a latent know of the parts of an image? Its positions as colours, and in groups.")
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            count = gr.Slider(2, 12, 5, step=1, label="Clusters")
            run = gr.Button("Cluster the image", variant="primary")
            image = image_input(gr, bench, "Your image", first=True)
            size = resolution_input(gr, resolution)
            if bench.pipeline is not None:
                run_samples = gr.Button("Cluster samples", variant="primary")
                labels = gr.Dropdown(
                    bench.classes,
                    value=[each for _, each in bench.classes[:3]],
                    multiselect=True,
                    max_choices=8,
                    label="Classes",
                )
                seed = seed_input(gr)
        with gr.Column(scale=3, min_width=320):
            says, shown = gr.Markdown(), gr.HTML()

    def cluster(image: str, size: int, count: int) -> Any:
        return bench.cluster(image, resolution=size, num_clusters=int(count))

    def cluster_samples(labels: list[int], count: int, seed: int) -> Any:
        return bench.cluster_samples(labels, num_clusters=int(count), seed=int(seed), **SAMPLED)

    answer(gr, [run.click], cluster, [image, size, count], [shown, says])
    if bench.pipeline is not None:
        answer(gr, [run_samples.click], cluster_samples, [labels, count, seed], [shown, says])


def serve(arguments: AppArguments, folder: Path) -> None:
    """Answers until a signal ends the program."""
    gr = import_gradio()  # which takes a folder for its files at once
    may_load, device = arguments.is_private or arguments.visitors_load, require_device(arguments.device)
    bench = Workbench(folder, arguments.names, pipeline=arguments.pipeline, device=device, may_load=may_load)
    page = build(gr, bench, resolution=arguments.resolution or bench.resolution)
    _, address, _ = page.launch(
        server_name=arguments.server_name,
        server_port=arguments.server_port,
        max_file_size=arguments.largest_upload_mb * 2**20,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=["gradio"],
        ssr_mode=False,
        theme=gr.themes.Default(primary_hue="teal"),
    )
    logger.info("The app is at %s (Ctrl-C ends it).", address)
    threading.Event().wait()


def main(argv: list[str] | None = None) -> None:
    (arguments,) = parse(AppArguments, argv=argv, description=__doc__.partition("\n")[0], script=__file__)
    start_logging(format="%(message)s")
    try:
        with temporary_folder() as folder:
            serve(arguments, folder)
    except (KeyboardInterrupt, SystemExit) as stopped:
        logger.info("The app has ended, and its files are gone.")
        # At once: whoever has the page open, or computes, would be waited for.
        os._exit(INTERRUPTED if isinstance(stopped, KeyboardInterrupt) else int(stopped.code or 0))


if __name__ == "__main__":
    run_script(main)
