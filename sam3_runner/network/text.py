"""The text encoder: CLIP's causal transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias
from torch import nn

from sam3_runner.network.layers import Attention, Embedding, FeedForward, LayerNorm, Linear

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

    def forward(self, x: Tensor, add: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens x + add (T, L, C), and what is to be added to the result.

        Args:
            x: (T, L, C).
            add: what the layer before returned; None: nothing.
            mask: (T, 1, L, L), added to the attention's scores.
        """
        x, normed = self.layer_norm1.after_sum(x, add)
        query, key, value = self.self_attn.project(normed, 0, 3)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended = self.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        x, normed = self.layer_norm2.after_sum(x, attended.to(x.dtype))
        return x, self.mlp(normed).to(x.dtype)


class TextTransformer(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings: Any = nn.Module()
        self.embeddings.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.embeddings.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)
        self.encoder: Any = nn.Module()
        self.encoder.layers = nn.ModuleList(TextLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        """(T, L, C) of ids (T, L) int64; `valid` (T, L) is False for padding."""
        length = ids.shape[1]
        positions = self.embeddings.position_embedding.weight[:length]
        x = self.embeddings.token_embedding(ids) + positions
        add = None
        mask = self._mask(valid)
        for layer in self.encoder.layers:
            x, add = layer(x, add, mask)
        output: Tensor = self.final_layer_norm(x, add)
        return output

    def _mask(self, valid: Tensor) -> Tensor:
        """(T, 1, L, L), -inf for padding and for later tokens, in the dtype of the products."""
        length = valid.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
        dtype = self.encoder.layers[0].mlp.fc1.weight.dtype
        zeros = torch.zeros(len(valid), 1, length, length, dtype=dtype, device=valid.device)
        return zeros.masked_fill(~(causal & valid[:, None, None, :]), float("-inf"))


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
