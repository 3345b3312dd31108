"""A resumed run is the run that was interrupted, or it says what is not; and nothing finite is lost to NaN."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import nn

from diffusers_eqvae.directories import RECORD
from diffusers_eqvae.training_utils.checkpoints import complete_checkpoints

from ..training_utils.conftest import Numbers

EVERYTHING = {"checkpointing_steps": 3, "checkpoints_total_limit": None}


class Data(Numbers):
    """Examples that say what they are."""

    def __init__(self, identity=None, **options):
        super().__init__(**options)
        self.identity = identity or {"files": "a", "labels": "b"}


def train(run, model, dataset=None, *, frozen=None, spoil=None):
    """`spoil(run)` may change anything before a step's gradients are taken."""
    dataset = dataset or Data()
    if frozen is not None:
        run.add_frozen(frozen)
    wrapped = run.add("model", model, ema=True)
    for batch in run.steps(run.loader(dataset)):
        if spoil is not None:
            spoil(run)
        loss = (wrapped(batch["x"]) - batch["x"]).square().mean()
        run.backward(loss)
        run.log({"loss": loss})
    return run


def content(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def autoencoder(seed=0, **options):
    torch.manual_seed(seed)
    small = {"encoder_block_out_channels": [4, 4], "decoder_block_out_channels": [4, 4]}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(**small, **blocks, **options)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"train_batch_size": 8}, "global_batch_size"),
        ({"use_ema": False}, "use_ema"),
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"lr_scheduler": "cosine", "max_train_steps": 9}, "lr_scheduler"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_run_is_refused_without_a_word_written_and_goes_on_where_it_is_meant(
    make_run, make_model, changes, name, caplog
):
    first = train(make_run(**EVERYTHING), make_model())
    before = content(first.output_dir)
    resume = {**EVERYTHING, "max_train_steps": 9, **changes, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=rf"would go on as another one.*--allow_changes \w*.*{name}"):
        make_run(**resume)
    assert content(first.output_dir) == before
    every = [name, "max_train_steps"]
    run = train(make_run(**resume, allow_changes=every), make_model())
    (change,) = [each for each in run.changes if each["name"] == name]
    assert change["step"] == 6 and change["before"] != change["after"]
    assert "changed from step 6 on, as allowed" in caplog.text
    # It is remembered, and not asked for again.
    again = make_run(**{**resume, "max_train_steps": 12}, allow_changes=["max_train_steps"])
    assert change in again.changes


@pytest.mark.parametrize(
    "changes",
    [
        {"max_train_steps": 9},
        {"train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"logging_steps": 3, "checkpointing_steps": 1, "max_nonfinite_steps": 3, "dataloader_num_workers": 0},
    ],
    ids=["longer", "the same batch in parts", "what changes nothing"],
)
def test_what_changes_no_step_needs_no_word(make_run, make_model, changes, caplog):
    train(make_run(**EVERYTHING), make_model())
    caplog.clear()
    make_run(**{**EVERYTHING, **changes, "resume_from_checkpoint": "latest"})
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (lambda: autoencoder(seed=1), "its frozen differs"),
        (lambda: autoencoder(scaling_factor=2.0), "scaling_factor"),
    ],
    ids=["other weights", "another normalisation"],
)
def test_another_autoencoder_under_the_same_name_is_refused(make_run, make_model, other, what):
    train(make_run(**EVERYTHING), make_model(), frozen=autoencoder())
    with pytest.raises(ValueError, match=rf"AutoencoderTiny is not the one.*{what}.*--allow_changes AutoencoderTiny"):
        train(make_run(resume_from_checkpoint="latest"), make_model(), frozen=other())
    train(make_run(resume_from_checkpoint="latest"), make_model(), frozen=autoencoder())


@pytest.mark.parametrize(
    ("dataset", "what"),
    [(Data({"files": "c", "labels": "b"}), "files"), (Data({"files": "a", "labels": "c"}), "labels")],
    ids=["files", "labels"],
)
def test_other_images_are_warned_of(make_run, make_model, dataset, what, caplog):
    train(make_run(**EVERYTHING), make_model())
    train(make_run(max_train_steps=9, resume_from_checkpoint="latest"), make_model(), dataset)
    assert "data are not those of" in caplog.text and f"({what} differs)" in caplog.text


