"""HPSv3 by mmalign against HPSv3 by its authors, on the published weights and the playground's pictures, in one run on a GPU.

    python benchmarks/hpsv3_parity.py --weights HPSv3.safetensors --theirs <python> [--device cuda] [--pairs 16]

--weights   the published file, with the wheel hpsv3-1.0.0-py3-none-any.whl beside it
--theirs    a Python in which the package hpsv3 is installed with what it pins (transformers 4.45.2), in an environment of its own

Prints every score, the largest difference in bfloat16, and how far bfloat16 is from our own float32. Pictures are scored one by
one: in bfloat16 a batch changes the last digits of either side.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch

from mmalign.data import load_pairs
from mmalign.files import write_json
from mmalign.rewards import scorer

THEIRS = """
import json, sys
from hpsv3 import HPSv3RewardInferencer
given = json.load(open(sys.argv[1]))
reward = HPSv3RewardInferencer(checkpoint_path=given["weights"], device=given["device"])
scores = [reward.reward([p], [t])[0][0].item() for p, t in zip(given["pictures"], given["prompts"])]
json.dump(scores, open(given["answer"], "w"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--theirs", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pairs", type=int, default=16)
    given = parser.parse_args()
    source = load_pairs("playground", split="test")
    rows = [source[row] for row in range(given.pairs)]
    images = [image for row in rows for image in (row.image_0, row.image_1)]
    prompts = [row.prompt for row in rows for _ in range(2)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / f"{index}.png" for index in range(len(images))]
        for image, path in zip(images, paths, strict=True):
            image.save(path)
        job = {
            "weights": str(given.weights.resolve()),
            "device": given.device,
            "pictures": [str(path) for path in paths],
            "prompts": prompts,
            "answer": str(folder / "answer.json"),
        }
        write_json(folder / "job.json", job)
        # They hold the GPU first and leave it again, so that both fit one after the other.
        subprocess.run([given.theirs, "-c", THEIRS, str(folder / "job.json")], check=True)
        theirs = torch.tensor(json.loads((folder / "answer.json").read_text(encoding="utf-8")))
    half, exact = (
        scorer(f"hpsv3:{given.weights}", device=given.device, dtype=dtype, batch_size=1).score(images, prompts)
        for dtype in (torch.bfloat16, torch.float32)
    )
    print(f"{'theirs':>10} {'bfloat16':>10} {'float32':>10}  prompt")
    for one, two, three, prompt in zip(theirs.tolist(), half.tolist(), exact.tolist(), prompts, strict=True):
        print(f"{one:10.4f} {two:10.4f} {three:10.4f}  {prompt}")
    print(f"largest difference to theirs in bfloat16   {(half - theirs).abs().max():.4f}")
    print(f"largest difference of float32 to bfloat16  {(exact - half).abs().max():.4f}")
    print(f"standard deviation of their scores         {theirs.std():.4f}")


if __name__ == "__main__":
    main()
