"""What a user can mend is said in one sentence with the file, what must hold and what came; nothing else is printed.

A further damaged file is a line in `NOT_JSON`, `OTHER_SHAPES` or `PRESETS`; a further mistyped flag one in `MISTYPED`.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import SafetensorError

import eqvae_command
from diffusers_eqvae import pretrained
from diffusers_eqvae.autoencoders import load_autoencoder
from diffusers_eqvae.directories import OutputDirectory
from diffusers_eqvae.errors import explain, run_program
from diffusers_eqvae.files import npz_keys, open_npz_array, read_json, read_npz
from diffusers_eqvae.latents import LatentNormalization
from diffusers_eqvae.metrics import result_card
from diffusers_eqvae.metrics.result_card import ResultCard
from diffusers_eqvae.model_card import RunMetadata
from diffusers_eqvae.models.alignment_network import AlignmentNetwork
from diffusers_eqvae.models.discriminator import PatchDiscriminator
from diffusers_eqvae.pipelines.sampling import find_set, load_pipeline
from diffusers_eqvae.training_utils import console
from diffusers_eqvae.training_utils.arguments import DataArguments, RunArguments
from diffusers_eqvae.training_utils.autoencoder.arguments import AutoencoderLossArguments
from diffusers_eqvae.training_utils.autoencoder.build import build_discriminator
from diffusers_eqvae.training_utils.command_line import parse, read_model_config
from diffusers_eqvae.training_utils.option_parser import nearest
from diffusers_eqvae.training_utils.transformer.model_source import ModelSource

ROOT = Path(__file__).resolve().parents[2]

# ---------------------------------------------------------------------------------------------------- JSON


def saved(name):
    """A reader that finds its file as `name` in a directory."""
    return lambda read: (name, lambda path: read(path.parent))


READERS = {
    "result_card": ("card.json", ResultCard.load),
    "run_metadata": ("run_metadata.json", RunMetadata.load),
    "statistics": ("mean_std.json", LatentNormalization.from_json),
    "model_config": ("model.json", lambda path: read_model_config(path, PatchDiscriminator)),
    "transformer_config": ("model.json", lambda path: ModelSource.find(str(path))),
    "autoencoder": ("config.json", lambda path: load_autoencoder(str(path.parent))),
    "transformer": ("config.json", lambda path: ModelSource.find(str(path.parent))),
    "pipeline": ("model_index.json", lambda path: load_pipeline(str(path.parent))),
    "alignment_network": ("config.json", lambda path: AlignmentNetwork.find(path.parent)),
    "discriminator": (
        "config.json",
        lambda path: build_discriminator(AutoencoderLossArguments(disc_pretrained=str(path.parent)), smallest_px=64),
    ),
    "samples": (
        "sampling.json",
        lambda path: (path.with_name("samples.npz").touch(), find_set(path.parent, {"seed": 0})),
    ),
}
NOT_JSON = [
    pytest.param(b"", "is not a whole JSON file", id="empty"),
    pytest.param(b'{"a": 1', "is not a whole JSON file", id="cut"),
    pytest.param(b"\x80\x04\x95", "is not a whole JSON file", id="binary"),
    pytest.param(b"<html>not found</html>", "is not a whole JSON file", id="a_web_page"),
    pytest.param(b"[1, 2]", "must hold a JSON object .*; it holds a list", id="list"),
    pytest.param(b'"text"', "must hold a JSON object .*; it holds a str", id="text"),
    pytest.param(b"null", "must hold a JSON object .*; it holds a NoneType", id="null"),
]


@pytest.mark.parametrize(("content", "said"), NOT_JSON)
@pytest.mark.parametrize("reader", READERS)
def test_json_that_is_not_a_mapping_is_named_with_its_file(reader, content, said, tmp_path):
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as refused:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(refused.value)


OTHER_SHAPES = [
    pytest.param("result_card", {"metrics": {}}, "must hold 'protocol'", id="card_without_protocol"),
    pytest.param(
        "result_card",
        {"metrics": 3, "protocol": {}, "format_version": result_card.FORMAT_VERSION},
        "its metrics is a int",
        id="number",
    ),
    pytest.param("autoencoder", {"act_fn": "silu"}, "must hold '_class_name'", id="config_without_class"),
    pytest.param("autoencoder", {"_class_name": 3}, "'_class_name' of .* must be a text", id="class_is_a_number"),
    pytest.param("transformer", {"_class_name": None}, "'_class_name' of .* must be a text; it is null", id="null"),
    pytest.param("pipeline", {"vae": 3}, "must hold '_class_name'", id="index_without_class"),
    pytest.param("discriminator", {"_class_name": "AutoencoderKL"}, "name the discriminator/", id="another_class"),
    pytest.param("samples", {"settings": [1]}, "'settings' of .* must be a mapping; it is a list", id="list"),
]


@pytest.mark.parametrize(("reader", "content", "said"), OTHER_SHAPES)
def test_json_of_another_shape_is_named_with_its_key(reader, content, said, tmp_path):
    name, read = READERS[reader]
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        read(tmp_path / name)


def test_a_config_that_a_class_cannot_be_made_of_names_the_model(tmp_path, tiny_autoencoder_kl):
    tiny_autoencoder_kl.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "block_out_channels": 8}))
    with pytest.raises(ValueError, match="cannot be loaded as an autoencoder") as refused:
        load_autoencoder(str(tmp_path))
    assert str(tmp_path) in str(refused.value)


def test_a_mapping_of_the_right_shape_is_read(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "x.json", needs={"a": (int, float)}) == {"a": 1}


# ------------------------------------------------------------------------------------------- presets, archives


PRESETS = [
    pytest.param(b"seed: [1\n", "is not YAML", id="bracket"),
    pytest.param(b"seed:\t1\n\tx", "is not YAML", id="tabs"),
    pytest.param("name: M\u00fcnchen".encode("latin-1"), "is not YAML", id="latin_1"),
    pytest.param(b"seed: {a: 1}\n", "'seed' in the preset .* must be a scalar or a list of scalars", id="mapping"),
    pytest.param(b"seed: [[1, 2]]\n", "'seed' in the preset .* must be a scalar or a list of scalars", id="nested"),
    pytest.param(
        b'train_data_dir: "a\\0b"\noutput_dir: x\n',
        "train_data_dir must be UTF-8 text without a null byte",
        id="null_byte",
    ),
]


@pytest.mark.parametrize(("content", "said"), PRESETS)
def test_a_preset_that_is_none_is_named(content, said, tmp_path):
    (tmp_path / "preset.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        parse(RunArguments, DataArguments, argv=[str(tmp_path / "preset.yaml"), "--output_dir", "x"])


def damaged(kind: str) -> bytes:
    whole = io.BytesIO()
    np.savez_compressed(whole, arr_0=np.random.default_rng(0).integers(255, size=5000, dtype=np.uint8))
    content = whole.getvalue()
    if kind == "bits":
        return content[:2000] + bytes(64) + content[2064:]
    return {"cut": content[:-200], "empty": b"", "text": b"hello", "pickle": pickle.dumps([1])}[kind]


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "pickle", "bits"])
@pytest.mark.parametrize(
    "read", [npz_keys, lambda path: open_npz_array(path, "arr_0"), lambda path: read_npz(path, "arr_0")]
)
def test_an_archive_that_is_not_whole_is_named(kind, read, tmp_path):
    path = tmp_path / "samples.npz"
    path.write_bytes(damaged(kind))
    if kind == "bits" and read is npz_keys:
        assert read(path) == ["arr_0"]
        return
    with pytest.raises(ValueError, match=r"is not a whole \.npz archive") as refused:
        read(path)
    assert str(path) in str(refused.value)


# ------------------------------------------------------------------------------------------------- how a program ends


MENDABLE = [
    pytest.param(ValueError("--x must be 1"), "--x must be 1", id="value"),
    pytest.param(PermissionError(13, "Permission denied", "/data/x"), "/data/x: Permission denied.", id="permission"),
    pytest.param(OSError(28, "No space left on device"), "No space left on device.", id="disk_full"),
    pytest.param(yaml.YAMLError("bad\nindent"), "A YAML text cannot be read: bad indent", id="yaml"),
    pytest.param(SafetensorError("header"), "cut short or damaged (header)", id="safetensors"),
    pytest.param(zipfile.BadZipFile("no zip"), "cut short or damaged (no zip)", id="zip"),
    pytest.param(torch.OutOfMemoryError("80 GiB."), "Out of memory: 80 GiB. Take a smaller batch", id="memory"),
    pytest.param(
        ValueError(
            "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback\n x\nValueError: broken.png"
        ),
        "error: broken.png",
        id="in_a_worker",
    ),
]


@pytest.mark.parametrize(("error", "said"), MENDABLE)
def test_what_a_user_can_mend_is_one_line(error, said, capsys, monkeypatch):
    monkeypatch.delenv("EQVAE_TRACEBACK", raising=False)

    def fail():
        raise error

    assert run_program("train_x.py", fail) == 2
    first, second, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("train_x.py: error: ") and said in first
    assert second == "(EQVAE_TRACEBACK=1 shows the place in the code.)" and not rest
    monkeypatch.setenv("EQVAE_TRACEBACK", "1")
    with pytest.raises(type(error)):
        run_program("train_x.py", fail)


def test_what_nobody_foresaw_keeps_its_traceback():
    assert explain(RuntimeError("shapes")) is None
    assert explain(ImportError("dopri5 needs torchode: pip install it.")) == "dopri5 needs torchode: pip install it."
    assert explain(ImportError("cannot import name x", name="torch")) is None
    with pytest.raises(KeyError):
        run_program("x", lambda: {}["key"])


def test_an_interruption_is_one_line_and_status_130(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert run_program("train_x.py", interrupted) == 130
    assert capsys.readouterr().err == "\ntrain_x.py: stopped by Ctrl-C.\n"


WORKING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a job in the background
import sys, time
from diffusers_eqvae.training_utils.launch import run_script
from torch.utils.data import DataLoader
from diffusers_eqvae.data.order import leave_interrupts

class Slow:
    def __len__(self): return 1000
    def __getitem__(self, index): time.sleep(.05); return index

def main():
    for number, _ in enumerate(DataLoader(Slow(), num_workers=2, worker_init_fn=leave_interrupts)):
        if number == 0: print("working", flush=True)

run_script(main)
"""