def test_another_starting_point_is_warned_of_and_not_used(make_run, make_model, caplog):
    whole = train(make_run(**EVERYTHING), make_model()).module("model").state_dict()
    other = make_model()
    nn.init.zeros_(other[0].weight)
    resumed = train(make_run(resume_from_checkpoint="step-00000003"), other).module("model").state_dict()
    assert "model began with other weights" in caplog.text
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_model_of_another_size_is_one_sentence(make_run, make_model):
    train(make_run(**EVERYTHING), make_model())
    larger = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 8))
    with pytest.raises(ValueError, match=r"another size than this run's \(0.weight \(16, 8\) -> \(32, 8\)") as said:
        train(make_run(resume_from_checkpoint="latest"), larger)
    assert "\n" not in str(said.value)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda checkpoint: flip(checkpoint / "model.pt"),
        lambda checkpoint: (checkpoint / "model.pt").write_bytes((checkpoint.parent / "x.pt").read_bytes()),
        lambda checkpoint: rewrite(checkpoint / "complete.json", step=5),
        lambda checkpoint: (checkpoint / "complete.json").write_text("[]"),
        lambda checkpoint: (checkpoint / "complete.json").write_text("{"),
    ],
    ids=["a bit", "another whole file", "another step", "another shape", "cut"],
)
def test_what_is_damaged_inside_is_not_used(make_run, make_model, damage):
    first, second = complete_checkpoints(train(make_run(**EVERYTHING), make_model()).output_dir)
    (first.parent / "x.pt").write_bytes((first / "model.pt").read_bytes())
    damage(second)
    with pytest.raises(ValueError, match=rf"(is damaged .*{first}|format_version None)"):
        train(make_run(resume_from_checkpoint="latest"), make_model())


def test_the_newest_is_the_one_that_was_written_last_on_its_own_line(make_run, make_model):
    """And what has just been written never goes, nor does what it descends from before what it left."""
    whole = train(make_run(**EVERYTHING, max_train_steps=12), make_model())
    names = lambda: [path.name[-2:] for path in complete_checkpoints(whole.output_dir)]  # noqa: E731
    assert names() == ["03", "06", "09", "12"]
    limit = {"checkpointing_steps": 3, "checkpoints_total_limit": 2}
    train(make_run(**limit, max_train_steps=6, resume_from_checkpoint="step-00000003"), make_model())
    assert names() == ["03", "06"]
    train(make_run(**limit, max_train_steps=9, resume_from_checkpoint="latest"), make_model())
    assert names() == ["06", "09"]


def test_a_branch_that_was_left_does_not_come_back(make_run, make_model):
    train(make_run(**EVERYTHING, max_train_steps=12), make_model())
    branch = make_run(**EVERYTHING, max_train_steps=5, resume_from_checkpoint="step-00000003")
    train(branch, make_model())
    assert make_run(**EVERYTHING, resume_from_checkpoint="latest").step == 5


@pytest.mark.parametrize("at", ["module", "average"])
def test_weights_that_are_not_finite_are_never_saved(make_run, make_model, at):
    """Their gradients were, and so nothing was skipped."""

    def spoil(run):
        if run.step == 4:
            entry = run.modules["model"]
            broken = entry.module if at == "module" else entry.ema.module
            with torch.no_grad():
                next(broken.parameters()).view(-1)[0] = float("inf")

    run = make_run(checkpointing_steps=3, checkpoints_total_limit=1, max_nonfinite_steps=50)
    with pytest.raises(ValueError, match=r"weights of model.*NaN or infinite after step 6.*not saved.*latest"):
        train(run, make_model(), spoil=spoil)
    assert [path.name for path in complete_checkpoints(run.output_dir)] == ["step-00000003"]
    resumed = train(make_run(resume_from_checkpoint="latest", max_train_steps=9), make_model())
    assert resumed.modules["model"].is_finite()


