"""The layouts of DiT, SiT and REPA: what is read from shapes, written back bit for bit, and refused by name."""

import pytest
import torch

from diffusers_eqvae.conversion import CONVERTERS, from_published, to_published
from tests.golden.test_sit_golden import HEADS, RECTANGULAR, SQUARE, published_weights

REFLECTED = "t_embedder.mlp.0.weight"


def convert(tensors, layout="sit", **overrides):
    return from_published(tensors, layout=layout, num_attention_heads=HEADS, **overrides)


@pytest.mark.parametrize("shape", [SQUARE, RECTANGULAR])
@pytest.mark.parametrize("layout", ["dit", "repa", "sit"])
def test_written_back_are_the_same_bits(layout, shape):
    published = published_weights(shape)
    back = to_published(convert(published, layout), layout)
    assert back.keys() == published.keys()
    for name, tensor in published.items():
        if layout == "repa" and name == REFLECTED:
            torch.testing.assert_close(back[name], tensor, atol=1e-7, rtol=1e-6)
            assert not torch.equal(convert(published, "repa").time_embedder.linear_1.weight, tensor)
        elif name == "pos_embed":
            torch.testing.assert_close(back[name], tensor, atol=1e-7, rtol=0)
        else:
            assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("layout", ["dit", "repa", "sit"])
def test_a_model_of_ours_survives_publishing(layout):
    model = convert(published_weights(SQUARE), layout)
    again = convert(to_published(model, layout), layout)
    assert {**again.config} == {**model.config}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, atol=1e-7, rtol=1e-6, msg=name)


def test_the_config_comes_from_the_shapes():
    config = convert(published_weights(RECTANGULAR)).config
    assert tuple(config["sample_size"]) == (12, 4)
    assert (config["patch_size"], config["in_channels"], config["num_layers"]) == (4, 3, 2)
    assert (config["attention_head_dim"], config["num_classes"], config["learn_sigma"]) == (8, 10, False)
    assert convert(published_weights(SQUARE)).config["learn_sigma"] is True


def test_a_label_table_without_a_null_class_needs_to_be_said(caplog):
    published = published_weights(SQUARE)
    rows = len(published["y_embedder.embedding_table.weight"])
    assert convert(published).config.num_classes == rows - 1
    assert f"taken as {rows - 1} classes and the null class" in caplog.text
    caplog.clear()
    model = convert(published, num_classes=rows)
    assert (model.config.num_classes, model.config.class_dropout_prob) == (rows, 0) and not caplog.text
    table = model.class_embedder.weight
    assert table.shape[0] == rows + 1 and not table[-1].any()
    back = to_published(model, "sit")["y_embedder.embedding_table.weight"]
    assert torch.equal(back, published["y_embedder.embedding_table.weight"])
    with pytest.raises(
        ValueError, match=f"num_classes=3 needs a label table of as many rows or one more; it has {rows}"
    ):
        convert(published, num_classes=3)


def test_heads_size_and_positions_that_cannot_be_told_are_asked_for():
    published = published_weights(SQUARE)
    with pytest.raises(ValueError, match="Give num_attention_heads"):
        from_published(published, layout="sit")
    trained = published | {"pos_embed": published["pos_embed"] + torch.randn(published["pos_embed"].shape)}
    with pytest.raises(ValueError, match="is not the fixed 2-D sin-cos table"):
        convert(trained)
    del published["pos_embed"]
    with pytest.raises(ValueError, match="Give sample_size"):
        convert(published)
    assert convert(published, sample_size=8).config.sample_size == 8
    with pytest.raises(ValueError, match="no option 'num_clases'"):
        convert(published, num_clases=3)


def test_projectors_show_repa_and_are_left_out(caplog):
    published = published_weights(SQUARE) | {"projectors.0.0.weight": torch.ones(2, 2)}
    model = from_published(published, num_attention_heads=HEADS)
    assert torch.equal(
        to_published(model, "repa")["final_layer.linear.weight"], published["final_layer.linear.weight"]
    )
    assert "left out: projectors.0.0.weight" in caplog.text
    with pytest.raises(ValueError, match=r"holds projectors\.0\.0\.weight, which SiTConverter does not know"):
        convert(published, "sit")


def test_two_layouts_that_fit_are_both_named():
    with pytest.raises(ValueError, match="fit the layouts dit and sit, which differ in conventions"):
        from_published(published_weights(SQUARE), num_attention_heads=HEADS)
    with pytest.raises(ValueError, match=r"\(conv_in\.weight\) fit none of the layouts diffusers_dit, dit, "):
        from_published({"conv_in.weight": torch.ones(1)})


def test_missing_unknown_and_misshapen_tensors_are_named():
    published = published_weights(SQUARE)
    without = {name: tensor for name, tensor in published.items() if "blocks.1.adaLN" not in name}
    with pytest.raises(
        ValueError, match=r"lacks blocks\.1\.adaLN_modulation\.1\.weight, blocks\.1\.adaLN_modulation\.1\.bias\."
    ):
        convert(without)
    with pytest.raises(ValueError, match=r"holds blocks\.0\.attn\.rope, which SiTConverter does not know"):
        convert(published | {"blocks.0.attn.rope": torch.ones(1)})
    with pytest.raises(ValueError, match=r"final_layer\.linear\.bias has shape \(3,\).* needs \(32,\)"):
        convert(published | {"final_layer.linear.bias": torch.ones(3)})
    with pytest.raises(ValueError, match=r"lacks x_embedder\.proj\.weight: it is not of this layout"):
        convert({"conv_in.weight": torch.ones(1)})


def test_conventions_that_a_layout_does_not_have_are_refused():
    with pytest.raises(ValueError, match="cannot be written in this layout"):
        to_published(convert(published_weights(SQUARE), "dit"), "sit")
    with pytest.raises(ValueError, match="holds a SiTTransformer2DModel, and the model is a Linear"):
        to_published(torch.nn.Linear(1, 1), "sit")


def test_the_room_lists_its_layouts():
    assert {"dit", "lightningdit", "repa", "sit"} <= set(CONVERTERS.names())
