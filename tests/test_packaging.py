"""Installed from a wheel, from a source archive or editable: the package finds its scripts, presets and templates."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

PARTS = ("src", "training", "pipelines", "model_cards")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
USES = """
import sys, site
site.addsitedir(sys.argv[1])
sys.path.insert(0, sys.path.pop())
from pathlib import Path
import eqvae_command
assert eqvae_command.main(["--version"]) == 0
import diffusers_eqvae, diffusers_eqvae.training.train_transformer, diffusers_eqvae.sampling.sample
home = Path(sys.argv[2]).resolve()
modules = (diffusers_eqvae, eqvae_command, diffusers_eqvae.training.train_transformer, diffusers_eqvae.sampling.sample)
for module in modules:
    assert home in Path(module.__file__).resolve().parents, module.__file__
assert (Path(diffusers_eqvae.__file__).parent / "py.typed").is_file()
script = diffusers_eqvae.training.train_transformer
assert (Path(script.__file__).parent / "configs" / "sit_tiny.json").is_file()
assert {"train-transformer", "sample", "push"} <= set(eqvae_command.list_commands())
assert eqvae_command.main(["train-transformer", "sit_tiny", "--latents_dir", "nowhere", "--output_dir", "x"]) == 2
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, request) -> Path:
    """A copy of what is packaged, so that building leaves nothing behind in the repository."""
    root, copy = Path(request.config.rootpath), tmp_path_factory.mktemp("checkout")
    for part in PARTS:
        shutil.copytree(root / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in FILES:
        shutil.copy(root / name, copy / name)
    return copy


def build(source: Path, kind: str, out: Path) -> Path:
    """The archive that a build front end would get from setup.py."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    out.mkdir(exist_ok=True)
    finished = subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    (archive,) = out.iterdir()
    return archive


def unpacked(archive: Path, target: Path) -> Path:
    if archive.suffix == ".gz":
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
        return next(target.iterdir())
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(target)
    return target


def use(site_packages: Path, home: Path, tmp_path: Path) -> None:
    """In a process that starts elsewhere and sees the package through `site_packages` alone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", USES, str(site_packages), str(home)]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "eqvae train-transformer: error:" in finished.stderr and "nowhere" in finished.stderr


@pytest.mark.slow
def test_a_wheel_and_a_wheel_of_the_source_archive_hold_the_same_and_work(checkout, tmp_path):
    wheel = build(checkout, "wheel", tmp_path / "wheel")
    source = unpacked(build(checkout, "sdist", tmp_path / "sdist"), tmp_path / "source")
    again = build(source, "wheel", tmp_path / "again")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names == set(zipfile.ZipFile(again).namelist())
    for folder, package in (("training", "training"), ("pipelines", "sampling"), ("model_cards", "model_cards")):
        for path in (checkout / folder).rglob("*.*"):
            assert f"diffusers_eqvae/{package}/{path.relative_to(checkout / folder).as_posix()}" in names
    assert (
        "eqvae = eqvae_command:main"
        in zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    )
    site_packages = unpacked(again, tmp_path / "site")
    use(site_packages, site_packages, tmp_path)


USER_FILE = """
import torch

import diffusers_eqvae
from diffusers_eqvae import EquivarianceRegularizer, LatentNormalization, TauDistribution
from diffusers_eqvae.losses import alignment_loss

tau = TauDistribution().draw((32, 32), torch.Generator())
reveal_type(tau)
reveal_type(alignment_loss)
reveal_type(LatentNormalization.from_vae)
reveal_type(diffusers_eqvae.psnr)


class Mine(EquivarianceRegularizer):
    pass
"""
REVEALED = ["diffusers_eqvae.equivariance.Tau", "def (prediction: torch", "LatentNormalization", "def ("]


@pytest.mark.slow
def test_in_an_empty_environment_the_wheel_brings_the_command_its_extras_and_its_types(checkout, tmp_path):
    """Empty but for the dependencies, which are those of this environment."""
    wheel = build(checkout, "wheel", tmp_path / "wheel")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, cwd=tmp_path)
    (site_packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    shared = [Path(module.__file__).resolve().parents[1] for module in (pytest, torch)]
    (site_packages / "shared.pth").write_text("\n".join(map(str, dict.fromkeys(shared))))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words):
        finished = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return finished.returncode, finished.stdout + finished.stderr

    status, said = run(tmp_path / "env" / "bin" / "eqvae")
    assert status == 0 and "  train-autoencoder     Fine-tunes any diffusers autoencoder" in said
    status, said = run(tmp_path / "env" / "bin" / "eqvae", "train-autoencoder", "--help")
    assert status == 0 and "Presets that are installed: autoencoder_emoji, " in said
    status, said = run(python, "-c", EXTRAS)
    assert status == 0, said
    (tmp_path / "user.py").write_text(USER_FILE)
    status, said = run(sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "user.py")
    assert status == 0, said
    notes = [line for line in said.splitlines() if "Revealed type" in line]
    assert len(notes) == len(REVEALED) and all(map(str.__contains__, notes, REVEALED)), said


