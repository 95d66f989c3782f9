"""What the prior of Stable Cascade learns to draw: a picture's features by EfficientNetV2-S, in 16 channels."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmalign.files import absence_explained

FILE = "effnet_encoder.safetensors"
# Where it was published, beside the decoder; the prior lies in a repository of its own.
REPOSITORY = "stabilityai/stable-cascade"
# Pixels of one latent, in each direction.
PIXELS, CHANNELS = 32, 16
# ImageNet's, which the features were learned with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class EffNetEncoder(nn.Module):
    """EfficientNetV2-S's features (1280 channels), one linear map, and a normalisation that has no weights.

    Its weights have the names of the published file.
    """

    def __init__(self) -> None:
        from torchvision.models import efficientnet_v2_s

        super().__init__()
        self.backbone = efficientnet_v2_s().features
        self.mapper = nn.Sequential(
            nn.Conv2d(1280, CHANNELS, kernel_size=1, bias=False), nn.BatchNorm2d(CHANNELS, affine=False)
        )

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 16 h w"]:
        """Pixels in [−1, 1] to latents of about mean 0 and variance 1; there is nothing to scale."""
        from torchvision.transforms.functional import normalize

        return self.mapper(self.backbone(normalize(pixels / 2 + 0.5, _MEAN, _STD)))


def load_encoder(file: Path) -> EffNetEncoder:
    """The encoder with the weights of `file`, in float32, in eval mode, frozen; ValueError where they are not this network's."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with torch.device("meta"):
        encoder = EffNetEncoder()
    try:
        encoder.load_state_dict(load_file(file), assign=True)
    except (RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"{file} is not the encoder of Stable Cascade: {reason}. Take {FILE} of {REPOSITORY}"
        ) from error
    return encoder.float().eval().requires_grad_(False)


def find_encoder(name: str) -> Path:
    """The encoder's file for a prior loaded by `name`: in its folder or in decoder/ there; for one of the Hub, the published file."""
    folder = Path(name).expanduser()
    if name and not folder.exists() and name.count("/") == 1:
        from huggingface_hub import hf_hub_download

        remedy = (
            f"run `hf download {name} --local-dir FOLDER`, then the same for {REPOSITORY} {FILE}, and name that folder"
        )
        with absence_explained(remedy):
            return Path(hf_hub_download(REPOSITORY, FILE))
    places = [folder / FILE, folder / "decoder" / FILE] if name else []
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(
            f"pictures become latents by {FILE}, and {name or 'a pipeline that was not loaded from a folder'} has none: run "
            f"`hf download {REPOSITORY} {FILE} --local-dir {name or 'FOLDER'}`"
        )
    return found
