"""Preference alignment for generative models: diffusers-style pipelines, TRL-style trainers, one preference core.

    from mmalign import SmPOPipeline

    pipe = SmPOPipeline.from_pretrained("playground")
    pipe.align("playground", output_dir="runs/smpo", max_steps=200)

Names are imported when they are first used, so that `import mmalign` loads neither diffusers nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mmalign import losses as losses
    from mmalign.pipelines.image.diffusion_npo import DiffusionNPOConfig as DiffusionNPOConfig
    from mmalign.pipelines.image.diffusion_npo import DiffusionNPOPipeline as DiffusionNPOPipeline
    from mmalign.pipelines.image.diffusion_npo import DiffusionNPOTrainer as DiffusionNPOTrainer
    from mmalign.pipelines.image.dpo import DiffusionDPOConfig as DiffusionDPOConfig
    from mmalign.pipelines.image.dpo import DiffusionDPOPipeline as DiffusionDPOPipeline
    from mmalign.pipelines.image.dpo import DiffusionDPOTrainer as DiffusionDPOTrainer
    from mmalign.pipelines.image.inpo import InPOConfig as InPOConfig
    from mmalign.pipelines.image.inpo import InPOPipeline as InPOPipeline
    from mmalign.pipelines.image.inpo import InPOTrainer as InPOTrainer
    from mmalign.pipelines.image.longalign import LongAlignConfig as LongAlignConfig
    from mmalign.pipelines.image.longalign import LongAlignPipeline as LongAlignPipeline
    from mmalign.pipelines.image.longalign import LongAlignTrainer as LongAlignTrainer
    from mmalign.pipelines.image.ppd import PPDConfig as PPDConfig
    from mmalign.pipelines.image.ppd import PPDPipeline as PPDPipeline
    from mmalign.pipelines.image.ppd import PPDTrainer as PPDTrainer
    from mmalign.pipelines.image.self_npo import SelfNPOConfig as SelfNPOConfig
    from mmalign.pipelines.image.self_npo import SelfNPOPipeline as SelfNPOPipeline
    from mmalign.pipelines.image.self_npo import SelfNPOTrainer as SelfNPOTrainer
    from mmalign.pipelines.image.sft import DiffusionSFTConfig as DiffusionSFTConfig
    from mmalign.pipelines.image.sft import DiffusionSFTPipeline as DiffusionSFTPipeline
    from mmalign.pipelines.image.sft import DiffusionSFTTrainer as DiffusionSFTTrainer
    from mmalign.pipelines.image.smpo import SmPOConfig as SmPOConfig
    from mmalign.pipelines.image.smpo import SmPOPipeline as SmPOPipeline
    from mmalign.pipelines.image.smpo import SmPOTrainer as SmPOTrainer
    from mmalign.pipelines.video.rrpo import RRPOConfig as RRPOConfig
    from mmalign.pipelines.video.rrpo import RRPOPipeline as RRPOPipeline
    from mmalign.pipelines.video.rrpo import RRPOTrainer as RRPOTrainer
    from mmalign.pipelines.vision.lfm2_vl import LFM2VLConfig as LFM2VLConfig
    from mmalign.pipelines.vision.lfm2_vl import LFM2VLPipeline as LFM2VLPipeline
    from mmalign.pipelines.vision.lfm2_vl import LFM2VLTrainer as LFM2VLTrainer

_HOME = {
    **{f"DiffusionDPO{part}": "mmalign.pipelines.image.dpo" for part in ("Config", "Pipeline", "Trainer")},
    **{f"DiffusionNPO{part}": "mmalign.pipelines.image.diffusion_npo" for part in ("Config", "Pipeline", "Trainer")},
    **{f"DiffusionSFT{part}": "mmalign.pipelines.image.sft" for part in ("Config", "Pipeline", "Trainer")},
    **{f"InPO{part}": "mmalign.pipelines.image.inpo" for part in ("Config", "Pipeline", "Trainer")},
    **{f"LFM2VL{part}": "mmalign.pipelines.vision.lfm2_vl" for part in ("Config", "Pipeline", "Trainer")},
    **{f"LongAlign{part}": "mmalign.pipelines.image.longalign" for part in ("Config", "Pipeline", "Trainer")},
    **{f"PPD{part}": "mmalign.pipelines.image.ppd" for part in ("Config", "Pipeline", "Trainer")},
    **{f"RRPO{part}": "mmalign.pipelines.video.rrpo" for part in ("Config", "Pipeline", "Trainer")},
    **{f"SelfNPO{part}": "mmalign.pipelines.image.self_npo" for part in ("Config", "Pipeline", "Trainer")},
    **{f"SmPO{part}": "mmalign.pipelines.image.smpo" for part in ("Config", "Pipeline", "Trainer")},
}

__all__ = sorted([*_HOME, "losses"], key=str.casefold)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("mmalign.losses")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mmalign' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
