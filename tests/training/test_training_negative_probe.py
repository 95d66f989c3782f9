"""What is told of a negative side, against the same numbers by hand, and in the cases where they are known beforehand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny, tiny_pipeline
from training.runs import lora, pairs, trainer

from mmalign import SelfNPOPipeline, cli
from mmalign.training.negative_probe import NegativeProbe, probe_negative


def side(folder: Path, seed: int, **options: Any) -> Path:
    """A LoRA that makes a difference, saved as a run leaves it."""
    run = trainer(folder, peft_config=lora(init_lora_weights=False), seed=seed, **options)
    run.save_model()
    return folder


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("sides")
    return side(place / "negative", 1), side(place / "positive", 2)


def pipeline(negative: Path, positive: Path | None = None, **weights: float) -> Any:
    pipe = SelfNPOPipeline.from_pipe(tiny_pipeline("sd"))
    if positive is not None:
        pipe.load_aligned(positive)
    pipe.load_negative(negative, **weights)
    return pipe


def measured(alone: Any, **options: Any) -> NegativeProbe:
    return probe_negative(alone, pairs(), **{"draws": 3, "progress": False, "resolution": 16, **options})


def test_a_negative_side_that_is_the_base_knows_nothing_and_guides_as_plainly(sides: tuple[Path, Path]) -> None:
    found = measured(pipeline(sides[0], beta=0.0))
    (rate,) = found.prefers_rejected.values()
    assert rate.rate == 0.5 and rate.ties == rate.num_comparisons == 3 * found.num_pairs
    every = found.branches["all"]
    assert every.cosine == every.plain_cosine and every.spread == 1 and every.points == rate.num_comparisons
    assert sum(part.points for name, part in found.branches.items() if name != "all") == every.points


def test_numbers_are_those_of_the_networks_by_hand(sides: tuple[Path, Path]) -> None:
    """On the UNets themselves, their adapters switched by diffusers' own verbs, at the points that the rows decide."""
    from mmalign.data import ComparisonConfig, compare, encode_pairs, load_pairs
    from mmalign.denoisers import adapter_for
    from mmalign.likelihood.draws import randint, randn, row_generators

    negative, positive = sides
    found = measured(pipeline(negative), merged=pipeline(negative, positive, alpha=0.5, beta=2.0), guidance_scale=4.0)
    pipe = tiny_pipeline("sd")
    for name, folder in (("n", negative), ("p", positive)):
        pipe.load_lora_weights(folder, adapter_name=name)
    encoded = encode_pairs(load_pairs(pairs()), adapter_for(tiny_pipeline("sd")), resolution=16, progress=False)
    compared = compare(encoded.labels, None, ComparisonConfig())
    alpha_bar = torch.cumprod(1 - pipe.scheduler.betas, 0)
    names: dict[str, dict[str, float]] = {
        "base": {},
        "alone": {"n": 1.0},
        "merged": {"p": 0.5, "n": 2.0},
        "positive": {"p": 1.0},
    }
    wins: dict[str, list[float]] = {name: [] for name in names}
    cosines, spreads = [], []
    for place, first in zip(compared.kept.tolist(), compared.first.tolist(), strict=True):
        sides_of = encoded.latents(torch.tensor([place]))[0]
        row, text = int(encoded.rows[place]), encoded.conditioning(encoded.prompt_index[[place]]).prompt_embeds
        for draw in range(3):
            t = randint(row_generators(0, draw, [row], "timestep"), 0, 1000)
            noise = randn(row_generators(0, draw, [row], "noise"), (4, 8, 8))
            noised = [
                alpha_bar[t].sqrt() * sides_of[at] + (1 - alpha_bar[t]).sqrt() * noise[0] for at in (first, 1 - first)
            ]
            gaps, seen = {}, {}
            for name, weights in names.items():
                pipe.unet.enable_lora() if weights else pipe.unet.disable_lora()
                if weights:
                    pipe.unet.set_adapters(list(weights), list(weights.values()))
                with torch.no_grad():
                    chosen, rejected = (pipe.unet(x[None], t, text).sample for x in noised)
                    seen[name] = chosen, pipe.unet(noised[0][None], t, encoded.empty.prompt_embeds).sample
                gaps[name] = float((chosen - noise).square().mean() - (rejected - noise).square().mean())
            for name in wins:
                wins[name].append(float(gaps[name] > gaps["base"]))
            towards, plain, away = seen["positive"][0], seen["positive"][1], seen["merged"][1]
            cosines.append(torch.cosine_similarity(towards.flatten(), away.flatten(), dim=0))
            guided, usual = away + 4 * (towards - away), plain + 4 * (towards - plain)
            spreads.append(guided.std() / usual.std())
    told = {name: rate.rate for name, rate in found.prefers_rejected.items()}
    assert told == {
        "negative side, alone": pytest.approx(sum(wins["alone"]) / len(wins["alone"])),
        "negative side, merged": pytest.approx(sum(wins["merged"]) / len(wins["merged"])),
        "positive side": pytest.approx(sum(wins["positive"]) / len(wins["positive"])),
    }
    assert found.branches["all"].cosine == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-5)
    assert found.branches["all"].spread == pytest.approx(float(torch.stack(spreads).mean()), abs=1e-4)


