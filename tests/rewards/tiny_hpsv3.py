"""A small HPSv3 in the published layout: weights as its authors save them, a folder as Qwen2-VL's, and a wheel as theirs."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

from rewards.reference import Weights, random_weights
from safetensors.torch import save_file

WIDTH, HEADS, LAYERS, INNER = 32, 2, 2, 48
SEEN, SEEN_HEADS, DEPTH, PATCH = 16, 2, 2, 14
SIGNS = "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()
# Bytes, then signs, then <|Reward|>.
WORDS = 256 + len(SIGNS) + 1
INSTRUCTION = "\nHow good is it, from 0 to 10? \nAsked for - {text_prompt}\n\n"
QUESTION = "\nMarks: <|Reward|>\n\nEND\n"
SOURCE = f"import qwen_that_is_not_there\n\nINSTRUCTION = {INSTRUCTION!r}\nOTHER = ''\n\nprompt_with_special_token = {QUESTION!r}\n"
SOURCE_HASH = hashlib.sha256(SOURCE.encode()).hexdigest()
CHAT = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{% for part in turn['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _shapes() -> dict[str, tuple[int, ...]]:
    """The names in HPSv3.safetensors, at small sizes."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (WORDS, WIDTH),
        "model.norm.weight": (WIDTH,),
        # In the file, though the reward does not use it.
        "lm_head.weight": (WORDS, WIDTH),
        "visual.patch_embed.proj.weight": (SEEN, 3, 2, PATCH, PATCH),
    }
    key = WIDTH // HEADS
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.input_layernorm.weight": (WIDTH,), f"{block}.post_attention_layernorm.weight": (WIDTH,)}
        for name, size in {"q": WIDTH, "k": key, "v": key}.items():
            shapes |= {f"{block}.self_attn.{name}_proj.weight": (size, WIDTH)}
            shapes |= {f"{block}.self_attn.{name}_proj.bias": (size,)}
        shapes |= {f"{block}.self_attn.o_proj.weight": (WIDTH, WIDTH), f"{block}.mlp.down_proj.weight": (WIDTH, INNER)}
        shapes |= {f"{block}.mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
    linear = {"visual.merger.mlp.0": (4 * SEEN, 4 * SEEN), "visual.merger.mlp.2": (WIDTH, 4 * SEEN)}
    linear |= {"visual.merger.ln_q": (SEEN,), "rm_head.0": (12, WIDTH), "rm_head.3": (6, 12), "rm_head.5": (2, 6)}
    for layer in range(DEPTH):
        block = f"visual.blocks.{layer}"
        linear |= {f"{block}.norm1": (SEEN,), f"{block}.norm2": (SEEN,)}
        linear |= {f"{block}.attn.qkv": (3 * SEEN, SEEN), f"{block}.attn.proj": (SEEN, SEEN)}
        linear |= {f"{block}.mlp.fc1": (2 * SEEN, SEEN), f"{block}.mlp.fc2": (SEEN, 2 * SEEN)}
    for name, size in linear.items():
        shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    return shapes


def hpsv3_weights() -> Weights:
    return random_weights(dict(sorted(_shapes().items())))


def write_hpsv3(folder: Path, weights: Weights) -> Path:
    """HPSv3.safetensors with the wheel beside it; the file's path."""
    with zipfile.ZipFile(folder / "hpsv3-1.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("hpsv3/dataset/data_collator_qwen.py", SOURCE)
    save_file(weights, folder / "HPSv3.safetensors")
    return folder / "HPSv3.safetensors"


def write_base(folder: Path) -> Path:
    """What Qwen/Qwen2-VL-7B-Instruct has but its weights: an older, flat config, a tokenizer of bytes, preprocessing."""
    from tokenizers.pre_tokenizers import ByteLevel

    signs = {f"<|{name}|>": 256 + place for place, name in enumerate(SIGNS)}
    ids = {name: signs[f"<|{name}|>"] for name in SIGNS}
    config: dict[str, Any] = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "bos_token_id": ids["endoftext"],
        "eos_token_id": ids["im_end"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": LAYERS,
        # More than the tokenizer knows, as in the published one.
        "vocab_size": WORDS + 40,
        "vision_config": {
            "depth": DEPTH,
            "embed_dim": SEEN,
            "hidden_size": WIDTH,
            "in_chans": 3,
            "mlp_ratio": 2,
            "num_heads": SEEN_HEADS,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "spatial_patch_size": PATCH,
            "temporal_patch_size": 2,
        },
    }
    preprocessing = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    added = {
        str(place): {"content": sign, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        for sign, place in signs.items()
    }  # fmt: skip
    tokenizer = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "additional_special_tokens": [sign for sign in signs if sign != "<|endoftext|>"],
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "model_max_length": 32768,
        "chat_template": CHAT,
    }
    vocabulary = {letter: place for place, letter in enumerate(sorted(ByteLevel.alphabet()))}
    for name, content in {
        "config.json": config,
        "preprocessor_config.json": preprocessing,
        "tokenizer_config.json": tokenizer,
        "chat_template.json": {"chat_template": CHAT},
        "vocab.json": vocabulary,
    }.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder
