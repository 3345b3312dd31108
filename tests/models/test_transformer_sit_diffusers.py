"""SiTTransformer2DModel as a diffusers citizen: saving, dtypes, attention backends, LoRA, compilation, hooks."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from peft import LoraConfig

from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel

from .test_transformer_sit import inputs, make

# Inductor writes a deprecation warning of its own when it loads.
INDUCTOR_WARNINGS = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("sample_size", [4, (4, 8)])
def test_save_and_load_give_the_same_output(tmp_path, sample_size):
    model = make(sample_size=sample_size, qk_norm=True, autoencoder={"encoder": {"float32": "a"}, "codebook": None})
    model.save_pretrained(tmp_path)
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(*inputs(model)).sample, model(*inputs(model)).sample)
    assert loaded.config.autoencoder == {"encoder": {"float32": "a"}, "codebook": None}
    assert not loaded.training


def test_sharded_save_loads(tmp_path):
    model = make()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(*inputs(model)).sample, model(*inputs(model)).sample)


def test_bfloat16_keeps_the_time_embedding_in_float32(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.time_embedder.linear_1.weight.dtype == torch.float32
    latents, timestep, labels = inputs(model)
    output = loaded(latents.bfloat16(), timestep, labels).sample
    assert output.dtype == torch.bfloat16
    expected = model(latents, timestep, labels).sample
    assert (output - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_bfloat16_cast_and_autocast(qk_norm):
    model = make(qk_norm=qk_norm)
    latents, timestep, labels = inputs(model)
    expected = model(latents, timestep, labels).sample
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(latents, timestep, labels).sample
    autocast.square().mean().backward()
    cast = model.to(torch.bfloat16)(latents.bfloat16(), timestep, labels).sample
    for output in (autocast, cast):
        assert output.dtype == torch.bfloat16
        assert (output - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.fixture
def restore_attention_backend():
    before = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def test_attention_backends_are_used_and_agree(restore_attention_backend, monkeypatch):
    model = make(qk_norm=True)
    used = []
    for name in (AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH):
        backend = _AttentionBackendRegistry._backends[name]

        def record(*args, name=name, backend=backend, **kwargs):
            used.append(name.value)
            return backend(*args, **kwargs)

        monkeypatch.setitem(_AttentionBackendRegistry._backends, name, record)
    outputs = []
    for name in ("native", "_native_math"):
        model.set_attention_backend(name)
        # It also sets the process-wide default; the model's own choice must win over that.
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
        outputs.append(model(*inputs(model)).sample)
    assert used == ["native"] * 2 + ["_native_math"] * 2
    torch.testing.assert_close(*outputs)
    assert len(model.attn_processors) == 2
    model.fuse_qkv_projections()


def test_lora_trains_saves_and_loads(tmp_path):
    model = make()
    plain = model(*inputs(model)).sample
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_qkv", "to_out"], init_lora_weights="gaussian"))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 2 * 2
    assert all("lora" in name for name in trainable)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    for _ in range(2):
        model(*inputs(model)).sample.square().mean().backward()
        optimizer.step()
    adapted = model(*inputs(model)).sample
    assert not torch.allclose(adapted, plain)
    model.save_lora_adapter(tmp_path)
    fresh = make()
    fresh.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(fresh(*inputs(fresh)).sample, adapted)
    fresh.disable_lora()
    torch.testing.assert_close(fresh(*inputs(fresh)).sample, plain)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # in diffusers' checkpointing
@pytest.mark.parametrize("checkpointing", [False, True])
def test_forward_and_backward_compile_as_one_graph(checkpointing):
    if checkpointing and torch.__version__.startswith("2.6."):
        pytest.skip("dynamo of torch 2.6 cannot trace the comparison of versions in diffusers' checkpointing")
    torch.compiler.reset()
    model = make(qk_norm=True).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    latents, timestep, labels = inputs(model)
    drop = torch.tensor([True, False, False])
    expected = model(latents, timestep, labels, drop_labels=drop).sample
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    output = compiled(latents, timestep, labels, drop_labels=drop).sample
    output.mean().backward()
    torch.testing.assert_close(output, expected)
    assert compiled(latents, timestep, labels).sample.shape == expected.shape


@torch.no_grad()
def test_repeated_blocks_compile():
    torch.compiler.reset()
    model = make()
    expected = model(*inputs(model)).sample
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(*inputs(model)).sample, expected)


@pytest.mark.slow
@INDUCTOR_WARNINGS
def test_inductor_gives_the_same_output():
    torch.compiler.reset()
    model = make()
    expected = model(*inputs(model)).sample
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs(model)).sample, expected, atol=1e-5, rtol=1e-5)


def test_layerwise_casting_stores_the_blocks_in_eight_bits():
    model = make()
    expected = model(*inputs(model)).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.transformer_blocks[0].ff.linear_1.weight.dtype == torch.float8_e4m3fn
    assert model.modulation.weight.dtype == model.proj_out.weight.dtype == torch.float32
    output = model(*inputs(model)).sample
    assert (output - expected).abs().max() < 0.1 * expected.abs().max()


def test_meta_device_skeleton_and_float64():
    with torch.device("meta"):
        skeleton = SiTTransformer2DModel.from_preset("SiT-S/2")
    assert {tensor.device.type for tensor in [*skeleton.parameters(), *skeleton.buffers()]} == {"meta"}
    model = make().double()
    latents, timestep, labels = inputs(model)
    assert model(latents.double(), timestep, labels).sample.dtype == torch.float64
