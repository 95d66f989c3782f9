"""HPSv3Scorer on a small checkpoint in the published layout, against transformers' own way and the authors' numbers."""

import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rewards import tiny_hpsv3
from rewards.reference import PROMPTS, Weights, check_gradients, check_scorer, double, linear, part, pictures
from rewards.tiny_hpsv3 import (
    INSTRUCTION,
    QUESTION,
    SEEN,
    SEEN_HEADS,
    WORDS,
    hpsv3_weights,
    write_base,
    write_hpsv3,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmalign import rewards
from mmalign.rewards import ClipScorer, Ensemble, HPSv3Scorer, Member, hpsv3, scorer
from mmalign.rewards.pixels import to_pixels

# What hpsv3 1.0.0 with transformers 4.45.2 gave on these weights, pictures and prompts: cast to bfloat16 as it does, then, but for
# the angles of the picture half, to float32.
AUTHORS = [-0.5164544582366943, -0.5741080641746521, -0.6078603267669678, -0.5201197862625122, -0.12941637635231018]
SMALL = 9 * 28 * 28


@pytest.fixture(scope="module", autouse=True)
def own_wheel() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hpsv3, "_SOURCE_HASH", tiny_hpsv3.SOURCE_HASH)
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of nine squares instead of 256: what is then tested does not hang on how many there are."""
    monkeypatch.setattr(hpsv3, "_AREA", SMALL)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return hpsv3_weights()


@pytest.fixture(scope="module")
def file(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hpsv3(tmp_path_factory.mktemp("hpsv3"), weights)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def _angles(_: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Rows turn the first half of a head's pairs, columns the second, in bfloat16."""
    width = SEEN // SEEN_HEADS // 2
    steps = (10000.0 ** (-torch.arange(0, width, 2) / width)).bfloat16()
    turns = torch.cat([places[:, :1].bfloat16() * steps, places[:, 1:].bfloat16() * steps], 1)
    return torch.cat([turns, turns], 1).cos(), torch.cat([turns, turns], 1).sin()


