"""Tiny random diffusers pipelines in the published layout, made offline and the same for every run of a seed.

`from tiny import tiny_pipeline, save_tiny` with `tests` on sys.path. Kinds: "sd" (ε, PNDM, as Stable Diffusion 1.5),
"sd-v" (v-prediction, DDIM, as 2.1), "sdxl" (both CLIPs, Euler). Images are 16×16, latents (4, 8, 8).
"""

from pathlib import Path
from typing import Any

import torch

KINDS = ("sd", "sd-v", "sdxl")
IMAGE_SIZE = 16
WORDS = ("red", "blue", "green", "black", "white", "a", "on", "sneaker", "bag", "shirt", "dress", "background")
WIDTH, MAX_LENGTH = 16, 77


def tiny_pipeline(kind: str = "sd", seed: int = 0) -> Any:
    """A StableDiffusionPipeline or StableDiffusionXLPipeline with under half a million random parameters."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = _sdxl() if kind == "sdxl" else _sd(velocity=kind == "sd-v")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_tiny(kind: str, folder: str | Path, seed: int = 0) -> Path:
    """Write tiny_pipeline(kind, seed) in diffusers layout and return the folder."""
    tiny_pipeline(kind, seed).save_pretrained(folder)
    return Path(folder)


def tiny_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """A CLIP tokenizer with the byte alphabet and one token for each of WORDS; anything else is spelled out."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair, joined = (pieces[0], pieces[1]), pieces[0] + pieces[1]
            if joined not in tokens:
                merges.append(pair)
                tokens.append(joined)
            pieces[:2] = [joined]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=MAX_LENGTH)


def _text_config(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vae(scaling_factor: float) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
        scaling_factor=scaling_factor,
    ).eval()


def _unet(**extra: Any) -> Any:
    from diffusers import UNet2DConditionModel

    options: dict[str, Any] = dict(
        sample_size=IMAGE_SIZE // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return UNet2DConditionModel(**(options | extra)).eval()


_BETAS: dict[str, Any] = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def _sd(velocity: bool) -> Any:
    from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    tokenizer = tiny_tokenizer()
    if velocity:
        scheduler = DDIMScheduler(**_BETAS, prediction_type="v_prediction", set_alpha_to_one=False, clip_sample=False)
    else:
        scheduler = PNDMScheduler(**_BETAS, skip_prk_steps=True, set_alpha_to_one=False)
    return StableDiffusionPipeline(
        vae=_vae(0.18215),
        text_encoder=CLIPTextModel(_text_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        unet=_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    # As published: the second tokenizer pads with "!" instead of the end token.
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
    time_width = 4
    unet = _unet(
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 1),
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=WIDTH + 6 * time_width,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(0.13025),
        text_encoder=CLIPTextModel(_text_config(tokenizer)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer_2)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
