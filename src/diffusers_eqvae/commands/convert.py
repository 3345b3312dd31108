"""Turns published weights into a diffusers model, or a model back into published weights.

eqvae convert SiT-XL-2-256x256.pt sit-xl --from sit
eqvae convert sit-xl sit-xl.safetensors --to sit
eqvae convert sdxl_vae.safetensors sdxl-vae --config scaling_factor=0.13025
eqvae convert runs/eq-vae eq-vae.safetensors --to ldm
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..autoencoders import stock_class
from ..conversion import CONVERTERS, Converter, from_published, read_published, save_published, to_published
from ..conversion._files import SUFFIXES
from ..conversion.base import UnclearLayout
from ..directories import require_creatable
from ..files import read_json, share
from ..pretrained import load_pretrained
from ..stated_normalization import adopt_saved_normalization
from ..training_utils.console import start_logging
from . import command_parser


def main(argv: Sequence[str]) -> int:
    layouts = ", ".join(CONVERTERS.names())
    parser = command_parser("convert", __doc__, epilog=f"Layouts: {layouts}.")
    parser.add_argument("source", help="file of published weights; or, with --to, directory of a model or pipeline")
    parser.add_argument("destination", help="new directory of the model; or, with --to, new file (.safetensors, .pt)")
    parser.add_argument("--from", dest="layout", metavar="LAYOUT", help="of the file (default: the one that matches)")
    parser.add_argument("--to", metavar="LAYOUT", help="write the model's weights in this layout")
    parser.add_argument("--weights", metavar="ENTRY", help="entry of a training checkpoint (default: ema, then model)")
    parser.add_argument(
        "--config",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="options that shapes do not tell: num_classes=1000",
    )
    arguments = parser.parse_args(argv)
    start_logging(format="%(levelname)s: %(message)s")

    destination = Path(arguments.destination)
    require_creatable(destination)
    if destination.is_file() or (destination.is_dir() and any(destination.iterdir())):
        raise ValueError(f"{destination} exists already; choose another destination, or remove it.")
    if arguments.to is None:
        _read(arguments)
        return 0
    if any((arguments.layout, arguments.weights, arguments.config)):
        parser.error("--from, --weights and --config describe a published file; --to takes a model")
    _write(arguments)
    return 0


def _read(arguments: argparse.Namespace) -> None:
    """A model's directory from published weights."""
    if Path(arguments.source).is_dir():
        layouts = ", ".join(CONVERTERS.names())
        raise ValueError(f"{arguments.source} is a directory; say which layout to write it in: --to {layouts}.")
    tensors, options = read_published(arguments.source, weights=arguments.weights), _options(arguments.config)
    try:
        model = from_published(tensors, layout=arguments.layout, **options)
    except UnclearLayout as error:
        raise ValueError(f"{error} (--from LAYOUT)") from error
    model.save_pretrained(arguments.destination)
    share(Path(arguments.destination))
    print(f"{type(model).__name__} with {model.num_parameters() / 1e6:.1f} M parameters in {arguments.destination}")


def _write(arguments: argparse.Namespace) -> None:
    """Weights in a published layout from a model's directory."""
    destination = Path(arguments.destination)
    if destination.suffix not in SUFFIXES:
        raise ValueError(f"With --to the destination is a file ({', '.join(SUFFIXES)}); got {destination}.")
    model = _load_model(Path(arguments.source), arguments.to)
    tensors = to_published(model, arguments.to)
    save_published(tensors, destination)
    print(f"{len(tensors)} tensors in {destination}")
    _print_what_it_does_not_hold(CONVERTERS[arguments.to](), model.config)


def _print_what_it_does_not_hold(converter: Converter, config: Mapping[str, Any]) -> None:
    if options := converter.reader_options(config):
        words = " ".join(f"--{name} {value}".strip() for name, value in options.items())
        print(f"- To paste, where a program takes what the file does not hold (forks of sd-scripts): {words}")
    for note in converter.notes(config):
        print(f"- {note}")


def _options(words: Sequence[str]) -> dict[str, Any]:
    """Constructor arguments; values are read as YAML."""
    pairs = [word.partition("=") for word in words]
    for key, equals, _ in pairs:
        if not equals:
            raise ValueError(f"--config takes KEY=VALUE words; got {key!r}.")
    try:
        return {key: yaml.safe_load(value) for key, _, value in pairs}
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"A VALUE of --config must be YAML: {problem} in {' '.join(words)}; quote text.") from error


def _load_model(directory: Path, layout: str) -> Any:
    """The model of the layout's class: in `directory`, or the component of that class of a pipeline there."""
    target = CONVERTERS[layout].target
    kinds = (target.__name__, stock_class(target))
    index = directory / "model_index.json"
    if index.is_file():
        entries = read_json(index)
        components = {entry[1]: name for name, entry in entries.items() if isinstance(entry, list)}
        directory /= next((components[kind] for kind in kinds if kind in components), "")
    config = directory / "config.json"
    stated = read_json(config) if config.is_file() else {}
    if stated.get("_class_name") not in kinds:
        raise ValueError(f"{directory} does not hold a {target.__name__}, which the layout {layout} is for.")
    model = load_pretrained(target.from_pretrained, directory, f"a {target.__name__}")
    if hasattr(model, "decode"):
        file = directory / "mean_std.json"
        adopt_saved_normalization(model, stated, file if file.is_file() else None)
    return model