def test_other_labels_turn_every_preference_round(sides: tuple[Path, Path]) -> None:
    """1 − the rate, at the same latents and noises."""
    rates = []
    for label in (1, 0):
        rows = [
            {"caption": row["prompt"], "jpg_0": row["chosen"], "jpg_1": row["rejected"], "label_0": label}
            for row in pairs()
        ]
        found = probe_negative(pipeline(sides[0]), rows, draws=3, progress=False, resolution=16)
        rates.append(found.prefers_rejected["negative side"].rate)
    assert sum(rates) == pytest.approx(1) and rates[0] != 0.5


def test_a_whole_network_is_measured_as_the_lora_that_it_holds(sides: tuple[Path, Path], tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    pipe.load_lora_weights(sides[0])
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.unet.save_pretrained(tmp_path / "unet")
    one, two = measured(pipeline(sides[0])), measured(pipeline(tmp_path))
    assert one.prefers_rejected["negative side"].rate == two.prefers_rejected["negative side"].rate
    for name, part in one.branches.items():
        assert two.branches[name].cosine == pytest.approx(part.cosine, abs=1e-4)
        assert two.branches[name].spread == pytest.approx(part.spread, abs=1e-3)
    assert one.branches["all"].cosine < one.branches["all"].plain_cosine


def test_what_cannot_be_measured_is_refused(sides: tuple[Path, Path]) -> None:
    negative, positive = sides
    with pytest.raises(ValueError, match="no negative side to measure"):
        measured(SelfNPOPipeline.from_pipe(tiny_pipeline("sd")))
    with pytest.raises(ValueError, match="alone must be the base"):
        measured(pipeline(negative, positive))
    with pytest.raises(ValueError, match="guidance_scale must be above 1"):
        measured(pipeline(negative), guidance_scale=1.0)
    with pytest.raises(ValueError, match="draws must be at least 1"):
        measured(pipeline(negative), draws=0)


def test_the_command_prints_tables_and_writes_the_numbers(
    sides: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny("sd", "model")
    Path("pairs").mkdir()
    for number, row in enumerate(pairs()):
        for name in ("chosen", "rejected"):
            row[name].save(f"pairs/{number}_{name}.png")
        Path(f"pairs/{number}.txt").write_text(row["prompt"])
    words = [
        "probe",
        "negative",
        "--model",
        "model",
        "--negative",
        str(sides[0]),
        "--data",
        "pairs",
        "--draws",
        "1",
        "--no-progress",
    ]
    assert cli.main([*words, "--lora", str(sides[1]), "--negative-alpha", "0.5", "--output-dir", "out"]) == 0
    shown = capsys.readouterr().out
    told = json.loads(Path("out/negative.json").read_text())
    for name, rate in told["prefers_rejected"].items():
        assert name in shown and f"{rate['rate']:.1%}" in shown
    assert set(told["prefers_rejected"]) == {"negative side, alone", "negative side, merged", "positive side"}
    assert f"× {told['branches']['all']['spread']:.3f}" in shown and told["guidance_scale"] == 7.5
    assert cli.main([*words, "--negative-alpha", "0.5"]) == 2
    assert "--negative-alpha acts on --lora" in capsys.readouterr().err
    assert cli.main(words[:4] + words[6:]) == 2
    assert "nothing to measure: give --negative" in capsys.readouterr().err