EXTRAS = """
import re
from importlib import metadata

lines = metadata.requires("diffusers_eqvae")
extras = set(metadata.metadata("diffusers_eqvae").get_all("Provides-Extra"))
assert extras == {"train", "eval", "ode", "demo", "app", "docs", "dev"}, extras
for line in lines:
    if 'extra == "docs"' in line or 'extra == "app"' in line:  # not part of dev
        continue
    name, bound = re.match(r"([\\w.-]+)(?:>=([\\d.]+))?", line).groups()
    have = metadata.version(name)
    parts = [[int(part) for part in re.findall(r"\\d+", text)] for text in (have, bound or "0")]
    assert parts[0] >= parts[1], (line, have)
"""


def test_every_package_of_the_extras_is_pinned_within_its_bound_for_the_figures():
    """By versions alone, which name no place that a package comes from."""
    root = Path(__file__).parents[1]
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines)
    pinned, setup = dict(line.split("==") for line in lines), (root / "setup.py").read_text()
    names = ("CORE", "TRAIN", "EVAL", "ODE", "DEMO")
    groups = [re.search(rf"^{name} = (\[.*?\])", setup, re.M | re.S)[1] for name in names]
    listed = [each for group in groups for each in ast.literal_eval(group)]
    needed = dict(re.fullmatch(r"([\w-]+)(?:>=([\d.]+))?", each).groups() for each in listed)
    assert pinned.keys() == needed.keys()
    for name, bound in needed.items():
        have, least = ([int(part) for part in text.split(".")] for text in (pinned[name], bound or "0"))
        assert have >= least, name


def test_an_index_of_packages_shows_a_readme_without_a_dead_link(monkeypatch):
    """It holds none of the repository's files."""
    import setuptools

    root, given = Path(__file__).parents[1], {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    monkeypatch.chdir(root)
    packaging = runpy.run_path(str(root / "setup.py"))
    targets = re.findall(r"\]\(([^)\s]+)", given["long_description"])
    assert targets and all(target.startswith("https://") for target in targets), targets
    text = "see [Fine-tune](docs/a.md#run), [below](#numbers) and [x](https://x.org)\n![an image](docs/b.jpg)"
    assert packaging["long_description"](text, "") == "see Fine-tune, below and [x](https://x.org)\n"
    assert packaging["long_description"](text, "https://h.org/me/it") == (
        "see [Fine-tune](https://h.org/me/it/blob/main/docs/a.md#run), [below](https://h.org/me/it#numbers) and "
        "[x](https://x.org)\n![an image](https://h.org/me/it/raw/main/docs/b.jpg)"
    )


@pytest.mark.slow
def test_an_editable_install_uses_the_checkout(checkout, tmp_path):
    site_packages = unpacked(build(checkout, "editable", tmp_path / "wheel"), tmp_path / "site")
    assert not (site_packages / "diffusers_eqvae").exists()
    use(site_packages, checkout, tmp_path)
