"""`mmalign invert`: from pictures to their noise and back, with the error of the round trip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmalign.cli.models import ALIGNED, device_option, load_pipeline, model_options
from mmalign.cli.options import Command, Given, Option, UsageError, one_of, whole
from mmalign.files import staged, write_json

_MODEL, _WHAT, _HOW = "the model", "what is inverted", "the inversion"
VERB = Command(
    prog="mmalign invert",
    description="Inverts pictures to the noised latents from which the model would draw them, draws them again, and compares.",
    example='mmalign invert --model playground --image bag.png --prompt "a red bag on a blue background"',
    options=[
        *model_options(group=_MODEL, lora=True),
        device_option(_MODEL),
        Option(
            name="image", help="a picture; several may follow", metavar="FILE", many=True, required=True, group=_WHAT
        ),
        Option(name="prompt", help="its prompt; one for all, or one a picture", many=True, required=True, group=_WHAT),
        Option(name="output_dir", help="where the comparison goes", metavar="DIR", default="inversion", group=_WHAT),
        Option(
            name="num_steps", help="moves up to the last timestep", convert=whole, metavar="N", default=10, group=_HOW
        ),
        Option(
            name="renoise_steps",
            help="ReNoise corrections a move; 0 is plain DDIM inversion",
            convert=whole,
            metavar="N",
            default=1,
            group=_HOW,
        ),
        Option(
            name="combine",
            help="which predictions of a move count",
            convert=one_of("last", "mean", "mean_refined"),
            metavar="last|mean|mean_refined",
            default="mean",
            group=_HOW,
        ),
        Option(
            name="solver",
            help="integration scheme",
            convert=one_of("euler", "heun"),
            metavar="euler|heun",
            default="euler",
            group=_HOW,
        ),
        Option(
            name="timestep",
            help="how far up; none is the last timestep",
            convert=whole,
            metavar="N",
            group=_HOW,
            nullable=True,
        ),
    ],
    aliases=[ALIGNED],
)


def run(argv: Sequence[str]) -> int:
    """Inverts, writes `inversion.png` and `inversion.json`, and prints the errors."""
    given = VERB.read(argv)
    if given is None:
        return 0
    files = [Path(name).expanduser() for name in given["image"]]
    if len(given["prompt"]) not in (1, len(files)):
        raise UsageError(f"{len(files)} pictures need one prompt or {len(files)}, got {len(given['prompt'])}")
    prompts = given["prompt"] * (len(files) // len(given["prompt"]))
    rows = invert(given, files, prompts)
    print(f"{'picture':<32}{'latent RMSE':>12}{'latent PSNR':>13}{'pixel RMSE':>12}{'VAE alone':>11}")
    for row in rows:
        print(
            f"{Path(row['image']).name[:31]:<32}{row['latent_rmse']:>12.4f}{row['latent_psnr']:>10.1f} dB"
            f"{row['pixel_rmse']:>12.4f}{row['vae_pixel_rmse']:>11.4f}"
        )
    print(f"original | VAE alone | drawn again: {Path(given['output_dir']) / 'inversion.png'}")
    return 0


def invert(given: Given, files: list[Path], prompts: list[str]) -> list[dict[str, Any]]:
    """One row of errors a picture; pixel values count from 0 to 1."""
    import torch

    from mmalign import SmPOPipeline
    from mmalign.data.images import fit, to_pixels
    from mmalign.denoisers import adapter_for
    from mmalign.denoisers.parts import draws_clips
    from mmalign.evaluation import side_by_side
    from mmalign.evaluation.scorers import read_picture

    images = [read_picture(file) for file in files]
    pipe: Any = load_pipeline(given, SmPOPipeline, lora=given["lora"])
    if draws_clips(pipe):
        raise UsageError("this verb reads pictures; clips are inverted in Python, by pipe.invert([frames, …], prompt)")
    options = {name: given[name] for name in ("num_steps", "renoise_steps", "combine", "solver")}
    if given["solver"] == "heun" and "renoise_steps" not in given.explicit:
        options["renoise_steps"] = 0
    trip = pipe.invert(images, prompts, timestep=given["timestep"], **options)
    denoiser = adapter_for(pipe)
    pixels = torch.stack([to_pixels(fit(image, *denoiser.native_size)[0]) for image in images])
    alone = denoiser.decode(denoiser.encode_image(pixels)).cpu()
    again = denoiser.decode(trip.reconstruction).cpu()
    shown = [[_picture(part[i]) for part in (pixels, alone, again)] for i in range(len(images))]
    rows = [
        {
            "image": str(file),
            "prompt": prompt,
            "latent_rmse": float(trip.rmse[i]),
            "latent_psnr": float(trip.psnr[i]),
            "pixel_rmse": _rmse(again[i], pixels[i]),
            "vae_pixel_rmse": _rmse(alone[i], pixels[i]),
        }
        for i, (file, prompt) in enumerate(zip(files, prompts, strict=True))
    ]
    sheet = side_by_side(
        shown,
        [f"{p} (RMSE {r['pixel_rmse']:.3f})" for p, r in zip(prompts, rows, strict=True)],
        ["original", "VAE alone", "drawn again"],
    )
    settings = {**options, "timestep": given["timestep"], "model": given["model"], "lora": given["lora"]}
    with staged(Path(given["output_dir"])) as folder:
        sheet.save(folder / "inversion.png")
        write_json(folder / "inversion.json", {"settings": settings, "pictures": rows})
    return rows


def _picture(pixels: Any) -> Any:
    from PIL import Image

    shown = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(0, -1)
    return Image.fromarray(shown.numpy())


def _rmse(one: Any, other: Any) -> float:
    return float(((one.clamp(-1, 1) - other) / 2).square().mean().sqrt())
