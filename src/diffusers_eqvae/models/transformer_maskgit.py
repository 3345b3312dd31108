"""The bidirectional transformer of MaskGIT (arXiv:2202.04200): from tokens, some of them masked, to logits of all.

One table embeds everything that may stand in the sequence, in this order: the K tokens of a codebook, the mask, the
C classes, and "no class". The class is the last of the h * w + 1 positions, and the same table, transposed, gives the
logits:

    x      = F_in(table[tokens, class] + positions)      F_in:  LN, Linear, GELU, LN, Linear
    x      = x + Attention(LN(x));  x = x + MLP(LN(x))   in every block
    logits = F_out(x) table[:K]^T + bias                 F_out: LN, Linear, GELU, LN; a bias per position and token
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from .backbone import Backbone, BackboneOutput, register_backbone

OUTER_NORM_EPS = 1e-12  # of F_in and F_out, as BERT's

_OBJECTIVE = {"objective": "masked_tokens", "prediction_type": "logits"}
# Depth, width and heads. Parameters with 16x16 tokens of 1024 and 1000 classes, in millions.
_SIZES = {
    "S": {"num_layers": 8, "num_attention_heads": 6, "attention_head_dim": 64},  # 16.0
    "B": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 48},  # 174.2
}


class MaskGITAttnProcessor:
    """Scaled dot-product attention through diffusers' backend table, with dropout on the attention weights."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: MaskGITAttention, hidden_states: Tensor) -> Tensor:
        query, key, value = attn.to_qkv(hidden_states).unflatten(-1, (3, -1, attn.head_dim)).unbind(2)
        attended = dispatch_attention_fn(
            query,
            key,
            value,
            dropout_p=attn.dropout if attn.training else 0.0,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out(attended.flatten(2, 3).to(query.dtype))


class MaskGITAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with one query-key-value projection."""

    _default_processor_cls = MaskGITAttnProcessor
    _available_processors = (MaskGITAttnProcessor,)
    _supports_qkv_fusion = False  # always fused

    def __init__(self, num_attention_heads: int, attention_head_dim: int, *, dropout: float):
        super().__init__()
        hidden_size = num_attention_heads * attention_head_dim
        self.heads, self.head_dim, self.dropout = num_attention_heads, attention_head_dim, dropout
        self.to_qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.to_out = nn.Linear(hidden_size, hidden_size)
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.processor(self, hidden_states)


class MaskGITTransformerBlock(nn.Module):
    """Self-attention and an MLP with GELU, each on a LayerNorm and added to its input."""

    def __init__(self, num_attention_heads: int, attention_head_dim: int, *, mlp_ratio: float, dropout: float):
        super().__init__()
        hidden_size = num_attention_heads * attention_head_dim
        inner_size = int(hidden_size * mlp_ratio)
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attn = MaskGITAttention(num_attention_heads, attention_head_dim, dropout=dropout)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.ff = nn.Sequential(
            nn.Linear(hidden_size, inner_size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(inner_size, hidden_size),
            nn.Dropout(dropout),
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        return hidden_states + self.ff(self.norm2(hidden_states))


@register_backbone
class MaskGITTransformer2DModel(Backbone, AttentionMixin, PeftAdapterMixin):
    """Predicts the tokens of an image from those that are not masked, and from its class.

    Args:
        sample_size: tokens along a side, or (height, width).
        codebook_size: K; tokens are 0 .. K - 1 and K itself is the mask (`mask_token`).
        num_layers, num_attention_heads, attention_head_dim: depth, heads, and width per head.
        mlp_ratio: width of the MLP over the hidden size.
        num_classes: labels are 0 .. num_classes - 1; num_classes itself is the null class.
        class_dropout_prob: share of samples whose label becomes the null class, per forward in training.
        dropout: of attention weights, MLPs and F_in, F_out. It is drawn from the global generator, which a run seeds
            per rank and step: with dropout, two ranks are not one with twice the batch.
        objective, prediction_type: "masked_tokens" and "logits".
        autoencoder: whose tokens these are (`provenance.autoencoder_identity`).
        id2label, class_counts: names and numbers of training images by class id.

    Raises:
        ValueError: for sizes or probabilities out of range.

    Differs from the reference: weights start as MaskGIT's do (normal of standard deviation .02, truncated at two of
    them, biases 0), where its PyTorch port takes torch's defaults; there is no logit of the mask itself, which is
    never an answer.

    Example:
        >>> model = MaskGITTransformer2DModel.from_preset("MaskGIT-S", num_classes=10)
        >>> tokens = torch.full((2, 16, 16), model.mask_token)
        >>> model(tokens, None, torch.tensor([3, 7])).sample.shape
        torch.Size([2, 1024, 16, 16])
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        f"MaskGIT-{size}": {**options, **_OBJECTIVE} for size, options in _SIZES.items()
    }
    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["MaskGITTransformerBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["MaskGITTransformerBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["embed", "norm", "proj_in", "proj_out", "logit_bias"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 16,
        codebook_size: int = 1024,
        num_layers: int = 24,
        num_attention_heads: int = 16,
        attention_head_dim: int = 48,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        dropout: float = 0.1,
        objective: str = "masked_tokens",
        prediction_type: str = "logits",
        autoencoder: dict[str, Any] | None = None,
        id2label: dict[str, Any] | None = None,
        class_counts: dict[str, int] | None = None,
    ):
        super().__init__()
        self.token_grid = _height_and_width(sample_size)
        _check_options(codebook_size, prediction_type, class_dropout_prob=class_dropout_prob, dropout=dropout)
        self.hidden_size, self.num_layers = num_attention_heads * attention_head_dim, num_layers
        self.gradient_checkpointing = False
        positions, vocabulary = self.token_grid[0] * self.token_grid[1] + 1, codebook_size + 1 + num_classes + 1
        hidden_size = self.hidden_size

        self.token_embedder = nn.Embedding(vocabulary, hidden_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, hidden_size))
        self.proj_in = nn.Sequential(
            nn.LayerNorm(hidden_size, eps=OUTER_NORM_EPS),
            nn.Dropout(dropout),
            nn.Linear(hidden_size, hidden_size),
            nn.GELU(),
            nn.LayerNorm(hidden_size, eps=OUTER_NORM_EPS),
            nn.Dropout(dropout),
            nn.Linear(hidden_size, hidden_size),
        )
        self.transformer_blocks = nn.ModuleList(
            MaskGITTransformerBlock(num_attention_heads, attention_head_dim, mlp_ratio=mlp_ratio, dropout=dropout)
            for _ in range(num_layers)
        )
        self.proj_out = nn.Sequential(
            nn.LayerNorm(hidden_size, eps=OUTER_NORM_EPS),
            nn.Dropout(dropout),
            nn.Linear(hidden_size, hidden_size),
            nn.GELU(),
            nn.LayerNorm(hidden_size, eps=OUTER_NORM_EPS),
        )
        # For every position and every row of the table, as published; those of tokens alone are ever read.
        self.logit_bias = nn.Parameter(torch.zeros(positions, vocabulary))
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02, a=-0.04, b=0.04)

    @property
    def mask_token(self) -> int:
        """The token that means "not known yet"."""
        return self.config.codebook_size

    def label_tables(self) -> dict[str, tuple[int, int]]:
        """The classes stand behind tokens and mask."""
        first = self.config.codebook_size + 1
        return {"token_embedder.weight": (0, first), "logit_bias": (1, first)}

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None,
        class_labels: Tensor,
        *,
        drop_labels: Tensor | None = None,
        hidden_layers: tuple[int, ...] = (),
        return_dict: bool = True,
    ) -> BackboneOutput | tuple[Tensor, dict[int, Tensor]]:
        """Logits (B, K, h, w) of the K tokens at every position, masked or not.

        Args:
            hidden_states: tokens (B, h, w), integers in 0 .. K, where K is the mask.
            timestep: not used; how much is masked is there to see.
            class_labels: (B,) integers, 0 .. num_classes, where num_classes is the null class.
            drop_labels: (B,) bool, True where the label becomes the null class; without it, and in training only,
                drawn once per call from the global generator with `class_dropout_prob`.
            hidden_layers: blocks, counted from 1, whose output (B, h * w, D) is given back as well.

        Raises:
            ValueError: for shapes that do not fit, and tokens or labels out of range (looked at on the CPU only:
                reading them on an accelerator would stall it).
        """
        self._check_inputs(hidden_states, class_labels, drop_labels)
        codebook_size, count = self.config.codebook_size, self.token_grid[0] * self.token_grid[1]
        if drop_labels is None and self.training and self.config.class_dropout_prob > 0:
            chances = torch.rand(class_labels.shape, device=class_labels.device)
            drop_labels = chances < self.config.class_dropout_prob
        if drop_labels is not None:
            class_labels = class_labels.masked_fill(drop_labels, self.null_class)
        sequence = torch.cat([hidden_states.flatten(1), class_labels[:, None] + codebook_size + 1], dim=1)
        states = self.proj_in(self.token_embedder(sequence) + self.pos_embed)
        kept: dict[int, Tensor] = {}
        for number, block in enumerate(self.transformer_blocks, start=1):
            states = self._gradient_checkpointing_func(block, states) if self.recomputes(number) else block(states)
            if number in hidden_layers:
                kept[number] = states[:, :count]
        logits = F.linear(self.proj_out(states[:, :count]), self.token_embedder.weight[:codebook_size])
        logits = logits + self.logit_bias[:count, :codebook_size]
        output = logits.transpose(1, 2).unflatten(2, self.token_grid)
        return BackboneOutput(sample=output, hidden_states=kept) if return_dict else (output, kept)

    def _check_inputs(self, tokens: Tensor, class_labels: Tensor, drop_labels: Tensor | None) -> None:
        if tokens.ndim != 3 or tuple(tokens.shape[1:]) != self.token_grid or tokens.is_floating_point():
            raise ValueError(
                f"This transformer takes tokens of shape (batch, {', '.join(map(str, self.token_grid))}), integers; "
                f"got {tuple(tokens.shape)} of {tokens.dtype}. Check that the autoencoder and the resolution are "
                "those it was trained with, or build it with another `sample_size`."
            )
        for name, value in (("class_labels", class_labels), ("drop_labels", drop_labels)):
            if value is not None and tuple(value.shape) != (tokens.shape[0],):
                raise ValueError(f"`{name}` must have shape ({tokens.shape[0]},), one per sample; got {value.shape}.")
        for name, value, most, last in (
            ("Tokens", tokens, self.mask_token, "the mask"),
            ("`class_labels`", class_labels, self.null_class, "the null class"),
        ):
            if value.device.type == "cpu" and value.numel() and not torch.compiler.is_compiling():
                low, high = value.aminmax()
                if low < 0 or high > most:
                    raise ValueError(
                        f"{name} must lie in 0 .. {most} ({most} is {last}); got {int(low)} .. {int(high)}. Check "
                        "that the data and the autoencoder are those the model is for."
                    )


def _height_and_width(sample_size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    if height < 1 or width < 1:
        raise ValueError(f"`sample_size` is a number of tokens and must be at least 1; got {height}x{width}.")
    return height, width


def _check_options(codebook_size: int, prediction_type: str, **probabilities: float) -> None:
    if codebook_size < 1:
        raise ValueError(f"`codebook_size` must be at least 1; got {codebook_size}.")
    if prediction_type != "logits":
        raise ValueError(
            f"`prediction_type` must be 'logits', which is what this model gives; got {prediction_type!r}."
        )
    for name, value in probabilities.items():
        if not 0 <= value < 1:
            raise ValueError(f"`{name}` must lie in [0, 1); got {value}.")