def test_ctrl_c_reaches_workers_too_and_nothing_is_printed_but_a_line():
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-c", WORKING], **options) as process:
        assert process.stdout.readline() == "working\n"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.strip() == "-c: stopped by Ctrl-C."
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


STAGE = """
import sys
from pathlib import Path
from diffusers_eqvae.demo import stage, stages
import signal
signal.signal(signal.SIGTERM, stage.end_with_stages)
stage.PROGRAM = [sys.executable]
stage.Stage("x", ["-c", "import time; print('stage', flush=True); time.sleep(60)"], Path(sys.argv[1]) / "x").run()
"""


def test_a_demo_that_is_ended_ends_its_stage(tmp_path):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-c", STAGE, str(tmp_path)], **options) as process:
        while process.stdout.readline() != "stage\n":
            assert process.poll() is None
        process.terminate()  # the demo alone, as a scheduler does
        process.wait(timeout=20)
        for _ in range(100):
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.1)
        else:
            pytest.fail("the stage is still running")
    assert process.returncode == -signal.SIGTERM


# ------------------------------------------------------------------------------------------- flags and names


MISTYPED = [
    pytest.param("lr", "learning_rate", id="initials"),
    pytest.param("batch_size", "train_batch_size", id="some_words"),
    pytest.param("epochs", "num_train_epochs", id="one_word"),
    pytest.param("output", "output_dir", id="first_word"),
    pytest.param("num_workers", "dataloader_num_workers", id="last_words"),
    pytest.param("no_ema", "use_ema", id="switched_off"),
    pytest.param("lerning_rate", "learning_rate", id="letter"),
    pytest.param("xyzzy", None, id="nothing_like_it"),
]


