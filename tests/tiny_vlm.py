"""Tiny random models that see, with their families' own processors, made offline and the same for every run of a seed.

`from tiny_vlm import tiny_vlm` with `tests` on sys.path. KINDS see, TEXT_KINDS only read: their processor is a tokenizer. Each has some
fifty thousand parameters, a hidden width of 32, a byte-level vocabulary of about 400 tokens, and a tile or frame of 16×16 pixels (of
LFM2-VL 32×32). VIDEO_KINDS watch clips too. Padding is token 0 everywhere, as in LFM2.

"smolvlm" skips the test where num2words, which its processor imports, is missing. picture() and clip() are noise to show them.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.data.answer_records import Picture, VideoClip

VIDEO_KINDS = ("llava_onevision", "llava_next_video", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl")
KINDS = ("lfm2_vl", *VIDEO_KINDS)
TEXT_KINDS = ("lfm2", "lfm2_moe")
WIDTH, SIDE, PATCH = 32, 16, 4
# Whether the chat template tells which characters are the model's own.
MARKED = ("lfm2", "qwen2_5_vl", "internvl")
_CORPUS = (
    "What is in the picture? A red bag on a blue background.",
    "Which way does the shirt move? It moves to the left, then to the right, and stops.",
    "The colour of the dress is green; the sneaker is black and white.",
    "system user assistant Frame from seconds You are a helpful assistant. Is there a bag? Yes. No.",
)
_START, _END = "<|im_start|>", "<|im_end|>"
_VISION = {"hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
_SIDES = {"height": SIDE, "width": SIDE}
_PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


@cache
def tiny_vlm(kind: str, seed: int = 0) -> tuple[Any, Any]:
    """The family's model, in eval mode, and its processor (a tokenizer for TEXT_KINDS); shared: copy before you change it."""
    if kind not in KINDS + TEXT_KINDS:
        raise ValueError(f"kind must be one of {KINDS + TEXT_KINDS}, got {kind!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = globals()[f"_{kind}"]()
        # Biases, newlines and position tables start at 0 in some families, where a test would not see them used.
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return model.eval(), processor


def picture(width: int = 40, height: int = 24, seed: int = 0) -> Picture:
    """Coloured noise."""
    values = np.random.default_rng((seed, width, height)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Picture(Image.fromarray(values))


def clip(frames: int = 4, seed: int = 0) -> VideoClip:
    """Every fourth frame, of 24×20 pixels, of a video of 8 frames a second."""
    images = tuple(picture(24, 20, 1000 * (seed + 1) + frame).image for frame in range(frames))
    return VideoClip(images, tuple(range(0, 4 * frames, 4)), frames_per_second=8.0, total_frames=4 * frames)


def chatml(media: dict[str, str], marks: bool, bos: bool = False) -> str:
    """A ChatML template; media: a part's type → its placeholder. marks: around what the assistant says, as {% generation %} does."""
    parts = "".join(f"{{%- elif part['type'] == '{kind}' -%}}{{{{- '{token}' -}}}}" for kind, token in media.items())
    text = (
        "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
        "{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{- part['text'] -}}"
        f"{parts}{{%- endif -%}}{{%- endfor -%}}{{%- endif -%}}{{{{- '{_END}' -}}}}"
    )
    said = f"{{%- if message['role'] == 'assistant' -%}}{{% generation %}}{text}{{% endgeneration %}}{{%- else -%}}"
    return (
        ("{{- bos_token -}}" if bos else "")
        + f"{{%- for message in messages -%}}{{{{- '{_START}' + message['role'] + '\\n' -}}}}"
        + (f"{said}{text}{{%- endif -%}}" if marks else text)
        + "{{- '\\n' -}}{%- endfor -%}"
        + f"{{%- if add_generation_prompt -%}}{{{{- '{_START}assistant\\n' -}}}}{{%- endif -%}}"
    )


def tiny_tokenizer(special: tuple[str, ...] = (), names: dict[str, str] | None = None, end: str = _END) -> Any:
    """A byte-level tokenizer of some 400 tokens: pad 0, start 1, the turns' marks, then `special`; names: an attribute → its token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    first = ["<|pad|>", "<|startoftext|>", "<|endoftext|>", _START, _END]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    specials = [*first, *(token for token in special if token not in first)]
    trainer = trainers.BpeTrainer(
        vocab_size=220 + 256 + len(specials),
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=first[0],
        bos_token=first[1],
        eos_token=end,
        extra_special_tokens=names or {},
    )


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    common = {"vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    return {**common, **heads, **ids, **more}


def _lfm2_text(tokenizer: Any) -> dict[str, Any]:
    kinds = ["conv", "full_attention", "conv"]
    return _text(tokenizer, num_hidden_layers=3, layer_types=kinds, block_multiple_of=2, tie_word_embeddings=True)


def _lfm2() -> tuple[Any, Any]:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chatml({}, marks=True, bos=True)
    return Lfm2ForCausalLM(Lfm2Config(**_lfm2_text(tokenizer))), tokenizer


def _lfm2_moe() -> tuple[Any, Any]:
    from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chatml({}, marks=False, bos=True)
    text = {key: value for key, value in _lfm2_text(tokenizer).items() if key != "block_multiple_of"}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "num_dense_layers": 1, "moe_intermediate_size": 16}
    return Lfm2MoeForCausalLM(Lfm2MoeConfig(**text, **experts)), tokenizer


def _lfm2_vl() -> tuple[Any, Any]:
    from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration, Lfm2VlImageProcessor, Lfm2VlProcessor

    names = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
    }
    tiles = tuple(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5))
    tokenizer = tiny_tokenizer((*names.values(), *tiles), names)
    images = Lfm2VlImageProcessor(
        encoder_patch_size=PATCH, tile_size=32, min_image_tokens=4, max_image_tokens=16, min_tiles=2, max_tiles=4
    )
    template = chatml({"image": "<image>"}, marks=False, bos=True)
    processor = Lfm2VlProcessor(images, tokenizer, chat_template=template)
    config = Lfm2VlConfig(
        vision_config={
            **_VISION,
            "model_type": "siglip2_vision_model",
            "patch_size": PATCH,
            "num_patches": 16,
            "vision_use_head": False,
        },
        text_config={**_lfm2_text(tokenizer), "model_type": "lfm2"},
        image_token_id=processor.image_token_id,
        projector_hidden_size=WIDTH,
    )
    return Lfm2VlForConditionalGeneration(config), processor


def _llava_onevision() -> tuple[Any, Any]:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    tokenizer = tiny_tokenizer(("<image>", "<video>"))
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=_SIDES, image_grid_pinpoints=_PINPOINTS),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=_SIDES),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=chatml({"image": "<image>", "video": "<video>"}, marks=False),
    )
    siglip = {"model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": PATCH, "vision_use_head": False}
    config = LlavaOnevisionConfig(
        vision_config={**_VISION, **siglip},
        text_config={**_text(tokenizer), "model_type": "qwen2"},
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=_PINPOINTS,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def _llava_next_video() -> tuple[Any, Any]:
    from transformers import (
        LlavaNextImageProcessor,
        LlavaNextVideoConfig,
        LlavaNextVideoForConditionalGeneration,
        LlavaNextVideoProcessor,
        LlavaNextVideoVideoProcessor,
    )

    # The form of Vicuna: nothing but words between the turns, and no token at their end.
    template = (
        "{%- for message in messages -%}{%- if message['role'] != 'system' -%}{{- message['role'].upper() + ':' -}}"
        "{%- endif -%}{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{- ' ' + part['text'] -}}"
        "{%- else -%}{{- ' <' + part['type'] + '>' -}}{%- endif -%}{%- endfor -%}{{- ' ' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
    )
    tokenizer = tiny_tokenizer(("<image>", "<video>"), end="<|endoftext|>")
    crop = {"size": {"shortest_edge": SIDE}, "crop_size": _SIDES}
    processor = LlavaNextVideoProcessor(
        LlavaNextVideoVideoProcessor(**crop),
        LlavaNextImageProcessor(**crop, image_grid_pinpoints=_PINPOINTS),
        tokenizer,
        chat_template=template,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    clip = {"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": PATCH}
    config = LlavaNextVideoConfig(
        vision_config={**_VISION, **clip},
        text_config={**_text(tokenizer), "model_type": "llama"},
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_layer=-1,
        image_seq_length=(SIDE // PATCH) ** 2,
        video_seq_length=(SIDE // PATCH) ** 2 // 4,
    )
    return LlavaNextVideoForConditionalGeneration(config), processor


def _qwen_parts(tokenizer: Any, videos: Any, marks: bool) -> dict[str, Any]:
    from transformers import Qwen2VLImageProcessor

    patches = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    media = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")}
    return {
        "image_processor": Qwen2VLImageProcessor(**patches, size={"shortest_edge": 8**2, "longest_edge": 32**2}),
        "tokenizer": tokenizer,
        # Of a clip Qwen3-VL counts the pixels of all frames, Qwen2.5-VL those of one.
        "video_processor": videos(
            **patches, size={"shortest_edge": 8**2, "longest_edge": 8 * 16**2}, cap_pixels_per_frame=True
        ),
        "chat_template": chatml(media, marks=marks),
    }


def _qwen_config(processor: Any, vision: dict[str, Any], text: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in {
            "image": "image_pad",
            "video": "video_pad",
            "vision_start": "vision_start",
            "vision_end": "vision_end",
        }.items()
    }
    tower = {"depth": 2, "hidden_size": WIDTH, "intermediate_size": 37, "num_heads": 2, "out_hidden_size": WIDTH}
    grid = {"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], **rope}
    return {
        "vision_config": {**tower, **grid, **vision},
        "text_config": _text(tokenizer, rope_parameters=rope, **text),
        **ids,
    }


_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _qwen2_5_vl() -> tuple[Any, Any]:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
    )

    processor = Qwen2_5_VLProcessor(**_qwen_parts(tiny_tokenizer(_QWEN_TOKENS), Qwen2VLVideoProcessor, marks=True))
    vision = {"window_size": 16, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**_qwen_config(processor, vision, {}, {}))), processor


def _qwen3_vl() -> tuple[Any, Any]:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor

    processor = Qwen3VLProcessor(**_qwen_parts(tiny_tokenizer(_QWEN_TOKENS), Qwen3VLVideoProcessor, marks=False))
    vision = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = _qwen_config(processor, vision, {"head_dim": 8}, {"mrope_interleaved": True})
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config)), processor


def _smolvlm() -> tuple[Any, Any]:
    pytest.importorskip("num2words")
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    names = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        "video_token": "<video>",
    }
    tiles = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
    tokenizer = tiny_tokenizer((*names.values(), *tiles), names, end="<end_of_utterance>")
    tile = {"longest_edge": SIDE}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(size={"longest_edge": 2 * SIDE}, max_image_size=tile),
        tokenizer,
        SmolVLMVideoProcessor(size=tile, max_image_size=tile, num_frames=8, fps=1),
        image_seq_len=(SIDE // PATCH // 2) ** 2,
        chat_template=DEFAULT_CHAT_TEMPLATE,
    )
    config = SmolVLMConfig(
        vision_config={**_VISION, "image_size": SIDE, "patch_size": PATCH},
        text_config={**_text(tokenizer), "model_type": "llama"},
        image_token_id=processor.image_token_id,
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return SmolVLMForConditionalGeneration(config), processor


def _internvl() -> tuple[Any, Any]:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = tiny_tokenizer(tuple(names.values()), names)
    length = (SIDE // PATCH // 2) ** 2
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=_SIDES, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(size=_SIDES),
        image_seq_length=length,
        chat_template=chatml({"image": "<IMG_CONTEXT>\n", "video": "<video>\n"}, marks=True),
    )
    config = InternVLConfig(
        vision_config={**_VISION, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], "use_mean_pooling": False},
        text_config={**_text(tokenizer), "model_type": "qwen2"},
        image_token_id=processor.image_token_id,
        image_seq_length=length,
    )
    return InternVLForConditionalGeneration(config), processor
