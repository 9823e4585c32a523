"""The text encoder: CLIP's causal transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sam3_runner.network.layers import Attention, FeedForward, LayerNorm, Linear

if TYPE_CHECKING:
    from torch import Tensor


class TextLayer(nn.Module):
    """Causal attention, then a feed-forward."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1, self.layer_norm2 = LayerNorm(width, eps=eps), LayerNorm(width, eps=eps)
        self.self_attn = Attention(width, config.num_attention_heads)
        self.mlp = FeedForward(width, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(T, L, C), with the bool mask (T, 1, L, L)."""
        query, key, value = self.self_attn.project(self.layer_norm1(x), 0, 3)
        x = x + self.self_attn.attend(query, key, value, mask).to(x.dtype)
        output: Tensor = x + self.mlp(self.layer_norm2(x)).to(x.dtype)
        return output


class TextTransformer(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings: Any = nn.Module()
        self.embeddings.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embeddings.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.encoder: Any = nn.Module()
        self.encoder.layers = nn.ModuleList(TextLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        """(T, L, C) fp32 of ids (T, L) int64; `valid` (T, L) is False for padding."""
        length = ids.shape[1]
        positions = self.embeddings.position_embedding.weight[:length]
        x = self.embeddings.token_embedding(ids) + positions
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        mask = causal & valid[:, None, None, :]
        for layer in self.encoder.layers:
            x = layer(x, mask)
        output: Tensor = self.final_layer_norm(x)
        return output


class TextEncoder(nn.Module):
    """The transformer, and CLIP's own projection, which every checkpoint has and nothing reads."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.text_model = TextTransformer(config)
        self.text_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        """See `TextTransformer`."""
        output: Tensor = self.text_model(ids, valid)
        return output
