"""The `eqvae` command: what it says, what it passes on, how it ends."""

import builtins
import runpy
import sys
import types

import pytest

from diffusers_eqvae import __version__, cli


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for command, function in cli.COMMANDS.items():
        assert f"{command:8}{function.__doc__}" in text


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"eqvae {__version__}\n"


def test_the_package_runs_as_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["__main__.py", "compare", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("diffusers_eqvae", run_name="__main__")
    assert stop.value.code == 0
    assert "usage: eqvae compare" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["fly"], ["push"], ["push", "run"]])
def test_incomplete_commands_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: eqvae" in capsys.readouterr().err


def test_push_without_a_network_fails_readably(tmp_path, tiny_autoencoder_kl, caplog):
    tiny_autoencoder_kl.save_pretrained(tmp_path / "my run")
    assert cli.main(["push", str(tmp_path / "my run"), "--hub_model_id", "me/x", "--private"]) == 1
    assert "offline mode is enabled" in caplog.text
    assert f"eqvae push '{tmp_path}/my run' --hub_model_id me/x --private" in caplog.text


def test_the_dry_run_prints_the_card(tmp_path, tiny_autoencoder_kl, capsys):
    tiny_autoencoder_kl.save_pretrained(tmp_path)
    command = ["push", str(tmp_path), "--hub_model_id", "me/x", "--dry_run", "--license", "mit"]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert "diffusion_pytorch_model.safetensors" in text
    assert "license: mit" in text
    assert 'from_pretrained("me/x")' in text
    for run, name, reason in (
        (tmp_path / "nothing", "me/x", f"there is no directory {tmp_path / 'nothing'}"),
        (tmp_path, "a b/c/d", "Repo id must be in the form"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["push", str(run), "--hub_model_id", name, "--dry_run"])
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
        assert cli.main(["push", str(directory), "--hub_model_id", name]) == 1
        (line,) = caplog.messages
        assert line.startswith(f"Could not push {directory} to {name}: ") and line.endswith(reason)
        assert "complete" not in line and "eqvae push" not in line


def test_demo_gets_its_arguments_untouched(monkeypatch):
    seen = []
    module = types.SimpleNamespace(main=lambda argv: seen.append(argv))
    monkeypatch.setitem(sys.modules, "diffusers_eqvae.demo", module)
    assert cli.main(["demo", "--help", "--steps", "3", "--", "x"]) == 0
    assert seen == [["--help", "--steps", "3", "--", "x"]]
    module.main = lambda argv: 3
    assert cli.main(["demo"]) == 3


@pytest.mark.parametrize(("missing", "status"), [("skimage", 1), ("diffusers_eqvae.demo.steps", None)])
def test_demo_names_the_extra_that_is_missing(missing, status, monkeypatch, capsys):
    real_import = builtins.__import__

    def fail(name, *args, **kwargs):
        if name == "diffusers_eqvae.demo":
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    if status is None:
        with pytest.raises(ModuleNotFoundError):
            cli.main(["demo"])
    else:
        assert cli.main(["demo"]) == status
        assert "pip install 'diffusers_eqvae[demo]'" in capsys.readouterr().err
