"""Which class is which: never guessed, and compared wherever two tables of classes meet."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from diffusers_eqvae.classes import ClassTable
from diffusers_eqvae.data.image_datasets import load_image_dataset
from diffusers_eqvae.data.latent_store import LatentStore
from diffusers_eqvae.pipelines.generated import GeneratedImages
from diffusers_eqvae.pipelines.labels import resolve_class_labels
from diffusers_eqvae.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler
from tests.invariants.tiny_latents import write_store
from tests.scripts import test_sample, test_train_transformer

script = test_train_transformer.script
sampler = test_sample.script


def write_image(path: Path, px: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (px, px), (90, 120, 60)).save(path, "PNG")


def folders(root: Path, names: list[str]) -> dict[int, str]:
    for name in names:
        write_image(root / name / "a.png")
    return load_image_dataset(train_data_dir=root).id2label


def table(root: Path, labels: list, feature: str | datasets.ClassLabel) -> Path:
    write_image(root.parent / "one.png")
    image = {"bytes": (root.parent / "one.png").read_bytes(), "path": None}
    label = datasets.Value(feature) if isinstance(feature, str) else feature
    features = datasets.Features({"image": datasets.Image(), "label": label})
    root.mkdir()
    columns = {"image": [image] * len(labels), "label": labels}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(root / "0.parquet")
    return root


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        ([str(each) for each in range(12)], [str(each) for each in range(12)]),
        (["10", "9", "1"], ["1", "9", "10"]),
        (["007", "08", "1"], ["1", "007", "08"]),
        (["10", "9", "x"], ["10", "9", "x"]),
    ],
    ids=["ids", "numbers with gaps", "leading zeros", "not all are numbers"],
)
def test_classes_that_are_called_by_numbers_are_ordered_as_numbers(tmp_path, names, ordered):
    assert folders(tmp_path / "folders", names) == dict(enumerate(ordered))
    source = load_image_dataset(train_data_dir=table(tmp_path / "table", names, "string"))
    assert source.id2label == dict(enumerate(ordered))
    assert [source.id2label[each] for each in source.labels.tolist()] == names


@pytest.mark.parametrize(
    ("written", "names", "found"),
    [
        ("1", {0: "1", 1: "2"}, r"'1' is the name of class 0 and the id of class 1: write id:1 or name:1"),
        ("2", {0: "0", 1: "1", 2: "3"}, r"classes are called by numbers: write id:2"),
        ("id:1", {0: "1", 1: "2"}, 1),
        ("name:1", {0: "1", 1: "2"}, 0),
        ("7", {0: "1", 1: "7"}, 1),
        ("1", {0: "0", 1: "1"}, 1),
        ("1", {0: "cat", 1: "dog"}, 1),
        ("1", {}, 1),
        ("9", {0: "cat"}, r"Class ids must lie in 0\.\.2"),
    ],
    ids=[
        "name and id",
        "between names",
        "said: id",
        "said: name",
        "a name only",
        "both agree",
        "id",
        "unnamed",
        "none",
    ],
)
def test_a_number_in_text_means_one_class_or_is_refused(written, names, found):
    names = {key: (name,) for key, name in names.items()}
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            resolve_class_labels(written, 3, id2label=names)
    else:
        assert resolve_class_labels(written, 3, id2label=names) == [found]


def test_the_sampler_and_the_pipeline_draw_the_same_class(tmp_path, sampler, tiny_sit, tiny_autoencoder_kl):
    classes = ClassTable(tuple(sorted(map(str, range(10)), reverse=True)))
    pipeline = pipeline_of(tiny_sit, tiny_autoencoder_kl, classes)
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="write id:3 or name:3"):
        pipeline(["3"])
    with pytest.raises(ValueError, match="write id:3 or name:3"):
        sampler.main(test_sample.words(tmp_path / "model", tmp_path / "set", class_labels="3"))


def pipeline_of(transformer, vae, classes: ClassTable, **options) -> ClassConditionalPipeline:
    transformer.register_to_config(**classes.to_config())
    return ClassConditionalPipeline(transformer, vae, FlowMatchODEScheduler(), **options)


@pytest.mark.parametrize(
    ("labels", "feature", "empty"),
    [
        ([1, 2, 3, 4] * 2, "int64", "1 of 5 classes have no images: 0."),
        ([0, 3, 0, 3], "int64", "2 of 4 classes have no images: 1, 2."),
        ([0, 1], datasets.ClassLabel(names=["cat", "dog", "owl"]), r"1 of 3 classes have no images: 2 \(owl\)."),
    ],
    ids=["from 1", "a gap", "a name without images"],
)
def test_classes_without_images_are_named(tmp_path, caplog, labels, feature, empty):
    source = load_image_dataset(train_data_dir=table(tmp_path / "table", labels, feature))
    said = [record.getMessage() for record in caplog.records if "classes have no images" in record.getMessage()]
    assert len(said) == 1 and "number the labels from 0" in said[0]
    assert caplog.text and re.match(empty, said[0])
    assert sum(source.classes.counts) == len(labels) and not set(source.classes.present) & set(source.classes.empty)


def test_classes_without_images_are_not_sampled(tmp_path, sampler, tiny_sit, tiny_autoencoder_kl):
    classes = ClassTable(tuple("abcdefghij"), (0, 3, *(0,) * 7, 2))
    pipeline = pipeline_of(tiny_sit, tiny_autoencoder_kl, classes)
    pipeline.save_pretrained(tmp_path / "model")
    sampler.main(test_sample.words(tmp_path / "model", tmp_path / "set"))
    assert set(test_sample.read(tmp_path / "set")[1]) == {1, 9}
    seen = []
    pipeline.__class__ = type(
        "Seen", (ClassConditionalPipeline,), {"__call__": lambda self, ids, **_: seen.extend(ids)}
    )
    with pytest.raises(AttributeError):
        next(iter(GeneratedImages(pipeline, 8, batch_size=8, label_policy="balanced")))
    assert set(seen) == {1, 9}


def test_a_store_keeps_the_table(tmp_path, tiny_autoencoder_kl):
    store = LatentStore(write_store(tmp_path, tiny_autoencoder_kl))
    assert store.classes == ClassTable(("cat", "dog", "otter"), (16, 16, 16))
    assert ClassTable.from_config(json.loads(json.dumps(store.classes.to_config()))) == store.classes


def renamed(store: Path, names: list[str]) -> Path:
    from tests.invariants import tiny_latents

    original, tiny_latents.CLASS_NAMES = tiny_latents.CLASS_NAMES, dict(enumerate(names))
    try:
        from diffusers import AutoencoderKL

        return write_store(store.with_name("other"), AutoencoderKL.from_pretrained(store / "vae"))
    finally:
        tiny_latents.CLASS_NAMES = original


@pytest.mark.parametrize(
    ("names", "message", "told"),
    [
        (["x", "y", "z"], r"3 of 3 names differ: 0 is 'cat' there and 'x' here, .*--new_classes", "0 of 3 classes"),
        (["dog", "cat", "otter"], r"2 of 3 names differ, the same ones in another order", "3 of 3 classes"),
        (["cat", "dog"], r"num_classes = 3, but the latents have 2: .* --new_classes", r"2 of 2 classes"),
        (["cat", "dog", "otter", "owl"], r"num_classes = 3, but the latents have 4", r"1 start anew \(owl\)"),
    ],
    ids=["other names", "another order", "fewer", "more"],
)
def test_a_model_goes_on_with_other_classes_only_if_told_to(
    tmp_path, script, tiny_autoencoder_kl, caplog, names, message, told
):
    store = write_store(tmp_path / "store", tiny_autoencoder_kl)
    options = {"validation_steps": 0, "learning_rate": 1e-12}
    script.main(test_train_transformer.flags(tmp_path, latents_dir=store, **options))
    first = ClassConditionalPipeline.from_pretrained(tmp_path / "run")
    assert first.transformer.config.id2label == {"0": "cat", "1": "dog", "2": "otter"}
    assert first.transformer.config.class_counts == {"0": 16, "1": 16, "2": 16} and first.config.id2label is None
    assert first.id2label[1] == ("dog",)

    options |= {"latents_dir": renamed(store, names), "model": tmp_path / "run", "output_dir": tmp_path / "on"}
    with pytest.raises(ValueError, match=message):
        script.main(test_train_transformer.flags(tmp_path, **options))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        script.main(test_train_transformer.flags(tmp_path, "--new_classes", **options))
    assert re.search(told, caplog.text) and "Every weight of" in caplog.text
    then = ClassConditionalPipeline.from_pretrained(tmp_path / "on").transformer
    assert list(then.class_table.names) == names
    rows, saved = then.class_embedder.weight, first.transformer.class_embedder.weight
    for here, there in then.class_table.rows_from(first.transformer.class_table).items():
        assert torch.allclose(rows[here], saved[there], atol=1e-6), names[here]
    assert torch.allclose(rows[-1], saved[-1], atol=1e-6), "the row for no class"
    assert torch.allclose(then.patch_embed.weight, first.transformer.patch_embed.weight, atol=1e-6)


def test_the_same_classes_under_other_names_go_on_once_both_are_given(tmp_path, script, tiny_autoencoder_kl):
    store = write_store(tmp_path / "store", tiny_autoencoder_kl)
    options = {"validation_steps": 0, "learning_rate": 1e-12}
    script.main(test_train_transformer.flags(tmp_path, latents_dir=store, **options))
    options |= {"latents_dir": renamed(store, ["n1", "n2", "n3"]), "model": tmp_path / "run"}
    with pytest.raises(ValueError, match=r"let id2label of .*config\.json give both, as \"tench, n01440764\"; or"):
        script.main(test_train_transformer.flags(tmp_path, **options | {"output_dir": tmp_path / "refused"}))
    config = tmp_path / "run" / "transformer" / "config.json"
    both = {"0": "cat, n1", "1": ["dog", "n2"], "2": "otter, n3"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"id2label": both}))
    script.main(test_train_transformer.flags(tmp_path, **options | {"output_dir": tmp_path / "on"}))
    pipeline = ClassConditionalPipeline.from_pretrained(tmp_path / "on")
    assert pipeline.resolve_class_labels(["n2", "otter"]) == [1, 2] and pipeline.class_ids == [0, 1, 2]
    assert pipeline.transformer.config.id2label["1"] == "dog, n2"


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (["n3", "n1"], {0: 2, 1: 0}),
        (["crane", "n4"], {0: 3, 1: 1}),  # a whole label before a synonym of another
        (["bird", "owl"], {}),
    ],
    ids=["one of its names", "a label", "shared by two"],
)
def test_rows_follow_every_name_of_a_class(names, rows):
    saved = ClassTable(("cat, n1", "bird, crane, n4", "otter, n3", "crane", "bird, n6"))
    assert ClassTable(tuple(names)).rows_from(saved) == rows


def test_a_name_that_two_classes_share_is_no_proof_that_they_are_the_same():
    saved = ClassTable(("n02012849, crane", "n03126707, crane"))
    saved.require_same(ClassTable(("Crane, N02012849", "n03126707")), whose="the model", remedy="train anew")
    with pytest.raises(ValueError, match=r"2 of 2 names differ, the same ones in another order"):
        saved.require_same(ClassTable(saved.names[::-1]), whose="the model", remedy="train anew")
    with pytest.raises(ValueError, match=r"2 of 2 names differ: 0 is 'n02012849, crane' there and 'crane' here"):
        saved.require_same(ClassTable(("crane", "crane, hoist")), whose="the model", remedy="train anew")


def test_a_pipeline_whose_names_are_not_its_transformers(tiny_sit, tiny_autoencoder_kl):
    classes = ClassTable(("tench, Tinca tinca", *"bcdefghij"))
    with pytest.raises(
        ValueError, match="class 1 as 'b', and the pipeline's id2label calls it 'x': leave id2label out"
    ):
        pipeline_of(tiny_sit, tiny_autoencoder_kl, classes, id2label={1: "x"})
    assert pipeline_of(tiny_sit, tiny_autoencoder_kl, classes, id2label={0: "Tench"}).resolve_class_labels(
        "tench"
    ) == [0]


def test_images_without_labels_train_a_model_of_one_class(tmp_path, script, tiny_autoencoder_kl):
    store = write_store(tmp_path / "store", tiny_autoencoder_kl, labelled=False)
    with pytest.raises(ValueError, match=r"has no labels; encode a dataset with labels .* or give --num_classes 1"):
        script.main(test_train_transformer.flags(tmp_path, latents_dir=store))
    script.main(test_train_transformer.flags(tmp_path, latents_dir=store, num_classes=1))
    assert ClassConditionalPipeline.from_pretrained(tmp_path / "run").id2label == {0: ("image",)}
    for each in range(3):
        write_image(tmp_path / "flat" / f"{each}.png")
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    images = {"train_data_dir": tmp_path / "flat", "vae": tmp_path / "vae", "resolution": 16}
    options = {**images, "output_dir": tmp_path / "flat_run"}
    with pytest.raises(ValueError, match=r"no labels; name their column by --label_column, .* --num_classes 1"):
        script.main(test_train_transformer.flags(tmp_path, **options))
    script.main(test_train_transformer.flags(tmp_path, **options, num_classes=1))


def test_a_class_that_training_had_no_images_of_is_warned_of_once(tiny_sit, tiny_autoencoder_kl, caplog):
    table = ClassTable(tuple("abcdefghij"), (0, 3, 0, *[1] * 7))
    pipeline = pipeline_of(tiny_sit, tiny_autoencoder_kl, table)
    assert pipeline.resolve_class_labels([1, "d"]) == [1, 3] and not caplog.text
    assert pipeline.resolve_class_labels(["a", 2, 1]) == pipeline.resolve_class_labels([0, 2, 1])
    assert caplog.text.count("Training had no images of class 0, 2: what is sampled of it was not learnt") == 1
