r"""Measures what latents know about classes and depths: a few annotated images are carried over to the others.

    eqvae evaluate-perception --vae runs/eq-vae --images IMAGES --masks MASKS --depths DEPTHS \
        --num_annotated 5 --output perception.json

Nothing is trained: each latent position takes the label, or the depth, of the most similar annotated positions. Beside
it stand two answers that never look at the image: the mean of all annotated positions (for classes: the most frequent
one), and the mean at each. With --alignment_network the features are those that it predicts, and --segmentation_head
and --depth_head apply published linear heads to them. Writes a result card (JSON) for `eqvae compare`, and an overview
(PNG).
"""

import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from diffusers_eqvae.directories import require_replaceable
from diffusers_eqvae.images import evenly_spaced, grid
from diffusers_eqvae.metrics.result_card import ResultCard, is_card_of
from diffusers_eqvae.options import inputs_of
from diffusers_eqvae.perception.annotated_images import paired_files
from diffusers_eqvae.perception.evaluation import AnnotatedReader, split_results
from diffusers_eqvae.perception.tasks import Method, transfer_methods
from diffusers_eqvae.provenance import hardware, hub_commit
from diffusers_eqvae.training_utils.command_line import parse
from diffusers_eqvae.training_utils.console import progress_bar, start_logging
from diffusers_eqvae.training_utils.launch import require_device, run_script
from diffusers_eqvae.training_utils.perception.arguments import PerceptionArguments
from diffusers_eqvae.training_utils.perception.build import Rows, build_tasks, choose_images, load_models

RUNS_ALONE = True  # what it measures is on --device, whatever others there are


def main(argv: list[str] | None = None) -> ResultCard:
    (arguments,) = parse(PerceptionArguments, argv=argv, description=__doc__, script=__file__)
    start_logging(logging.WARNING)
    require_device(arguments.device)
    overview_path = Path(arguments.output).with_suffix(".png")
    subject = {"task": "perception", "model": arguments.vae, "data": Path(arguments.images).name}
    ours = partial(is_card_of, **subject)
    require_replaceable(arguments.output, companions=[overview_path], inputs=inputs_of(arguments), ours=ours)
    rows = paired_files(arguments.images, *filter(None, (arguments.masks, arguments.depths)))
    annotated, tested = choose_images(arguments, rows)
    tasks = build_tasks(arguments, rows, tested)
    reader, heads, settings = load_models(arguments, tasks)

    methods: list[dict[str, Method]] = [
        {"head": heads[task.name].read} if task.name in heads else {} for task in tasks
    ]
    if annotated:
        features, targets = reader.positions(annotated)
        for own, target in zip(methods, targets, strict=True):
            own |= transfer_methods(features, target, neighbours=arguments.neighbours)
        settings |= {"window": reader.window, "neighbours": arguments.neighbours}
    overview = measure(arguments, reader, methods, tested)

    metrics, caveats = {}, {}
    for task in tasks:
        numbers, reasons = split_results(task.results())
        metrics, caveats = metrics | numbers, caveats | reasons
    protocol = {**reader.protocol, "num_annotated": len(annotated), "num_tested": len(tested)}
    provenance = {"data": Path(arguments.images).name, "hub_commit": hub_commit(arguments.vae)}
    provenance["targets"] = ", ".join(Path(folder).name for folder in (arguments.masks, arguments.depths) if folder)
    used = {"annotated": [image.name for image, *_ in annotated], "tested": [image.name for image, *_ in tested]}
    details = {"results": {task.name: task.results() for task in tasks}, "arguments": asdict(arguments), **used}
    provenance |= hardware(arguments.device)
    card = ResultCard(metrics, protocol, settings, caveats, provenance, "perception", details)
    print(card.summary(), flush=True)  # first: a disk that is full now takes no card
    card.save(arguments.output)
    captions = [caption for own in methods for caption in ("truth", *own)]
    grid(overview, ("image", *captions)).save(overview_path)
    print(f"card: {arguments.output}, the overview beside it", sep="\n")
    return card


def measure(
    arguments: PerceptionArguments, reader: AnnotatedReader, methods: list[dict[str, Method]], tested: Rows
) -> list[list[torch.Tensor]]:
    """Scores every method on the tested images; rows of the overview."""
    overview: list[list[torch.Tensor]] = []
    shown = evenly_spaced(len(tested), arguments.num_shown)
    for number, (pixels, features, truths) in enumerate(progress_bar(reader.batches(tested), unit="batch")):
        first = number * arguments.batch_size
        drawn = {place - first: [pixels[place - first]] for place in shown if 0 <= place - first < len(pixels)}
        for task, own, truth in zip(reader.tasks, methods, truths, strict=True):
            size = (truth.shape[-2], truth.shape[-1])
            answers = {name: task.answer(method(features), size) for name, method in own.items()}
            for name, answer in answers.items():
                task.score(name, answer, truth)
            for index, row in drawn.items():
                row += task.draw([answer[index] for answer in answers.values()], truth[index])
        overview += drawn.values()
    return overview


if __name__ == "__main__":
    run_script(main)
