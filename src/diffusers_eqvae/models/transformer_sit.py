"""The class-conditional latent transformer of DiT and SiT (arXiv:2212.09748, arXiv:2401.08740), one backbone for both.

A latent is cut into patches; every block is self-attention and an MLP whose inputs are shifted and scaled, and whose
outputs are gated, by the condition c = time + class ("adaLN-zero"). c is computed once per forward, and one matrix
product gives every block's modulation:

    x = x + gate_1 * Attention(LN(x) * (1 + scale_1) + shift_1)
    x = x + gate_2 * MLP(LN(x) * (1 + scale_2) + shift_2)

LightningDiT's block (arXiv 2501.01423) is the same with other parts: RMSNorm, SwiGLU and rotary positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from .backbone import PREDICTION_TYPES, Backbone, BackboneOutput, register_backbone
from .positions import rotary_angles, rotate, sincos_position_embedding

NUM_TRAIN_TIMESTEPS = 1000
TIME_CHANNELS = 256

# Depth, width and heads of the papers. Trainable parameters with patch 2, 4 channels and learned sigma, in millions.
_SIZES = {
    "S": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},  # 32.87
    "B": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},  # 130.32
    "L": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},  # 457.84
    "XL": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},  # 674.83
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "SiT": {"objective": "flow_matching", "prediction_type": "flow_prediction", "learn_sigma": False},
    "DiT": {"objective": "denoising", "prediction_type": "epsilon", "learn_sigma": True},
    "LightningDiT": {
        "objective": "flow_matching",
        "prediction_type": "flow_prediction",
        "learn_sigma": False,
        "norm": "rms_norm",
        "feed_forward": "swiglu",
        "rotary": True,
    },
}
Norm = Literal["layer_norm", "rms_norm"]
FeedForward = Literal["gelu", "swiglu"]


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """normed * (1 + scale) + shift in one pass; (B, N, D) with (B, 1, D) shift and scale."""
    return torch.addcmul(shift, normed, 1 + scale)


class SiTAttnProcessor:
    """Scaled dot-product attention through diffusers' backend table."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: SiTAttention, hidden_states: Tensor, rotary: Tensor | None = None) -> Tensor:
        # A fixed head size, so that the number of heads may be a shard's.
        query, key, value = attn.to_qkv(hidden_states).unflatten(-1, (3, -1, attn.head_dim)).unbind(2)
        if attn.norm_q is not None and attn.norm_k is not None:
            # Autocast gives the normalised tensors in float32, and every backend wants one dtype.
            query, key = attn.norm_q(query).to(value.dtype), attn.norm_k(key).to(value.dtype)
        if rotary is not None:
            query, key = rotate(query, rotary).to(value.dtype), rotate(key, rotary).to(value.dtype)
        backend, parallel_config = self._attention_backend, self._parallel_config
        attended = dispatch_attention_fn(query, key, value, backend=backend, parallel_config=parallel_config)
        return attn.to_out(attended.flatten(2, 3).to(query.dtype))


class SiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with one query-key-value projection; `qk_norm` normalises both per head."""

    _default_processor_cls = SiTAttnProcessor
    _available_processors = (SiTAttnProcessor,)
    _supports_qkv_fusion = False  # always fused

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        *,
        qk_norm: bool = False,
        norm: Norm = "layer_norm",
    ):
        super().__init__()
        hidden_size = num_attention_heads * attention_head_dim
        self.heads = num_attention_heads
        self.head_dim = attention_head_dim
        self.to_qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.to_out = nn.Linear(hidden_size, hidden_size)
        self.norm_q = _head_norm(norm, attention_head_dim) if qk_norm else None
        self.norm_k = _head_norm(norm, attention_head_dim) if qk_norm else None
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: Tensor, rotary: Tensor | None = None) -> Tensor:
        return self.processor(self, hidden_states, rotary)


class SiTFeedForward(nn.Module):
    """Linear -> GELU (tanh form) -> Linear, or "swiglu" (2002.05202), Linear -> silu(a) * b -> Linear, 2/3 as wide."""

    def __init__(self, hidden_size: int, inner_size: int, *, kind: FeedForward = "gelu"):
        super().__init__()
        self.gated = kind == "swiglu"
        inner_size = int(2 / 3 * inner_size) if self.gated else inner_size
        self.linear_1 = nn.Linear(hidden_size, 2 * inner_size if self.gated else inner_size)
        self.linear_2 = nn.Linear(inner_size, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        inner = self.linear_1(hidden_states)
        if self.gated:
            gate, value = inner.chunk(2, dim=-1)
            return self.linear_2(F.silu(gate) * value)
        return self.linear_2(F.gelu(inner, approximate="tanh"))


class SiTTransformerBlock(nn.Module):
    """One adaLN-zero block; its six modulation vectors come from outside, (B, 6, hidden_size)."""

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        *,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        norm: Norm = "layer_norm",
        feed_forward: FeedForward = "gelu",
    ):
        super().__init__()
        hidden_size = num_attention_heads * attention_head_dim
        self.norm1 = _norm(norm, hidden_size, norm_eps)
        self.attn = SiTAttention(num_attention_heads, attention_head_dim, qk_norm=qk_norm, norm=norm)
        self.norm2 = _norm(norm, hidden_size, norm_eps)
        self.ff = SiTFeedForward(hidden_size, int(hidden_size * mlp_ratio), kind=feed_forward)

    def forward(self, hidden_states: Tensor, modulation: Tensor, rotary: Tensor | None = None) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=1)
        attended = self.attn(modulate(self.norm1(hidden_states), shift_attn, scale_attn), rotary)
        hidden_states = torch.addcmul(hidden_states, gate_attn, attended)
        transformed = self.ff(modulate(self.norm2(hidden_states), shift_ff, scale_ff))
        return torch.addcmul(hidden_states, gate_ff, transformed)


@register_backbone
class SiTTransformer2DModel(Backbone, AttentionMixin, PeftAdapterMixin):
    """Predicts the velocity (SiT, LightningDiT) or the noise (DiT) of class-conditional latents.

    Parameters are those of the papers (`PRESETS`); the position table is a buffer, neither counted nor saved.

    Args:
        sample_size: side of the latents in cells, or (height, width); divisible by `patch_size`.
        patch_size: side of a token in latent cells.
        in_channels: C, channels of the latents.
        num_layers, num_attention_heads, attention_head_dim: depth, heads, and width per head; the hidden size is
            num_attention_heads * attention_head_dim and must be divisible by 4.
        mlp_ratio: width of the MLP over the hidden size.
        num_classes: labels are 0 .. num_classes - 1; num_classes itself is the null class.
        class_dropout_prob: share of samples whose label becomes the null class, per forward in training.
        learn_sigma: 2C output channels; the second half is the learned variance (DiT) or unused (SiT).
        qk_norm: the norm on queries and keys, per head.
        objective: "denoising" embeds the timestep as it is (DiT), every other t = 1 - timestep / 1000 (SiT).
        prediction_type: "flow_prediction", the velocity d x / d sigma (published SiT weights have the opposite sign;
            the conversion negates their last layer), or "epsilon", the noise (DiT).
        norm_eps: of the norms on the hidden states.
        autoencoder: whose latents these are (`provenance.autoencoder_identity`).
        id2label, class_counts: names and numbers of training images by class id (`classes.ClassTable.to_config`).
        norm: "layer_norm" without parameters, or "rms_norm" with a weight.
        feed_forward: "gelu", or "swiglu" of two thirds the width.
        rotary: 2-D rotary positions in every attention, beside the fixed ones at the input.

    Raises:
        ValueError: for sizes that do not divide or an unknown convention.

    Differs from the reference: one linear layer holds all blocks' adaLN weights (same parameters, one product).

    Example:
        >>> model = SiTTransformer2DModel.from_preset("SiT-S/2", num_classes=10)
        >>> velocity = model(torch.randn(2, 4, 32, 32), torch.tensor([900.0, 100.0]), torch.tensor([3, 7])).sample
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        f"{family}-{size}/{patch_size}": {**_SIZES[size], **options, "patch_size": patch_size}
        for family, options in _FAMILIES.items()
        for size in _SIZES
        for patch_size in (1, 2, 4, 8)
    }
    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["SiTTransformerBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["SiTTransformerBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["embed", "modulation", "norm", "proj_out"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["time_embedder"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = False,
        qk_norm: bool = False,
        objective: str = "flow_matching",
        prediction_type: str = "flow_prediction",
        norm_eps: float = 1e-6,
        autoencoder: dict[str, Any] | None = None,
        id2label: dict[str, Any] | None = None,
        class_counts: dict[str, int] | None = None,
        norm: Norm = "layer_norm",
        feed_forward: FeedForward = "gelu",
        rotary: bool = False,
    ):
        super().__init__()
        hidden_size = num_attention_heads * attention_head_dim
        self.sample_height, self.sample_width = _height_and_width(sample_size, patch_size)
        _check_options(hidden_size, objective, prediction_type, class_dropout_prob)
        _check_block(norm, feed_forward, rotary, attention_head_dim)
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.gradient_checkpointing = False
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.token_grid = (self.sample_height // patch_size, self.sample_width // patch_size)

        self.patch_embed = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        positions = sincos_position_embedding(*self.token_grid, hidden_size)
        self.register_buffer("pos_embed", positions, persistent=False)
        angles = rotary_angles(*self.token_grid, attention_head_dim) if rotary else None
        turns = None if angles is None else torch.stack([angles.cos(), angles.sin()])
        self.register_buffer("rotary_turns", turns, persistent=False)
        # [cos | sin] of time * 10000^(-i / 128), i = 0 .. 127, in float32; then Linear, SiLU, Linear.
        self.time_frequencies = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(TIME_CHANNELS, hidden_size)
        self.class_embedder = nn.Embedding(num_classes + 1, hidden_size)
        # Rows: 6 vectors per block (shift, scale, gate of attention, then of the MLP), then the last shift and scale.
        self.modulation = nn.Linear(hidden_size, (6 * num_layers + 2) * hidden_size)
        self.transformer_blocks = nn.ModuleList(
            SiTTransformerBlock(
                num_attention_heads,
                attention_head_dim,
                mlp_ratio=mlp_ratio,
                qk_norm=qk_norm,
                norm_eps=norm_eps,
                norm=norm,
                feed_forward=feed_forward,
            )
            for _ in range(num_layers)
        )
        self.norm_out = _norm(norm, hidden_size, norm_eps)
        self.proj_out = nn.Linear(hidden_size, patch_size * patch_size * self.out_channels)
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        """Xavier for linears, N(0, 0.02) for the conditioning, zero for every modulation and the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                module.bias.data.zero_()
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.patch_embed.out_channels, -1))
        self.patch_embed.bias.data.zero_()
        for module in (self.class_embedder, self.time_embedder.linear_1, self.time_embedder.linear_2):
            nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.proj_out.weight)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor,
        *,
        drop_labels: Tensor | None = None,
        hidden_layers: tuple[int, ...] = (),
        return_dict: bool = True,
    ) -> BackboneOutput | tuple[Tensor, dict[int, Tensor]]:
        """The prediction, (B, C, h, w), or (B, 2C, h, w) with `learn_sigma`.

        Args:
            hidden_states: noisy latents (B, C, h, w) of the configured size.
            timestep: 1000 * sigma, (B,) or one number, 0 .. 1000; float32, since bfloat16 cannot tell 999 from 1000.
            class_labels: (B,) integers, 0 .. num_classes, where num_classes is the null class.
            drop_labels: (B,) bool, True where the label becomes the null class; without it, and in training only,
                drawn once per call from the global generator with `class_dropout_prob`.
            hidden_layers: blocks, counted from 1, whose output is given back as well.

        Raises:
            ValueError: for shapes that do not fit, and labels out of range (looked at on the CPU only: reading them
                on an accelerator would stall it).
        """
        self._check_inputs(hidden_states, class_labels, drop_labels)
        modulation = self._modulation(hidden_states, timestep, class_labels, drop_labels)
        *block_modulations, last = modulation.split([6] * self.config.num_layers + [2], dim=1)

        # Contiguous, or every block would inherit the convolution's transposed layout and copy it for its norms.
        hidden_states = self.patch_embed(hidden_states).flatten(2).transpose(1, 2).contiguous()
        # The weights' dtype: float32 under autocast, so that the residual stream stays in float32 there.
        hidden_states = hidden_states + self.pos_embed.to(self.patch_embed.weight.dtype)
        kept: dict[int, Tensor] = {}
        turns = self.rotary_turns
        for number, (block, block_modulation) in enumerate(
            zip(self.transformer_blocks, block_modulations, strict=True), start=1
        ):
            if self.recomputes(number):
                hidden_states = self._gradient_checkpointing_func(
                    block, hidden_states, block_modulation, self.rotary_turns
                )
            else:
                hidden_states = block(hidden_states, block_modulation, turns)
            if number in hidden_layers:
                kept[number] = hidden_states

        shift, scale = last.chunk(2, dim=1)
        output = self._unpatchify(self.proj_out(modulate(self.norm_out(hidden_states), shift, scale)))
        return BackboneOutput(sample=output, hidden_states=kept) if return_dict else (output, kept)

    def _modulation(
        self, hidden_states: Tensor, timestep: Tensor | float, class_labels: Tensor, drop_labels: Tensor | None
    ) -> Tensor:
        """All shifts, scales and gates of one forward: (B, 6 * num_layers + 2, hidden_size)."""
        time = self._time(timestep, hidden_states)
        if drop_labels is None and self.training and self.config.class_dropout_prob > 0:
            chances = torch.rand(class_labels.shape, device=class_labels.device)
            drop_labels = chances < self.config.class_dropout_prob
        if drop_labels is not None:
            class_labels = class_labels.masked_fill(drop_labels, self.null_class)
        frequencies = self.time_frequencies(time).to(self.time_embedder.linear_1.weight.dtype)
        condition = self.time_embedder(frequencies) + self.class_embedder(class_labels)
        modulation = self.modulation(F.silu(condition).to(self.class_embedder.weight.dtype))
        return modulation.unflatten(1, (-1, self.class_embedder.embedding_dim))

    def _time(self, timestep: Tensor | float, hidden_states: Tensor) -> Tensor:
        """The time the embedding sees, (B,) float32."""
        batch_size = hidden_states.shape[0]
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=hidden_states.device)
        if timestep.ndim > 1 or (timestep.ndim == 1 and timestep.shape[0] not in (1, batch_size)):
            raise ValueError(
                f"`timestep` must be one number or one per sample; got shape {tuple(timestep.shape)} for a batch of "
                f"{batch_size}. Pass 1000 * sigma as a tensor of shape ({batch_size},)."
            )
        timestep = timestep.expand(batch_size)
        return timestep if self.config.objective == "denoising" else 1 - timestep / NUM_TRAIN_TIMESTEPS

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, N, p * p * channels) with p, p, channels in this order -> (B, channels, h, w)."""
        patch_size = self.config.patch_size
        rows, columns = self.sample_height // patch_size, self.sample_width // patch_size
        patches = tokens.reshape(-1, rows, columns, patch_size, patch_size, self.out_channels)
        image = patches.permute(0, 5, 1, 3, 2, 4)
        return image.reshape(-1, self.out_channels, self.sample_height, self.sample_width)

    def _check_inputs(self, hidden_states: Tensor, class_labels: Tensor, drop_labels: Tensor | None) -> None:
        expected = (self.config.in_channels, self.sample_height, self.sample_width)
        if hidden_states.ndim != 4 or tuple(hidden_states.shape[1:]) != expected:
            raise ValueError(
                f"This transformer takes latents of shape (batch, {', '.join(map(str, expected))}); got "
                f"{tuple(hidden_states.shape)}. Check that the autoencoder and the resolution are those it was "
                "trained with, or build it with another `in_channels` or `sample_size`."
            )
        for name, value in (("class_labels", class_labels), ("drop_labels", drop_labels)):
            if value is not None and tuple(value.shape) != (hidden_states.shape[0],):
                raise ValueError(
                    f"`{name}` must have shape ({hidden_states.shape[0]},), one per sample; got {tuple(value.shape)}."
                )
        if class_labels.is_floating_point():
            raise ValueError(f"`class_labels` must be integers; got {class_labels.dtype}. Call `.long()` on them.")
        if class_labels.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = class_labels.aminmax()
            if low < 0 or high > self.null_class:
                raise ValueError(
                    f"`class_labels` must lie in 0 .. {self.null_class} ({self.null_class} is the null class); got "
                    f"{int(low)} .. {int(high)}. Check that `num_classes` is that of the dataset."
                )


def _norm(norm: Norm, size: int, eps: float) -> nn.Module:
    if norm == "rms_norm":
        return nn.RMSNorm(size, eps=eps)
    return nn.LayerNorm(size, eps=eps, elementwise_affine=False)


def _head_norm(norm: Norm, size: int) -> nn.Module:
    """Of queries and keys; both with a weight, LayerNorm with torch's own eps of 1e-5."""
    return nn.RMSNorm(size, eps=1e-6) if norm == "rms_norm" else nn.LayerNorm(size)


def _height_and_width(sample_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    if height < 1 or width < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"`sample_size` must be a positive multiple of `patch_size`; got {height}x{width} with patch "
            f"{patch_size}. Choose a patch size that divides both sides of the latents."
        )
    return height, width


def _check_options(hidden_size: int, objective: str, prediction_type: str, class_dropout_prob: float) -> None:
    if hidden_size % 4:
        raise ValueError(
            "The hidden size (num_attention_heads * attention_head_dim) must be divisible by 4 for the 2-D positions; "
            f"got {hidden_size}. Change one of the two factors."
        )
    if not objective:
        raise ValueError("`objective` must name what the model is trained by, e.g. 'flow_matching'; got nothing.")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"`prediction_type` must be one of {PREDICTION_TYPES}; got {prediction_type!r}.")
    if not 0 <= class_dropout_prob < 1:
        raise ValueError(f"`class_dropout_prob` must lie in [0, 1); got {class_dropout_prob}.")


def _check_block(norm: str, feed_forward: str, rotary: bool, head_dim: int) -> None:
    for name, value, choices in (
        ("norm", norm, get_args(Norm)),
        ("feed_forward", feed_forward, get_args(FeedForward)),
    ):
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}; got {value!r}.")
    if rotary and head_dim % 4:
        raise ValueError(f"Rotary positions need an `attention_head_dim` divisible by 4; got {head_dim}.")