def _by_transformers(weights: Weights, base: Path, folder: Path) -> list[float]:
    """One row after the other through Qwen2-VL as transformers loads it, with its own image processor; the head by hand."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil, Qwen2VLProcessor

    shutil.copytree(base, folder, dirs_exist_ok=True)
    save_file({name: value for name, value in weights.items() if "rm_head" not in name}, folder / "model.safetensors")
    config = Qwen2VLConfig.from_pretrained(folder, vocab_size=WORDS)
    config.text_config.vocab_size = WORDS
    qwen = Qwen2VLForConditionalGeneration.from_pretrained(folder, config=config, dtype=torch.float32).eval().model
    qwen.visual.rotary_pos_emb.forward = _angles
    steps = qwen.language_model.rotary_emb.inv_freq
    steps.data = steps.data.bfloat16().float()
    processor = Qwen2VLProcessor.from_pretrained(folder)
    processor.image_processor = Qwen2VLImageProcessorPil(min_pixels=200704, max_pixels=200704)
    processor.tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    head = double(part(weights, "rm_head."))
    scores = []
    for image, prompt in zip(pictures(), PROMPTS, strict=True):
        words = INSTRUCTION.format(text_prompt=prompt) + QUESTION
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}
        text = processor.apply_chat_template([turn], add_generation_prompt=True)
        inputs = processor(text=[text], images=[image.convert("RGB")], return_tensors="pt")
        inputs["position_ids"] = torch.arange(inputs.input_ids.shape[1]).expand(3, 1, -1)
        with torch.no_grad():
            x = qwen(**inputs).last_hidden_state[0, inputs.input_ids[0].tolist().index(WORDS - 1)].double()
        for layer in ("0", "3"):
            x = linear(head, layer, x).relu()
        scores.append(float(linear(head, "5", x)[0]))
    return scores


def test_scores_equal_those_of_transformers_and_of_the_authors_code(
    file: Path, base: Path, weights: Weights, tmp_path: Path
) -> None:
    reward = HPSv3Scorer.from_file(file, base=base)
    scores = reward.score(pictures(), PROMPTS)
    expected = torch.tensor(_by_transformers(weights, base, tmp_path))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores, torch.tensor(AUTHORS), rtol=0, atol=1e-5)
    assert expected.std() > 0.1
    assert torch.equal(reward.score(pictures(), PROMPTS, scaled=True), scores)


@pytest.mark.usefixtures("small")
def test_a_score_is_the_pair_s_own(file: Path, base: Path) -> None:
    check_scorer(HPSv3Scorer.from_file(file, base=base, batch_size=2))


@pytest.mark.usefixtures("small")
def test_pixels_give_the_same_scores_and_gradients(file: Path, base: Path, clip_folder: Path) -> None:
    reward = HPSv3Scorer.from_file(file, base=base)
    check_gradients(reward, 84, levels=1.1, read=lambda patches: patches.values)
    clip = ClipScorer.from_pretrained(clip_folder)
    both = Ensemble([Member(reward, 3.0, mean=-0.5, std=0.2), Member(clip)])
    images, pixels = pictures()[:1] * 2, to_pixels(pictures()[0].resize((84, 84))).repeat(2, 1, 1, 1).requires_grad_()
    alone = [one.score(images, PROMPTS[:2]) for one in (reward, clip)]
    expected = 0.75 * (alone[0] + 0.5) / 0.2 + 0.25 * alone[1]
    torch.testing.assert_close(both.score(images, PROMPTS[:2]), expected)
    both.score_pixels(pixels, PROMPTS[:2]).sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().amax((1, 2, 3)).min() > 0


def test_patches_equal_those_of_transformers_own_processor(file: Path, base: Path) -> None:
    from transformers import Qwen2VLImageProcessorPil

    reward = HPSv3Scorer.from_file(file, base=base)
    processor = Qwen2VLImageProcessorPil(min_pixels=200704, max_pixels=200704)
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    shapes = [(448, 448), (224, 896), (25, 300), (513, 767)]
    images = [Image.fromarray(noise[:height, :width]) for height, width in shapes]
    own, patches = processor(images=images, return_tensors="pt"), reward.preprocess(images)
    torch.testing.assert_close(patches.values, own.pixel_values, rtol=0, atol=1e-5)
    assert torch.equal(patches.grid, own.image_grid_thw)
    # These two stay as they are, so that nothing is rounded.
    for image in images[:2]:
        given = torch.cat([to_pixels(image), 1 - to_pixels(image)])
        twice = [image, Image.fromarray(255 - np.array(image))]
        with_gradient = reward.preprocess_pixels(given)
        torch.testing.assert_close(with_gradient.values, reward.preprocess(twice).values, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("small")
def test_long_prompts_are_read_to_their_end(file: Path, base: Path) -> None:
    reward = HPSv3Scorer.from_file(file, base=base)
    long = "sneaker " * 200
    images = [pictures()[0]] * 2
    one, two = reward.score(images, [long + "red", long + "blue"])
    assert one != two and reward.count_truncated([long]) == reward.num_truncated_prompts == 0


@pytest.mark.parametrize("sign", ["<|Reward|>", "<|image_pad|>"])
def test_prompts_that_hold_a_sign_of_the_network_are_refused(file: Path, base: Path, sign: str) -> None:
    with pytest.raises(ValueError, match=r"the prompt 'a .* bag' holds .*: take it out"):
        HPSv3Scorer.from_file(file, base=base).score(pictures()[:1], [f"a {sign} bag"])


@pytest.mark.usefixtures("small")
def test_weights_written_in_the_authors_layout_are_read_back(file: Path, base: Path, tmp_path: Path) -> None:
    reward = HPSv3Scorer.from_file(file, base=base)
    state = {name.replace("language_model.", "model."): value for name, value in reward.qwen.state_dict().items()}
    state |= {f"rm_head.{name}": value for name, value in reward.head.state_dict().items()}
    state["lm_head.weight"] = torch.zeros(WORDS, 1)
    again = HPSv3Scorer.from_file(write_hpsv3(tmp_path, state), base=base)
    assert state.keys() == load_file(file).keys() and again.fingerprint == reward.fingerprint
    assert torch.equal(again.score(pictures(), PROMPTS), reward.score(pictures(), PROMPTS))


@pytest.mark.usefixtures("small")
def test_fingerprint_follows_weights_dtype_tokenizer_and_text(file: Path, base: Path) -> None:
    one, same = (HPSv3Scorer.from_file(file, base=base) for _ in range(2))
    one.score(pictures(), PROMPTS)
    assert one.fingerprint == same.fingerprint
    prints = {one.fingerprint}
    for change in (
        lambda reward: reward.qwen.to(torch.float16),
        lambda reward: reward.qwen.visual.blocks[0].mlp.fc1.bias.add_(1),
        lambda reward: reward.qwen.language_model.norm.weight.add_(1),
        lambda reward: reward.head[0].bias.add_(1),
        lambda reward: reward.tokenizer.add_tokens(["sneaker"]),
        lambda reward: setattr(reward, "frame", reward.frame + " "),
    ):
        other = HPSv3Scorer.from_file(file, base=base)
        change(other)
        prints.add(other.fingerprint)
    assert len(prints) == 7


@pytest.mark.usefixtures("small")
def test_it_runs_in_bfloat16_where_there_is_a_gpu(file: Path, base: Path) -> None:
    exact = HPSv3Scorer.from_file(file, base=base)
    half = HPSv3Scorer.from_file(file, base=base, dtype=torch.bfloat16)
    assert half.head[0].weight.dtype == exact.qwen.dtype == torch.float32
    torch.testing.assert_close(half.score(pictures(), PROMPTS), exact.score(pictures(), PROMPTS), rtol=0, atol=0.05)
    assert HPSv3Scorer.from_file(file, base=base, device="meta").qwen.dtype == torch.bfloat16


def test_the_name_leads_to_the_published_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "hub_file", lambda repo, file, name: f"{repo}/{file}")
    monkeypatch.setattr(HPSv3Scorer, "from_file", lambda path, **options: (path, options.get("dtype")))
    assert scorer("hpsv3") == ("MizzenAI/HPSv3/HPSv3.safetensors", None)
    assert scorer("hpsv3:own.safetensors", dtype=torch.float16) == ("own.safetensors", torch.float16)


def test_the_authors_text_is_read_and_not_run(file: Path, base: Path, tmp_path: Path) -> None:
    copy, wheel = Path(shutil.copy(file, tmp_path)), tmp_path / "hpsv3-1.0.0-py3-none-any.whl"
    remedy = f"run `pip download --no-deps --dest {tmp_path} hpsv3==1.0.0`$"
    with pytest.raises(ValueError, match=f"{wheel} is missing, from which the text around a prompt is read: {remedy}"):
        HPSv3Scorer.from_file(copy, base=base)
    wheel.write_text("no archive")
    with pytest.raises(ValueError, match="is no wheel"):
        HPSv3Scorer.from_file(copy, base=base)
    for name, text in (
        ("hpsv3/dataset/data_collator_qwen.py", tiny_hpsv3.SOURCE + "\n"),
        ("hpsv3/other.py", tiny_hpsv3.SOURCE),
    ):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(name, text)
        with pytest.raises(ValueError, match="has not the text that HPSv3 was trained with"):
            HPSv3Scorer.from_file(copy, base=base)
    given = HPSv3Scorer.from_file(copy, base=base, wheel=file.parent / wheel.name)
    assert INSTRUCTION + QUESTION in given.frame


def test_other_weights_and_other_bases_are_refused(file: Path, base: Path, weights: Weights, tmp_path: Path) -> None:
    for change, words in (
        ({"visual.merger.ln_q.weight": None}, "not the weights of HPSv3: visual.merger.ln_q.weight is missing"),
        ({"model.norm.bias": torch.zeros(1)}, "HPSv3: language_model.norm.bias is not part of it"),
        ({"model.norm.weight": torch.zeros(3)}, r"norm.weight has shape \(3,\) for \(32,\)"),
        ({"model.embed_tokens.weight": None}, "embed_tokens.weight is missing"),
        ({"rm_head.5.weight": torch.zeros(4, 6)}, r"HPSv3's head: 5.weight has shape \(4, 6\) for \(2, 6\)"),
        ({name: None for name in weights if name.startswith("rm_head.")}, "nothing in it is called rm_head"),
        ({"model.embed_tokens.weight": torch.zeros(9, 32)}, "the weights know 9 tokens, .* make 264: pass base='Qwen/"),
    ):
        changed = {name: value for name, value in (weights | change).items() if value is not None}
        with pytest.raises(ValueError, match=words):
            HPSv3Scorer.from_file(write_hpsv3(tmp_path, changed), base=base)
    other = Path(shutil.copytree(base, tmp_path / "other"))
    (other / "chat_template.json").write_text('{"chat_template": "{{ messages[0].role }}"}')
    with pytest.raises(ValueError, match="the chat template of .*other is not Qwen2-VL's: pass base='Qwen/"):
        HPSv3Scorer.from_file(file, base=other)


def test_an_absent_base_names_the_remedy(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect")

    monkeypatch.setattr(transformers.Qwen2VLConfig, "from_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"couldn't connect: run `hf download Qwen/Qwen2-VL-7B-Instruct .*` .*base='"):
        HPSv3Scorer.from_file(file)
