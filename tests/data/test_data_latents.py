"""The cache: what it holds is what the denoiser says, it is found again, goes on, and leaves nothing half-written."""

import errno
import json
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_pipeline

from mmalign.data import (
    BadRow,
    ComparisonConfig,
    EncodedPairs,
    PairSource,
    PreferenceDataset,
    cache_size,
    clear_cache,
    collate,
    compare,
    default_cache_dir,
    encode_pairs,
    load_pairs,
)
from mmalign.data.images import fit, to_pixels
from mmalign.denoisers import Denoiser, adapter_for

Rows = Callable[..., list[dict[str, Any]]]
BAD = 3


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def any_denoiser(request: pytest.FixtureRequest) -> Denoiser:
    return adapter_for(tiny_pipeline(request.param))


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return adapter_for(tiny_pipeline("sd"))


@pytest.fixture
def source(pickapic_rows: Rows) -> PairSource:
    items = pickapic_rows(7)
    for row, item in enumerate(items):
        item |= {"ps_score_0": None if row == 1 else 0.2 + row / 100, "ps_score_1": None if row == 1 else 0.2}
    items[BAD]["jpg_1"] = items[BAD]["jpg_1"][:200]
    items[5]["caption"] = ""
    return load_pairs(items)


@pytest.fixture
def encode(source: PairSource, denoiser: Denoiser, tmp_path: Path) -> Callable[..., EncodedPairs]:
    def call(**options: Any) -> EncodedPairs:
        given = {"resolution": 16, "cache_dir": tmp_path, "batch_size": 2, "shard_rows": 3, "progress": False}
        return encode_pairs(**({"source": source, "denoiser": denoiser} | given | options))

    return call


def _folders(root: Path) -> list[str]:
    return sorted(entry.name[64:] for entry in root.iterdir() if entry.is_dir())


def test_contents_are_what_the_denoiser_says(
    source: PairSource, any_denoiser: Denoiser, encode: Callable[..., EncodedPairs]
) -> None:
    encoded = encode(denoiser=any_denoiser, latent_mode="mean")
    assert len(encoded) == 6 and encoded.rows.tolist() == [0, 1, 2, 4, 5, 6]
    assert encoded.labels.tolist() == [1.0, 0.0, 0.5, 1.0, 0.0, 0.5] and encoded.user_ids == ["0", "1", *"0010"]
    assert [(bad.row, bad.field) for bad in encoded.bad_rows] == [(BAD, "jpg_1")]
    assert isinstance(encoded.bad_rows[0], BadRow)
    assert encoded.prompts == ["a red shirt", "a blue shirt", "a green shirt", ""]
    assert encoded.prompt_index.tolist() == [0, 1, 2, 1, 3, 0] and encoded.num_truncated_prompts == 0
    scores = encoded.scores["ps_score"]
    assert scores.shape == (6, 2) and scores[1].isnan().all() and scores[3].tolist() == [0.2 + 4 / 100, 0.2]
    latents = encoded.latents(torch.arange(6))
    for place, row in enumerate(encoded.rows.tolist()):
        pictures = (source[row].image_0, source[row].image_1)
        pixels = torch.stack([to_pixels(fit(picture, 16, 16)[0]) for picture in pictures])
        torch.testing.assert_close(latents[place], any_denoiser.encode_image(pixels), rtol=1e-4, atol=1e-5)
        for side, picture in enumerate(pictures):
            sizes = encoded.sizes(torch.tensor([place]), side)[0].tolist()
            assert sizes == list(fit(picture, 16, 16)[1]) and sizes[:2] == [picture.height, picture.width]
    text = any_denoiser.encode_prompt(encoded.prompts)
    ours, empty = encoded.conditioning(torch.tensor([2, 0, 3])), any_denoiser.encode_prompt([""])
    torch.testing.assert_close(ours.prompt_embeds, text.prompt_embeds[[2, 0, 3]])
    torch.testing.assert_close(encoded.empty.prompt_embeds, empty.prompt_embeds)
    assert len(encoded.empty) == 1 and (ours.pooled is None) == (text.pooled is None)
    if text.pooled is not None:
        torch.testing.assert_close(ours.pooled, text.pooled[[2, 0, 3]])
        assert (encoded.empty.pooled == 0).all()


def test_posterior_samples_hang_on_seed_row_and_side_only(encode: Callable[..., EncodedPairs], tmp_path: Path) -> None:
    everything = torch.arange(6)
    one = encode().latents(everything)
    other = encode(cache_dir=tmp_path / "b", batch_size=5, shard_rows=100, workers=1).latents(everything)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    mean, reseeded = encode(latent_mode="mean").latents(everything), encode(seed=1).latents(everything)
    noise = (one - mean, reseeded - mean)
    assert all(part.abs().flatten(1).amax(1).min() > 1e-6 for part in noise)
    assert not torch.allclose(noise[0], noise[1]) and not torch.allclose(noise[0][:, 0], noise[0][:, 1])


def test_rows_come_in_the_order_asked(encode: Callable[..., EncodedPairs]) -> None:
    encoded = encode()
    latents = encoded.latents(torch.arange(6))
    index = torch.tensor([5, 0, 3, 3])
    assert torch.equal(encoded.latents(index), latents[index])
    assert encoded.latents(torch.tensor([], dtype=torch.long)).shape == (0, *latents.shape[1:])
    sides = torch.tensor([0, 1, 0, 1])
    expected = torch.stack([encoded.sizes(index[i : i + 1], int(sides[i]))[0] for i in range(4)])
    assert torch.equal(encoded.sizes(index, sides), expected)
    for wrong in (6, -1):
        with pytest.raises(IndexError):
            encoded.latents(torch.tensor([wrong]))
    travelled = pickle.loads(pickle.dumps(encoded))
    assert torch.equal(travelled.latents(index), latents[index])


