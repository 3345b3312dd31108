"""Flags, presets and what is refused at the command line."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from diffusers_eqvae.models.autoencoder_kl_eq import AutoencoderKLEQ
from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel
from diffusers_eqvae.options import Checked
from diffusers_eqvae.training_utils.arguments import DataArguments, RunArguments, warn_without_effect
from diffusers_eqvae.training_utils.command_line import parse, read_model_config, resolved, save_resolved


@dataclass
class Extra:
    numbers: list[int] = field(default_factory=lambda: [1], metadata={"help": "Some numbers."})


def preset(tmp_path, **content):
    path = tmp_path / "preset.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_flags_win_over_the_preset_and_the_preset_over_defaults(tmp_path):
    path = preset(tmp_path, output_dir="a", seed=5, learning_rate="1e-3", numbers=[2, 3], use_ema=False)
    run, extra = parse(RunArguments, Extra, argv=[path, "--seed", "7", "--mixed_precision", "bf16"])
    assert (run.output_dir, run.seed, run.learning_rate, run.use_ema) == ("a", 7, 1e-3, False)
    assert run.mixed_precision == "bf16" and extra.numbers == [2, 3]
    _, extra = parse(RunArguments, Extra, argv=[path, "--numbers", "4"])
    assert extra.numbers == [4]


def test_a_file_named_in_a_preset_is_the_one_beside_it(tmp_path, monkeypatch):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "model.json").touch()
    (tmp_path / "presets" / "data").mkdir()
    (tmp_path / "elsewhere.json").touch()
    monkeypatch.chdir(tmp_path)

    def resume_from_checkpoint(value, *flags):
        path = preset(tmp_path / "presets", output_dir="a", resume_from_checkpoint=value)
        return parse(RunArguments, argv=[path, *flags])[0].resume_from_checkpoint

    assert resume_from_checkpoint("model.json") == str(tmp_path / "presets" / "model.json")
    assert resume_from_checkpoint("elsewhere.json") == "elsewhere.json"
    assert resume_from_checkpoint("data") == "data", "a folder may be a name like any other"
    assert resume_from_checkpoint("x", "--resume_from_checkpoint", "model.json") == "model.json", (
        "the command line is not a preset"
    )


def test_unknown_key_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ValueError, match=r"learning_rte.*nearest flag is 'learning_rate'"):
        parse(RunArguments, argv=[preset(tmp_path, output_dir="a", learning_rte=1.0)])


@pytest.mark.parametrize("content", ["- a\n- b\n", "seed:\n  deep: 1\n"])
def test_presets_are_flat_mappings(tmp_path, content):
    path = tmp_path / "preset.yml"
    path.write_text(content)
    with pytest.raises(ValueError, match="mapping"):
        parse(RunArguments, argv=[str(path), "--output_dir", "a"])


def test_absent_preset_is_named():
    with pytest.raises(ValueError, match=r"nowhere\.yaml does not exist: .* this script has none of its own"):
        parse(RunArguments, argv=["nowhere.yaml", "--output_dir", "a"])


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A script in a folder of its own, which is not the working directory, with three presets beside it."""
    configs = tmp_path / "installed" / "configs"
    configs.mkdir(parents=True)
    (configs / "quick.yaml").write_text("seed: 5\n")
    (configs / "careful.yaml").write_text("seed: 6\nlearning_rate: 1.0e-5\n")
    (configs / "anothers.yaml").write_text("seed: 7\nmodel: SiT-B/2\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return str(tmp_path / "installed" / "train.py")


def test_a_preset_is_a_file_here_or_one_that_is_installed_beside_the_script(script):
    def seed(word):
        return parse(RunArguments, argv=[word, "--output_dir", "a"], script=script)[0].seed

    assert [seed("quick"), seed("quick.yaml"), seed("careful")] == [5, 5, 6]
    Path("quick.yaml").write_text("seed: 8\n")
    assert [seed("quick"), seed("quick.yaml")] == [8, 8], "a file here comes first"
    Path("quick").write_text("seed: 9\n")
    assert [seed("quick"), seed("quick.yaml")] == [9, 8]


def test_a_preset_of_another_script_is_not_this_ones(script, capsys):
    said = r"The preset anothers does not exist: .*those of this script are careful, quick"
    with pytest.raises(ValueError, match=said):
        parse(RunArguments, argv=["anothers", "--output_dir", "a"], script=script)
    with pytest.raises(ValueError, match=r"did you mean careful\?"):
        parse(RunArguments, argv=["carefull", "--output_dir", "a"], script=script)
    with pytest.raises(SystemExit):
        parse(RunArguments, argv=["--help"], script=script)
    assert "Presets that are installed: careful, quick.\n" in capsys.readouterr().out


def test_a_preset_takes_from_its_base_what_it_does_not_say(script, tmp_path):
    configs = tmp_path / "installed" / "configs"
    (configs / "row.yaml").write_text("base: careful\nseed: 9\n")
    (given,) = parse(RunArguments, argv=["row", "--output_dir", "a"], script=script)
    assert (given.seed, given.learning_rate) == (9, 1e-5)
    for base, said in (
        ("row", "has the base row, which has one itself: careful. Name that one."),
        ("nothing", "has the base nothing, and no nothing.yaml lies beside it."),
        ("../configs/careful", "has the base ../configs/careful, and no ../configs/careful.yaml lies beside it."),
        ("[careful]", "has the base ['careful'], and no ['careful'].yaml lies beside it."),
    ):
        path = configs / "wrong.yaml"
        path.write_text(f"base: {base}\n")
        with pytest.raises(ValueError, match=re.escape(said)):
            parse(RunArguments, argv=[str(path), "--output_dir", "a"])


@dataclass
class Reading(Checked):
    images: str | None = field(default=None, metadata={"reads": True})
    networks: list[str] = field(default_factory=list, metadata={"reads": True})
    name: str | None = None


def test_a_path_in_a_preset_starts_at_the_preset_and_one_on_the_command_line_here(tmp_path, monkeypatch):
    presets = tmp_path / "presets"
    for name in ("data", "weights"):
        (presets / name).mkdir(parents=True)
        (tmp_path / name).mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    path = preset(presets, images="data", networks=["a=weights", "b=elsewhere", "c"], name="data")
    (given,) = parse(Reading, argv=[path])
    assert given == Reading(str(presets / "data"), [f"a={presets / 'weights'}", "b=elsewhere", "c"], "data")
    (given,) = parse(Reading, argv=[path, "--images", "data"])
    assert given.images == "data"
    (given,) = parse(Reading, argv=[preset(presets, images="../data")])
    assert Path(given.images).resolve() == tmp_path / "data"


def test_preset_values_are_checked_like_flags(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(RunArguments, argv=[preset(tmp_path, output_dir="a", lr_scheduler="sine")])
    assert "sine" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--lerning_rate", "--learning_rat"])
def test_unknown_and_abbreviated_flags_end_the_program(flag, capsys):
    with pytest.raises(SystemExit):
        parse(RunArguments, argv=["--output_dir", "a", flag, "1"])
    assert "nearest flag is --learning_rate" in capsys.readouterr().err


def test_a_preset_after_a_flag_is_told_to_come_first(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(RunArguments, argv=["--output_dir", "a", preset(tmp_path, seed=1)])
    assert "preset must come first" in capsys.readouterr().err


def test_help_of_a_switch_off_says_so_without_a_default(capsys):
    with pytest.raises(SystemExit):
        parse(RunArguments, argv=["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--no_use_ema Turns off: Keep a float32 moving average of the weights. --" in text
    assert parse(RunArguments, argv=["--output_dir", "a"])[0].use_ema
    assert not parse(RunArguments, argv=["--output_dir", "a", "--no_use_ema"])[0].use_ema


@pytest.mark.parametrize(
    ("model_class", "wrong", "right"),
    [(SiTTransformer2DModel, "num_layer", "num_layers"), (AutoencoderKLEQ, "latent_chanels", "latent_channels")],
)
def test_unknown_keys_of_a_model_config_are_refused(tmp_path, model_class, wrong, right):
    path = tmp_path / "model.json"
    path.write_text(f'{{"_class_name": "X", "{right}": 4}}')
    assert read_model_config(path, model_class) == {right: 4}
    path.write_text(f'{{"{wrong}": 4}}')
    with pytest.raises(ValueError, match=f"{wrong}.*nearest of {model_class.__name__} is '{right}'"):
        read_model_config(path, model_class)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"train_batch_size": 0}, "train_batch_size must be positive"),
        ({"max_train_steps": -1}, "max_train_steps must be positive"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"seed": -1}, "seed must lie in"),
        ({"lr_scheduler": "constant_with_warmup"}, "lr_warmup_steps"),
    ],
)
def test_impossible_values_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        RunArguments(output_dir="a", **option)


