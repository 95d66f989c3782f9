"""What two models say of given answers: nothing at the base, what the trainer says elsewhere, and KL as the logits have it."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from tiny_vlm import picture, tiny_vlm

from mmalign.data.answer_tokens import collate_answers, encode_answers
from mmalign.data.answers import load_answers
from mmalign.evaluation.answer_likelihood import compare_likelihoods
from mmalign.likelihood.reference import make_reference


def pairs(number=6):
    return [
        {
            "prompt": "What is it?",
            "image": picture(24, 24, seed=row // 2).image,
            "chosen": f"A red bag, number {row}.",
            "rejected": f"It is a blue bag, number {row}, I think.",
        }
        for row in range(number)
    ]


def moved(kind="lfm2_vl", **more):
    """A model with a LoRA that does something, and its processor."""
    from peft import LoraConfig

    model, processor = (copy.deepcopy(part) for part in tiny_vlm(kind))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "in_proj"], init_lora_weights=False, **more))
        for name, weight in model.named_parameters():
            if "modules_to_save" in name:
                weight.data += 0.3 * torch.randn_like(weight)
    return model.eval(), processor


def test_at_the_base_nothing_diverges_and_every_pair_is_a_tie():
    model, processor = tiny_vlm("lfm2_vl")
    found = compare_likelihoods(model, lambda: nullcontext(model), processor, load_answers(pairs()), progress=False)
    assert found.ranking.value == 0.5 and found.margins == (0,) * 6
    assert found.kl.value == pytest.approx(0, abs=1e-6) and (found.kl.number, found.kl.num_clusters) == (6, 3)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(("batch_size", "more"), [(1, {}), (4, {}), (4, {"modules_to_save": ["lm_head"]})])
def test_margins_and_divergence_are_those_of_the_logits(batch_size, more):
    model, processor = moved(**more)
    base = partial(make_reference(model, kind="adapter").model, model)
    data = load_answers(pairs())
    found = compare_likelihoods(model, base, processor, data, batch_size=batch_size, progress=False)
    margins, divergences = [], []
    for row in range(len(data)):
        batch = collate_answers([encode_answers(data[row], processor, model.config)], 0)
        inputs = batch.inputs | {name: torch.cat([value] * 2) for name, value in batch.media.items()}
        with torch.no_grad():
            policy = model(**inputs).logits[:, :-1].log_softmax(-1)
            with base() as plain:
                reference = plain(**inputs).logits[:, :-1].log_softmax(-1)
        counted = batch.supervised[:, 1:]
        told = (policy - reference).gather(-1, batch.inputs["input_ids"][:, 1:, None])[..., 0]
        ratios = (told * counted).sum(1)
        margins.append(float(ratios[0] - ratios[1]))
        kl = (reference.exp() * (reference - policy)).sum(-1)
        divergences.append(float((kl * counted).sum(1)[0] / counted.sum(1)[0]))
    assert found.margins == pytest.approx(margins, abs=1e-4) and max(map(abs, margins)) > 1e-2
    assert found.kl.value == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)
    assert found.ranking.value == sum(margin > 0 for margin in margins) / len(margins)


def test_ties_are_left_out_and_single_answers_have_no_ranking():
    model, processor = tiny_vlm("lfm2")
    votes = [
        {"prompt": "q?", "chosen": "x", "rejected": "y", "chosen_votes": 1 + row, "rejected_votes": 1}
        for row in range(3)
    ]
    options = {"processor": processor, "progress": False}
    weigh = partial(compare_likelihoods, model, lambda: nullcontext(model), **options)
    assert weigh(data=load_answers(votes)).ranking.number == 2
    with pytest.raises(ValueError, match="nothing but ties"):
        weigh(data=load_answers(votes[:1]))
    single = [{"prompt": f"{row}?", "completion": "x", "label": True} for row in range(2)]
    found = weigh(data=load_answers(single))
    assert found.ranking is None and found.kl.number == 2


def test_a_model_in_training_is_weighed_without_its_dropout_and_trains_on():
    model, processor = moved(lora_dropout=0.9)
    base = partial(make_reference(model, kind="adapter").model, model)
    weigh = partial(compare_likelihoods, model, base, processor, load_answers(pairs(2)), progress=False)
    expected = weigh()
    model.train()
    assert weigh() == expected and model.training


def test_what_is_no_number_is_no_estimate():
    model, processor = (copy.deepcopy(part) for part in tiny_vlm("lfm2"))
    base = copy.deepcopy(model)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    data = load_answers([{"prompt": f"{row}?", "chosen": "x", "rejected": "y"} for row in range(2)])
    weigh = partial(compare_likelihoods, model, lambda: nullcontext(base), processor, data, progress=False)
    with pytest.raises(ValueError, match="2 of 2 scores that are NaN"):
        weigh()
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        weigh(batch_size=0)
