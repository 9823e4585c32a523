"""The demo checkpoint's architecture: SAM 3's modules, small enough for a CPU and for the repository."""

from __future__ import annotations

from transformers import Sam3Config

from sam3_runner.prompts import CONTEXT_TOKENS

SIDE_PX = 336
_WIDTH = 64
"""Of the neck, the fusion encoder, the decoder and the masks: SAM 3 adds their outputs to each other."""


def demo_config() -> Sam3Config:
    """The configuration of the demo checkpoint.

    Nearly all weights are in the vision encoder, which runs once per image. The modules that run once per
    prompt are narrow. The vocabulary is CLIP's, so that prompts have the same limits as with SAM 3.
    """
    narrow = {"hidden_size": _WIDTH, "num_attention_heads": 4, "intermediate_size": 256, "dropout": 0.0}
    return Sam3Config(
        vision_config={
            "fpn_hidden_size": _WIDTH,
            "backbone_feature_sizes": [[96, 96], [48, 48], [24, 24]],
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": 192,
                "intermediate_size": 384,
                "num_hidden_layers": 8,
                "num_attention_heads": 4,
                "image_size": SIDE_PX,
                "pretrain_image_size": SIDE_PX,
                "patch_size": 14,
                "window_size": 12,
                "global_attn_indexes": [3, 7],
            },
        },
        text_config={
            "model_type": "clip_text_model",
            "vocab_size": 49408,
            "hidden_size": 32,
            "intermediate_size": 64,
            "projection_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": CONTEXT_TOKENS,
            "hidden_act": "gelu",
        },
        geometry_encoder_config=narrow | {"num_layers": 1, "roi_size": 1},
        detr_encoder_config=narrow | {"num_layers": 1},
        detr_decoder_config=narrow | {"num_layers": 3, "num_queries": 24},
        mask_decoder_config={"hidden_size": _WIDTH, "num_upsampling_stages": 2, "num_attention_heads": 4},
    )
