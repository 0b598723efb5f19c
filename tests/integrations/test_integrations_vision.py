"""Vision-language models of transformers, patched: the loss and gradients of their own logits, image and all."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="these tests patch models of transformers")

import transformers
from tiny_models import CONFIG, B, V, assert_same, seen

from prefixloss.integrations.transformers import patch_model

# ids beyond those of text: an image's place, what may stand before and after it, a video's place
IMAGE, BEFORE, AFTER, VIDEO = range(V, V + 4)
PLACES = 4
TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": V + 4, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "initializer_range": 0.3}


def qwen() -> tuple[Any, dict[str, torch.Tensor]]:
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 1, "window_size": 16, "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=BEFORE, vision_end_token_id=AFTER,
    )  # fmt: skip
    # 4 x 4 patches of 4 x 4 pixels; 2 x 2 of them make one place
    image = {"pixel_values": torch.randn(16 * B, 3 * 16), "image_grid_thw": torch.tensor([[1, 4, 4]] * B)}
    return transformers.Qwen2_5_VLForConditionalGeneration(config), image


def gemma() -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.Gemma3Config(
        text_config={**TEXT, "sliding_window": 16, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
        vision_config={**VISION, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=PLACES, image_token_index=IMAGE, boi_token_index=BEFORE, eoi_token_index=AFTER,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config), {"pixel_values": torch.randn(B, 3, 16, 16)}


def llava() -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION, num_hidden_layers=2, image_size=8, patch_size=4),
        image_token_index=IMAGE,
    )
    return transformers.LlavaForConditionalGeneration(config), {"pixel_values": torch.randn(B, 3, 8, 8)}


@pytest.mark.parametrize("made", [qwen, gemma, llava])
def test_a_model_that_sees_an_image_has_the_gradient_of_its_own_logits(made: Any) -> None:
    torch.manual_seed(0)
    model, image = made()
    text = seen()
    shown = torch.tensor([[BEFORE, *[IMAGE] * PLACES, AFTER]] * B)
    ids = torch.cat([shown, text["input_ids"]], 1)
    attended = torch.cat([torch.ones_like(shown), text["attention_mask"]], 1)
    kinds = {"token_type_ids": (ids == IMAGE).long()} if made is gemma else {}
    kinds = {"mm_token_type_ids": (ids == IMAGE).long()} if made is qwen else kinds
    with patch_model(model, CONFIG):
        assert_same(model, None, input_ids=ids, attention_mask=attended, **kinds, **image)
