"""Tiny random diffusers pipelines in the published layout, made offline and the same for every run of a seed.

`from tiny import tiny_pipeline, save_tiny` with `tests` on sys.path. Kinds: "sd" (ε, PNDM, as Stable Diffusion 1.5),
"sd-v" (v-prediction, DDIM, as 2.1), "sdxl" (both CLIPs, Euler), "sd3" (both CLIPs and T5, flow), "flux" (CLIP and T5, packed
latents, told its guidance as FLUX.1-dev is). Images are 16×16, latents (4, 8, 8). "cogvideox" (T5, rotary positions, v-prediction,
as CogVideoX-5b) draws clips of 9 such images, latents (4, 3, 4, 4); "wan" (UMT5, flow by UniPC, as Wan 2.1) clips of 5, latents
(4, 2, 4, 4), if asked for them: no config of Wan's names a size. "cascade" (CLIP, the prior of Stable Cascade) draws latents
(16, 2, 2) of pictures of 64×64 pixels, which no VAE decodes: it is in neither list below.
"""

from pathlib import Path
from typing import Any

import torch

PICTURE_KINDS = ("sd", "sd-v", "sdxl", "sd3", "flux")
KINDS = (*PICTURE_KINDS, "cogvideox", "wan")
IMAGE_SIZE, NUM_FRAMES = 16, 9
# What drawing and training must ask for besides the size of a picture.
ASKED: dict[str, dict[str, int]] = {"wan": {"num_frames": 5}}
WORDS = ("red", "blue", "green", "black", "white", "a", "on", "sneaker", "bag", "shirt", "dress", "background")
WIDTH, MAX_LENGTH = 16, 77


def tiny_pipeline(kind: str = "sd", seed: int = 0) -> Any:
    """The family's diffusers pipeline with under half a million random parameters."""
    others = {"sdxl": _sdxl, "sd3": _sd3, "flux": _flux, "cogvideox": _cogvideox, "wan": _wan, "cascade": _cascade}
    if kind not in (*KINDS, *others):
        raise ValueError(f"kind must be one of {(*KINDS, 'cascade')}, got {kind!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = others[kind]() if kind in others else _sd(kind == "sd-v")
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


def _t5(tokenizer: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=2 * WIDTH, d_kv=4, d_ff=32, num_layers=2, num_heads=2, dense_act_fn="gelu_new",
            is_gated_act=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()  # fmt: skip


def _t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((f"▁{word}", -2.0) for word in WORDS), ("▁", -3.0)]
    letters = [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,"]
    return T5Tokenizer(vocab=pieces + letters, extra_ids=0, model_max_length=512)


def _vae(scaling_factor: float, shift_factor: float | None = None) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
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


def _sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    tokenizer, tokenizer_2, tokenizer_3 = tiny_tokenizer(), tiny_tokenizer(pad_token="!"), _t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=IMAGE_SIZE // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=_started(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(1.5305, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(_text_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer_2)).eval(),
        tokenizer_2=tokenizer_2,
        text_encoder_3=_t5(tokenizer_3),
        tokenizer_3=tokenizer_3,
    )


def _flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    tokenizer, tokenizer_2 = tiny_tokenizer(), _t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        transformer=_started(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(_text_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=_t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
    )


def _cogvideox() -> Any:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline

    tokenizer = _t5_tokenizer()
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(4, 4, 8),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
        sample_height=IMAGE_SIZE,
        sample_width=IMAGE_SIZE,
        scaling_factor=0.7,
    )
    scheduler = CogVideoXDDIMScheduler(
        **_BETAS | {"steps_offset": 0},
        prediction_type="v_prediction",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5(tokenizer),
        vae=vae.eval(),
        transformer=cogvideox_transformer(),
        scheduler=scheduler,
    )


def cogvideox_transformer(**options: Any) -> Any:
    """The network of "cogvideox": as CogVideoX-5b's unless `options` say otherwise."""
    from diffusers import CogVideoXTransformer3DModel

    settings: dict[str, Any] = dict(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=2 * WIDTH,
        num_layers=1,
        sample_width=IMAGE_SIZE // 4,
        sample_height=IMAGE_SIZE // 4,
        sample_frames=NUM_FRAMES,
        use_rotary_positional_embeddings=True,
    )
    return _started(CogVideoXTransformer3DModel(**settings | options))


def _wan() -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = _t5_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer), d_model=2 * WIDTH, d_kv=4, d_ff=32, num_layers=2, num_heads=2,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[-0.8, 0.1, 1.0, -0.2],
        latents_std=[2.8, 1.4, 2.3, 0.9],
        scale_factor_spatial=4,
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=2 * WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=_started(transformer),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def _cascade() -> Any:
    from diffusers import DDPMWuerstchenScheduler, StableCascadePriorPipeline
    from transformers import CLIPTextModelWithProjection

    tokenizer = tiny_tokenizer()
    return StableCascadePriorPipeline(
        tokenizer=tokenizer,
        text_encoder=CLIPTextModelWithProjection(_text_config(tokenizer)).eval(),
        prior=_started(
            cascade_network(
                in_channels=16,
                out_channels=16,
                clip_text_in_channels=WIDTH,
                clip_image_in_channels=12,
                switch_level=[False],
            )
        ),
        scheduler=DDPMWuerstchenScheduler(),
    )


def cascade_network(**options: Any) -> Any:
    """A network of Stable Cascade: two levels with an attention each on the way down and up, dropout as published."""
    from diffusers.models import StableCascadeUNet

    settings: dict[str, Any] = dict(
        timestep_ratio_embedding_dim=8,
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_pooled_in_channels=WIDTH,
        dropout=(0.1, 0.1),
    )
    return StableCascadeUNet(**settings | options)


def cascade_decoder(seed: int = 0) -> Any:
    """What makes pictures of 128×128 from latents (16, 3, 3) of "cascade"."""
    from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
    from transformers import CLIPTextModelWithProjection

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = StableCascadeDecoderPipeline(
            decoder=_started(
                cascade_network(
                    in_channels=4,
                    out_channels=4,
                    patch_size=2,
                    effnet_in_channels=16,
                    pixel_mapper_in_channels=3,
                    timestep_conditioning_type=("sca",),
                )
            ),
            tokenizer=tokenizer,
            text_encoder=CLIPTextModelWithProjection(_text_config(tokenizer)).eval(),
            scheduler=DDPMWuerstchenScheduler(),
            vqgan=PaellaVQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=16).eval(),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def effnet_encoder(seed: int = 0) -> Any:
    """The encoder of "cascade", as large as the published one, its statistics those of random pictures."""
    from mmalign.denoisers.effnet_encoder import EffNetEncoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = EffNetEncoder()
        for part in encoder.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.momentum = 1.0
        with torch.no_grad():
            encoder.train()(2 * torch.rand(8, 3, 64, 64) - 1)
    return encoder.eval()


def save_cascade(folder: str | Path, seed: int = 0) -> Path:
    """`save_tiny("cascade", …)` with its encoder's file beside it, as published in float32: 80 MB."""
    from safetensors.torch import save_file

    place = save_tiny("cascade", folder, seed)
    save_file(effnet_encoder(seed).state_dict(), place / "effnet_encoder.safetensors")
    return place


def _started(transformer: Any) -> Any:
    """Away from the zeros at which these transformers start, so that every input shows in the output."""
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return transformer.eval()