@pytest.mark.parametrize("script", ["train-autoencoder", "train-transformer"])
def test_initials_that_several_flags_have_are_those_of_the_learning_rate(script, capsys):
    with pytest.raises(SystemExit):
        eqvae_command.main([script, "--output_dir", "x", "--lr", "1"])
    assert capsys.readouterr().err.strip().endswith("the nearest flag is --learning_rate")


@pytest.mark.parametrize(("given", "meant"), MISTYPED)
def test_a_mistyped_flag_is_answered_with_what_was_meant(given, meant, capsys):
    with pytest.raises(SystemExit):
        parse(RunArguments, DataArguments, argv=["--output_dir", "x", f"--{given}", "1"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith(f"the nearest flag is --{meant}" if meant else f"unknown argument --{given}; see --help")
    assert nearest(given, ["learning_rate", "lr_scheduler"]) == "learning_rate" or given not in ("lr", "lerning_rate")


def test_help_is_short_and_shows_every_option_once_and_what_is_required_first(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "119")
    for command in ("train-autoencoder", "train-transformer", "sample"):
        with pytest.raises(SystemExit):
            eqvae_command.main([command, "--help"])
        text = capsys.readouterr().out
        lines = text.splitlines()
        flags = [line.split()[0] for line in lines if line.startswith("  --")]
        assert len(lines) <= 1.7 * len(flags) + 25, f"{command} --help has {len(lines)} lines for {len(flags)} options"
        assert len(flags) == len(set(flags)) and not [flag for flag in flags if "-" in flag[2:]]
        assert lines.index("required:") < lines.index(next(line for line in lines if line.startswith("  --")))
        assert "--output_dir" in lines[0]


def test_help_fits_a_narrow_terminal_but_for_commands_to_copy(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    commands = ("eqvae ", "python ", "accelerate ", "--")
    argparse_commands = ("compare", "convert", "export", "push", "leaderboard", "diagnose", "prefetch")
    for command in ("evaluate-perception", "sample", *argparse_commands):
        with pytest.raises(SystemExit):
            eqvae_command.main([command, "--help"])
        lines = capsys.readouterr().out.splitlines()
        assert not [line for line in lines if len(line) > 80 and not line.strip().startswith(commands)]


@pytest.mark.parametrize(
    "name", ["a b", "a/b/c", "-x", "x..y", "owner/"], ids=["space", "slashes", "dash", "dots", "half"]
)
def test_a_name_that_no_repository_can_have_is_found_before_training(name):
    with pytest.raises(ValueError, match="--hub_model_id must be a repository's name, owner/name"):
        RunArguments(output_dir="runs/x", hub_model_id=name)
    RunArguments(output_dir="runs/x", hub_model_id="owner/name", push_to_hub=True)


@pytest.mark.parametrize(
    "given", [{"hub_model_id": "me/run"}, {"hub_private": True}, {"hub_revision": "a"}, {"hub_images": "none"}]
)
def test_options_of_a_push_that_will_not_be_are_named(given, caplog):
    RunArguments(output_dir="runs/x", **given)
    assert f"Without effect, since nothing is pushed without --push_to_hub: --{next(iter(given))}." in caplog.text
    caplog.clear()
    RunArguments(output_dir="runs/x", push_to_hub=True, **given)
    assert not caplog.text


def test_a_name_that_is_not_utf8_is_refused_at_the_start(tmp_path):
    name = os.fsdecode(b"run-\xff\xfe")
    with pytest.raises(ValueError, match="--output_dir must be UTF-8 text without a null byte"):
        parse(RunArguments, argv=["--output_dir", name])
    with pytest.raises(ValueError, match="cannot be written: 'utf-8' codec can't encode"):
        OutputDirectory(tmp_path / name, kind="run")


# ------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def no_network(monkeypatch):
    """A Hub that refuses connections, and no offline mode that would say so beforehand."""
    monkeypatch.setattr(pretrained.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pretrained.constants, "ENDPOINT", "http://127.0.0.1:9")
    pretrained.hub_silence.cache_clear()
    yield
    pretrained.hub_silence.cache_clear()


LOADERS = {
    "autoencoder": load_autoencoder,
    "pipeline": load_pipeline,
    "alignment_network": lambda name: AlignmentNetwork.find(name) or load_autoencoder(name),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_without_a_network_the_reason_comes_at_once(loader, no_network):
    start = time.monotonic()
    with pytest.raises(OSError, match="no such directory here, and the Hub cannot be asked") as refused:
        LOADERS[loader]("someone/a-model")
    assert "127.0.0.1:9" in str(refused.value)
    assert time.monotonic() - start < 5  # a minute of retries otherwise


@pytest.mark.parametrize(
    "name", ["runs/aligned/vae2", "./nothing", "/nowhere/vae"], ids=["three_parts", "dot", "absolute"]
)
def test_what_can_only_be_a_directory_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(pretrained, "hub_silence", lambda: pytest.fail("the Hub was asked"))
    monkeypatch.setattr(pretrained, "hf_hub_download", lambda *words, **options: pytest.fail("the Hub was asked"))
    with pytest.raises(OSError, match=f"There is no directory {name}"):
        load_autoencoder(name)


@pytest.mark.parametrize("name", ["{}/eq-vea", "eq-vea"], ids=["a path", "what could be a repository"])
def test_a_mistyped_directory_is_answered_with_its_neighbour(name, tmp_path, monkeypatch):
    (tmp_path / "eq-vae").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"no (such )?directory .*\(did you mean .*eq-vae\?\)"):
        load_autoencoder(name.format(tmp_path))


# ------------------------------------------------------------------------------------------- the log


def test_requests_of_other_libraries_are_not_logged(caplog):
    console.start_logging()
    logging.getLogger("httpx").info("HTTP Request: HEAD https://huggingface.co")
    assert not caplog.messages


def test_a_bar_in_a_file_writes_few_lines(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    with console.progress_bar(total=6000, file=written) as bar:
        for _ in range(6000):
            bar.update(1)
    assert 2 <= written.getvalue().count("\r") <= 30