def test_a_second_call_opens_what_is_there(
    encode: Callable[..., EncodedPairs], denoiser: Denoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode()
    monkeypatch.setattr(type(denoiser), "encode_image", None)
    again = encode(batch_size=1, shard_rows=1, workers=2)
    assert again.key == first.key and torch.equal(again.latents(torch.arange(6)), first.latents(torch.arange(6)))
    assert _folders(tmp_path) == [""] and first.folder == tmp_path / first.key
    first.verify()


def test_every_part_of_the_key_makes_another_cache(
    encode: Callable[..., EncodedPairs], source: PairSource, denoiser: Denoiser, pickapic_rows: Rows
) -> None:
    keys = [encode().key]
    for options in (
        {"resolution": (16, 18)},
        {"resolution": 18},
        {"dtype": torch.float16},
        {"latent_mode": "mean"},
        {"seed": 3},
        {"source": load_pairs(pickapic_rows(7))},
        {"denoiser": adapter_for(tiny_pipeline("sdxl"))},
    ):
        keys.append(encode(**options).key)
    pipe = denoiser.pipe
    with torch.no_grad():
        for parameter in (next(pipe.vae.parameters()), next(pipe.text_encoder.parameters())):
            before = parameter.clone()
            parameter.flatten()[0] += 1
            keys.append(encode().key)
            parameter.copy_(before)
    length, pipe.tokenizer.model_max_length = pipe.tokenizer.model_max_length, 9
    keys.append(encode().key)
    pipe.tokenizer.model_max_length = length
    scaling = pipe.vae.config.scaling_factor
    pipe.vae.register_to_config(scaling_factor=1.0)
    keys.append(encode().key)
    pipe.vae.register_to_config(scaling_factor=scaling)
    pipe.vae.enable_tiling()
    for size in (64, 128):
        pipe.vae.tile_sample_min_size = size
        keys.append(encode().key)
    pipe.vae.disable_tiling()
    assert len(set(keys)) == len(keys)
    # The denoiser itself is what will be trained: it is no part of what is encoded.
    with torch.no_grad():
        next(pipe.unet.parameters()).add_(1)
    assert encode().key == keys[0]


def test_storage_dtype_is_kept(encode: Callable[..., EncodedPairs]) -> None:
    encoded = encode(dtype=torch.bfloat16)
    assert encoded.latents(torch.tensor([0])).dtype == torch.bfloat16
    assert encoded.conditioning(torch.tensor([0])).prompt_embeds.dtype == torch.bfloat16


def test_an_interrupted_build_goes_on_where_it_was(
    encode: Callable[..., EncodedPairs], denoiser: Denoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encode(cache_dir=tmp_path / "whole").latents(torch.arange(6))
    genuine, calls = type(denoiser).encode_image, []

    def count(self: Denoiser, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return genuine(self, *arguments)

    root = tmp_path / "cut"
    monkeypatch.setattr(type(denoiser), "encode_image", count)
    with pytest.raises(KeyboardInterrupt):
        encode(cache_dir=root)
    assert _folders(root) == [".partial"]
    (half,) = root.glob("*.partial")
    (half / ".latents-00001.safetensors.1.tmp").write_bytes(b"half a shard")
    kept = sorted(file.name for file in half.glob("latents-*"))
    assert kept == ["latents-00000.safetensors", "latents-00001.safetensors"]
    before = len(calls)
    encoded = encode(cache_dir=root, shard_rows=1)
    assert len(calls) - before == 1, "only the last row was left to do"
    assert torch.equal(encoded.latents(torch.arange(6)), whole) and _folders(root) == [""]
    assert not [file for file in root.rglob("*") if "tmp" in file.name or "partial" in file.name]
    encoded.verify()


def test_two_at_once_build_once(
    encode: Callable[..., EncodedPairs], denoiser: Denoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, calls = type(denoiser).encode_image, []

    def count(self: Denoiser, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        return genuine(self, *arguments)

    monkeypatch.setattr(type(denoiser), "encode_image", count)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: encode(), range(2))
    assert len(calls) == 4 and _folders(tmp_path) == [""]
    assert torch.equal(one.latents(torch.arange(6)), other.latents(torch.arange(6)))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Call with n: the n-th file written from then on, and all later ones, find the disk full after their first half."""
    genuine = Path.write_bytes

    def fill(after: int) -> None:
        written = []

        def write(self: Path, data: bytes) -> int:
            if not self.name.endswith(".tmp"):
                return genuine(self, data)
            written.append(self.name)
            if len(written) < after:
                return genuine(self, data)
            genuine(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", write)

    yield fill


@pytest.mark.parametrize("after", [1, 2, 4, 5, 6, 7])
def test_a_full_disk_is_told_in_one_line_and_leaves_no_half_file(
    after: int,
    encode: Callable[..., EncodedPairs],
    tmp_path: Path,
    full_disk: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context():
        full_disk(after)
        with pytest.raises(OSError, match="free some, or point cache_dir or .MMALIGN_CACHE") as caught:
            encode()
        monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    left = [file for file in tmp_path.rglob("*") if file.is_file() and not file.name.endswith(".lock")]
    assert not [file for file in left if file.suffix == ".tmp"] and len(left) == after - 1
    assert _folders(tmp_path) == ([] if after == 1 else [".partial"])
    encode().verify()
    assert _folders(tmp_path) == [""]


def test_a_damaged_or_foreign_cache_is_refused(encode: Callable[..., EncodedPairs]) -> None:
    encoded = encode()
    shard = encoded.folder / "latents-00000.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="latents-00000.safetensors is damaged: delete"):
        encode().verify()
    shard.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="missing or has another size: delete"):
        encode()
    shard.write_bytes(content)
    manifest = encoded.folder / "manifest.json"
    original = manifest.read_text()
    fields = json.loads(original)
    manifest.write_text(json.dumps(fields | {"parts": fields["parts"] | {"dtype": "float16"}}))
    with pytest.raises(ValueError, match="changed by hand"):
        encode()
    manifest.write_text(original)
    with pytest.raises(ValueError, match="made with other dtype, vae: delete it"):
        EncodedPairs.open(encoded.folder, expected=fields["parts"] | {"dtype": "float16", "vae": "x"})
    manifest.unlink()
    with pytest.raises(ValueError, match="holds no finished cache"):
        encode()


def test_a_source_without_a_good_row_is_an_error_that_names_rows(
    encode: Callable[..., EncodedPairs], tmp_path: Path
) -> None:
    bad = [{"prompt": "x", "chosen": b"broken", "rejected": b"broken"}] * 7
    with pytest.raises(ValueError, match="no usable pair; 7 of 7 rows left out: row 0, chosen: .* and 2 more: 5, 6$"):
        encode(source=load_pairs(bad))
    assert _folders(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"resolution": 17}, "multiples of 2"),
        ({"latent_mode": "mode"}, "'sample' or 'mean'"),
        ({"latent_mode": "mean", "seed": 1}, "no effect"),
        ({"dtype": torch.int8}, "dtype must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"shard_rows": 0}, "shard_rows must be"),
    ],
)
def test_options_are_checked(options: dict[str, Any], says: str, encode: Callable[..., EncodedPairs]) -> None:
    with pytest.raises(ValueError, match=says):
        encode(**options)


def test_preference_dataset_orders_and_collates(encode: Callable[..., EncodedPairs]) -> None:
    encoded = encode()
    compared = compare(encoded.labels, None, ComparisonConfig())
    dataset = PreferenceDataset(encoded, compared)
    batch = collate([dataset[i] for i in range(len(dataset))])
    assert batch["row"].tolist() == [0, 1, 4, 5] and batch["strength"].tolist() == [1.0] * 4
    latents = encoded.latents(compared.kept)
    picked = torch.arange(4)
    assert torch.equal(batch["chosen"], latents[picked, compared.first])
    assert torch.equal(batch["rejected"], latents[picked, 1 - compared.first])
    assert torch.equal(batch["prompt_index"], encoded.prompt_index[compared.kept])
    assert torch.equal(batch["size_chosen"], encoded.sizes(compared.kept, compared.first))
    assert torch.equal(batch["size_rejected"], encoded.sizes(compared.kept, 1 - compared.first))
    assert torch.equal(dataset[-1]["chosen"], batch["chosen"][-1])
    with pytest.raises(IndexError):
        dataset[4]
    loader = torch.utils.data.DataLoader(dataset, batch_size=3, collate_fn=collate, num_workers=1)
    assert torch.equal(torch.cat([part["chosen"] for part in loader]), batch["chosen"])
    with pytest.raises(ValueError, match="these very pairs"):
        PreferenceDataset(encoded, compare(torch.ones(2), None, ComparisonConfig()))
    with pytest.raises(ValueError, match="no pair is left"):
        PreferenceDataset(encoded, compare(torch.full((6,), 0.5), None, ComparisonConfig()))


def test_clearing_takes_our_caches_and_nothing_else(
    encode: Callable[..., EncodedPairs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock

    encoded = encode()
    (tmp_path / "mine.txt").write_text("stays")
    (tmp_path / "folder").mkdir()
    size = sum(file.stat().st_size for file in encoded.folder.iterdir())
    assert cache_size(tmp_path) == size
    with FileLock(tmp_path / f"{encoded.key}.lock"):
        assert clear_cache(tmp_path) == 0 and encoded.folder.is_dir()
    assert clear_cache(tmp_path) == size and cache_size(tmp_path) == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "mine.txt"]
    monkeypatch.setenv("MMALIGN_CACHE", str(tmp_path / "elsewhere"))
    assert default_cache_dir() == tmp_path / "elsewhere" and cache_size() == clear_cache() == 0
    monkeypatch.delenv("MMALIGN_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "mmalign"