def test_nor_are_they_published(make_run, make_model):
    run = make_run(max_train_steps=2, checkpointing_steps=0)
    train(run, make_model())
    with torch.no_grad():
        run.module("model")[0].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="weights of model"):
        run.finish(lambda directory: (directory / "config.json").write_text("{}") and None)
    assert not (run.output_dir / "config.json").exists()


def test_skipped_steps_are_counted_over_restarts_and_said(make_run, make_model, caplog):
    caplog.set_level(logging.INFO)
    broken = frozenset({9})  # once in an epoch of six steps
    options = {"logging_steps": 3, "checkpointing_steps": 6, "train_batch_size": 8}
    first = train(make_run(**options, max_train_steps=6), make_model(), Data(length=48, broken=broken))
    assert first.skipped_steps == 1 and "of the steps up to" in caplog.text
    lines = [json.loads(line) for line in (first.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] is not None and line["gradient_norm/model"] is not None for line in lines)
    options |= {"max_train_steps": 12, "resume_from_checkpoint": "latest"}
    run = train(make_run(**options), make_model(), Data(length=48, broken=broken))
    run.finish(lambda directory: (directory / "done").write_text("") and None)
    assert run.skipped_steps == 2
    assert "Finished after 12 steps, 2 of them skipped (NaN or infinite)" in caplog.text


def test_a_run_that_restarts_often_still_gives_up(make_run, make_model):
    broken = Data(broken=frozenset(range(64)))
    options = {"max_nonfinite_steps": 5, "checkpointing_steps": 1, "logging_steps": 1}
    train(make_run(**options, max_train_steps=3), make_model(), broken)
    with pytest.raises(ValueError, match="in 5 steps in a row, up to step 5"):
        train(make_run(**options, max_train_steps=8, resume_from_checkpoint="latest"), make_model(), broken)


def test_a_refused_start_leaves_no_trace(make_run, make_model, tmp_path):
    run = make_run()
    run.add("model", make_model())
    assert not run.output_dir.exists()
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        make_run(resume_from_checkpoint="nowhere")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_directory_of_something_else_is_refused(make_run, tmp_path, resume):
    (tmp_path / "run" / "vae").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"holds vae and no {RECORD}"):
        make_run(resume_from_checkpoint=resume)
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["vae"]


def test_what_appears_under_a_name_of_the_result_is_kept_and_so_is_what_was_trained(make_run, make_model):
    run = train(make_run(max_train_steps=2, checkpointing_steps=0), make_model())
    (run.output_dir / "config.json").write_text("yours")
    with pytest.raises(ValueError, match=r"holds config.json, which this program has not written"):
        run.finish(lambda directory: (directory / "config.json").write_text("{}") and None)
    assert (run.output_dir / "config.json").read_text() == "yours"
    (run.output_dir / "config.json").unlink()
    resumed = train(make_run(max_train_steps=2, checkpointing_steps=0, resume_from_checkpoint="latest"), make_model())
    resumed.finish(lambda directory: (directory / "config.json").write_text("{}") and None)
    assert (run.output_dir / "config.json").read_text() == "{}"


def test_a_kill_while_a_longer_run_publishes_leaves_no_mixture(make_run, make_model, monkeypatch):
    from diffusers_eqvae.training_utils import checkpoints

    def save(word):
        def write(directory):
            for name in ("weights", "config.json"):
                (directory / name).write_text(word)

        return write

    train(make_run(**EVERYTHING), make_model()).finish(save("short"))
    longer = train(make_run(**EVERYTHING, max_train_steps=9, resume_from_checkpoint="latest"), make_model())
    moved, move = [], checkpoints.replace_directory

    def killed(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target.name)
        move(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "replace_directory", killed)
        longer.finish(save("long"))
    assert (longer.output_dir / "weights").read_text() == "long"
    assert not (longer.output_dir / "config.json").exists()
    again = train(make_run(**EVERYTHING, max_train_steps=9, resume_from_checkpoint="latest"), make_model())
    again.finish(save("long"))
    assert (longer.output_dir / "config.json").read_text() == "long"
