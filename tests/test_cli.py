"""The `eqvae` command: what it says, what it passes on, how it ends."""

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
        (["--help"], 0, [*eqvae_command.COMMANDS, "--extension FILE_OR_MODULE"]),
        (["--version"], 0, [f"eqvae {diffusers_eqvae.__version__}"]),
        (["trian-transformer"], 2, ["unknown command 'trian-transformer'; the nearest is train-transformer"]),
        ([], 2, ["usage: eqvae COMMAND", "name a command: demo, "]),
    ],
    ids=["help", "version", "mistyped", "nothing"],
)
def test_what_needs_no_command_is_answered_without_the_package(words, status, said):
    finished = subprocess.run([sys.executable, "-c", LIGHT, *words], capture_output=True, text=True, check=False)
    assert finished.returncode == status, finished.stderr
    for text in said:
        assert text in finished.stdout + finished.stderr


@pytest.mark.parametrize("name", eqvae_command.COMMANDS)
def test_every_command_is_there_and_calls_itself_by_its_name(name, capsys):
    with pytest.raises(SystemExit) as stop:
        eqvae_command.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: eqvae {name} " in capsys.readouterr().out


def test_a_script_is_the_command_of_its_name(repository):
    scripts = {
        f"{room}.{path.stem}": path.stem.replace("_", "-")
        for room, folder in (("training", "training"), ("sampling", "pipelines"))
        for path in (repository / folder).glob("*.py")
    }
    commands = {command.module: name for name, command in eqvae_command.COMMANDS.items()}
    assert {module: name for module, name in commands.items() if module in scripts} == scripts


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


def test_a_preset_is_found_beside_its_script_unless_there_is_one_here(tmp_path, monkeypatch, repository):
    script = str(repository / "training" / "train_transformer.py")
    monkeypatch.chdir(tmp_path)
    own = str(repository / "training" / "configs" / "sit_b_2.yaml")
    assert eqvae_command.with_own_preset(script, ["sit_b_2.yaml", "--seed", "1"]) == [own, "--seed", "1"]
    assert eqvae_command.with_own_preset(script, ["nowhere.yaml"]) == ["nowhere.yaml"]
    (tmp_path / "sit_b_2.yaml").write_text("seed: 1\n")
    assert eqvae_command.with_own_preset(script, ["sit_b_2.yaml"]) == ["sit_b_2.yaml"]


def test_extensions_are_loaded_before_the_command_and_taken_out(tmp_path, monkeypatch):
    for name in ("first_added", "second_added"):
        (tmp_path / f"{name}.py").write_text(
            "import sys\nsys.loaded_here = [*getattr(sys, 'loaded_here', []), __name__]\n"
        )
    seen = []
    module = types.SimpleNamespace(main=lambda argv: seen.append((argv, list(sys.loaded_here))), __file__="x")
    monkeypatch.setitem(sys.modules, "diffusers_eqvae.demo", module)
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
    for directory, name, reason in (
        (tmp_path / "nope", "x", f"there is no directory {tmp_path / 'nope'}."),
        (store, "me/x", f"{store} does not hold a saved model (model_index.json, or config.json and *.safetensors)."),
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
    module = types.SimpleNamespace(main=lambda argv: seen.append(argv), __file__="x")
    monkeypatch.setitem(sys.modules, "diffusers_eqvae.demo", module)
    assert eqvae_command.main(["demo", "--help", "--steps", "3"]) == 0
    assert seen == [["--help", "--steps", "3"]]
    module.main = lambda argv: 3
    assert eqvae_command.main(["demo"]) == 3


@pytest.mark.parametrize(("missing", "status"), [("skimage", 1), ("diffusers_eqvae.demo.steps", None)])
def test_a_command_names_the_extra_that_is_missing(missing, status, monkeypatch, capsys):
    def fail(argv):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setitem(sys.modules, "diffusers_eqvae.demo", types.SimpleNamespace(main=fail, __file__="x"))
    if status is None:
        with pytest.raises(ModuleNotFoundError):
            eqvae_command.main(["demo"])
    else:
        assert eqvae_command.main(["demo"]) == status
        assert "eqvae demo needs skimage: pip install 'diffusers_eqvae[demo]'" in capsys.readouterr().err