def test_two_sources_of_images_are_refused():
    with pytest.raises(ValueError, match="not both"):
        DataArguments(dataset_name="a", train_data_dir="b")


def test_resolved_arguments_are_a_preset_that_repeats_the_run(tmp_path):
    run, data, extra = RunArguments(output_dir="a", seed=3, use_ema=False), DataArguments(), Extra([4, 5])
    save_resolved(resolved(run, data, extra), tmp_path)
    again = parse(RunArguments, DataArguments, Extra, argv=[str(tmp_path / "resolved_arguments.yaml")])
    assert again == (run, data, extra)


def test_what_a_run_read_is_found_from_any_folder(tmp_path, monkeypatch):
    """A local path is noted as an absolute one; the name of a repository stays, and so does what is not read."""
    (tmp_path / "work" / "photographs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    local = resolved(RunArguments(output_dir="photographs"), DataArguments(train_data_dir="photographs"))
    assert local["train_data_dir"] == str(tmp_path / "work" / "photographs")
    assert local["output_dir"] == "photographs"
    assert resolved(DataArguments(dataset_name="owner/name"))["dataset_name"] == "owner/name"


def test_every_flag_is_documented():
    from dataclasses import fields

    for group in (RunArguments, DataArguments):
        for entry in fields(group):
            assert entry.metadata.get("help", "").rstrip(".").strip(), f"--{entry.name} has no help"


def test_flags_without_effect_are_named_once_and_only_where_they_were_changed(caplog):
    changed = DataArguments(random_flip=True, resolution=512)
    warn_without_effect(changed, vars(changed), "the images are fixed")
    assert caplog.messages == ["Without effect, since the images are fixed: --resolution, --random_flip."]
    warn_without_effect(DataArguments(), vars(changed), "the images are fixed")
    assert len(caplog.messages) == 1
