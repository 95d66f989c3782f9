"""What log-probabilities of tokens cost: in chunks of positions, from all logits at once, by TRL's chunked head, by Liger's fused loss.

    python benchmarks/token_log_probs.py [--positions 16 256 1024] [--vocabularies 65536 151936] [--hidden 1024]

Each form turns hidden states (N, D) of the supervised positions into log-probabilities, float32. "forward" is timed without gradients;
"backward" is both, with the gradient of their sum in the hidden states (a LoRA below a frozen head), "head too" also in the head's
weights. Medians of --repeats runs, forms taking turns, told as ratios to ours, and MiB of all tensors that live at one moment beside
what was there before. Values and gradients are compared first.

ours     `mmalign.likelihood.tokens.score_tokens`
logits   all logits, then log_softmax
trl      the function of TRL's trainers, with their chunk
liger    Liger's fused head and cross-entropy, whose forward makes the gradients; on a GPU, where liger-kernel is installed

A second table: a small LFM2 and a small Qwen2 on pairs of answers whose prompt is 50, 80 and 95 % of the sequence, prompts read once
for both answers (`shared_prompt_states`) against whole rows (`hidden_states`), which are 1.

With --loss instead: the DPO loss of --pairs pairs that have these positions together, by the same forms and by Liger's fused preference
loss, which takes pair by pair (`pip install --no-deps --target FOLDER liger-kernel`, PYTHONPATH=FOLDER).
"""

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
from live_bytes import Live
from torch import Tensor, nn

from mmalign.files import write_file
from mmalign.likelihood.answers import hidden_states, shared_prompt_states
from mmalign.likelihood.token_head import TokenHead
from mmalign.likelihood.tokens import score_tokens

RESULTS = Path(__file__).with_name("results") / "token_log_probs.md"
TRL_CHUNK = 32768
MODES = ("forward", "backward", "head too")
BETA = 0.1
Form = Callable[[Tensor, nn.Linear, Tensor], Tensor]


def ours(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """In chunks of positions."""
    return score_tokens(hidden, labels, TokenHead(head)).log_prob


def logits(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """From all logits at once."""
    return head(hidden).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def trl(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """TRL's chunked head."""
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, head.weight, None, labels, 1.0, TRL_CHUNK, None, 1.0, ())[0]


def liger(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """Liger's fused head and cross-entropy, without reduction."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return -LigerFusedLinearCrossEntropyFunction.apply(hidden, head.weight, labels, None, None, -100, 0.0, 0.0, "none")[
        0
    ]


def preference(form: Form, pairs: int) -> Form:
    """The DPO loss of pairs, from the log-probabilities of their answers: preferred ones first, all of one length."""

    def loss(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
        chosen, rejected = form(hidden, head, labels).view(2 * pairs, -1).sum(1).chunk(2)
        return -nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()

    return loss


def liger_preference(pairs: int) -> Form:
    """Liger's DPO loss, without a reference, which would only be added; compiled on a GPU, as its authors have it."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    def loss(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
        fused = LigerFusedLinearDPOLoss(beta=BETA, compiled=hidden.is_cuda, use_ref_model=False)
        return fused(head.weight, hidden.view(2 * pairs, -1, hidden.shape[-1]), labels.view(2 * pairs, -1))[0]

    return loss


def forms(device: str) -> dict[str, Form]:
    """Those that run here."""
    found: dict[str, Form] = {"ours": ours, "logits": logits}
    if find_spec("trl"):
        found["trl"] = trl
    if find_spec("liger_kernel") and device != "cpu":
        found["liger"] = liger
    return found


def once(form: Form, mode: str, hidden: Tensor, head: nn.Linear, labels: Tensor) -> tuple[Tensor, ...]:
    """Values, and gradients where they are asked for."""
    if mode == "forward":
        with torch.no_grad():
            return (form(hidden, head, labels),)
    head.weight.requires_grad_(mode == "head too")
    hidden = hidden.detach().requires_grad_()
    values = form(hidden, head, labels)
    wanted = (hidden, head.weight) if mode == "head too" else (hidden,)
    return values.detach(), *torch.autograd.grad(values.sum(), wanted)


def seconds(form: Form, mode: str, *given: object) -> float:
    """One run."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    once(form, mode, *given)  # type: ignore[arg-type]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def lines(
    told: dict[str, Form],
    modes: tuple[str, ...],
    vocabulary: int,
    positions: int,
    args: argparse.Namespace,
    device: str,
) -> list[str]:
    """A table's rows of one size."""
    width, dtype = args.hidden, getattr(torch, args.dtype)
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False, device=device, dtype=dtype)
    given = (
        torch.randn(positions, width, device=device, dtype=dtype),
        head,
        torch.randint(vocabulary, (positions,), device=device),
    )
    rows = []
    for mode in modes:
        bytes_, first = {}, None
        for name, form in told.items():
            gc.collect()
            with Live() as live:
                found = once(form, mode, *given)
            bytes_[name], first = live.most, first or found
            for mine, theirs in zip(first, found, strict=True):
                torch.testing.assert_close(
                    theirs.float(), mine.float(), atol=2e-2 if dtype != torch.float32 else 1e-4, rtol=1e-3
                )
            del found
        spent = {name: statistics.median(all_) for name, all_ in _in_turn(told, mode, given, args.repeats).items()}
        for name in told:
            times, room = spent[name] / spent["ours"], bytes_[name] / bytes_["ours"]
            rows.append(
                f"| {vocabulary:,} | {positions:,} | {mode} | {name} | {times:.2f} × | {bytes_[name] / 2**20:,.1f} | {room:.2f} × |"
            )
            print(rows[-1], flush=True)
    return rows


def _in_turn(told: dict[str, Form], mode: str, given: tuple[object, ...], repeats: int) -> dict[str, list[float]]:
    spent: dict[str, list[float]] = {name: [] for name in told}
    for _ in range(repeats):
        for name, form in told.items():
            spent[name].append(seconds(form, mode, *given))
    return spent


PROMPT_SHARES = (0.5, 0.8, 0.95)


def small_model(kind: str, device: str) -> nn.Module:
    """Six layers of width 256."""
    import transformers

    sizes = {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    layers = {"layer_types": ["conv", "conv", "full_attention"] * 2} if kind == "Lfm2" else {}
    config = getattr(transformers, f"{kind}Config")(num_hidden_layers=6, **sizes, **layers)
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(device).eval()


def prompt_lines(length: int, pairs: int, device: str, repeats: int) -> list[str]:
    """The second table's rows."""
    rows = []
    for kind in ("Lfm2", "Qwen2"):
        model = small_model(kind, device)
        for share in PROMPT_SHARES:
            told = _readings(model, length, round(share * length), pairs, device)
            for mode in MODES[:2]:
                bytes_, spent, first = {}, {name: [] for name in told}, None
                for name, read in told.items():
                    gc.collect()
                    with Live() as live:
                        found = _read_once(read, model, mode)
                    bytes_[name], first = live.most, found if first is None else first
                    torch.testing.assert_close(found, first, atol=1e-3, rtol=1e-3)
                for _ in range(repeats):
                    for name, read in told.items():
                        start = time.perf_counter()
                        _read_once(read, model, mode)
                        spent[name].append(time.perf_counter() - start)
                times = statistics.median(spent["shared"]) / statistics.median(spent["whole"])
                room = bytes_["shared"] / bytes_["whole"]
                rows.append(f"| {kind} | {share:.0%} | {mode} | {times:.2f} × | {room:.2f} × |")
                print(rows[-1], flush=True)
    return rows


def _readings(model: nn.Module, length: int, prompt: int, pairs: int, device: str) -> dict[str, Callable[[], Tensor]]:
    """Both ways to the hidden states of the same answers."""
    ids = torch.randint(4096, (pairs, prompt), device=device)
    answers = torch.randint(4096, (2 * pairs, length - prompt), device=device)
    whole = torch.cat([ids.repeat(2, 1), answers], dim=1)

    def inputs(tokens: Tensor) -> dict[str, Tensor]:
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    counted = torch.ones_like(answers, dtype=torch.bool)
    supervised = torch.cat([torch.zeros_like(ids, dtype=torch.bool).repeat(2, 1), counted], dim=1)
    return {
        "whole": lambda: hidden_states(model, inputs(whole), supervised, {}, None),
        "shared": lambda: shared_prompt_states(model, inputs(ids), inputs(answers), counted, {}, None),
    }


def _read_once(read: Callable[[], Tensor], model: nn.Module, mode: str) -> Tensor:
    """Hidden states, or a gradient of them."""
    if mode == "forward":
        with torch.no_grad():
            return read()
    weights = list(model.base_model.parameters())
    found = torch.autograd.grad(read().square().mean(), weights, allow_unused=True)
    return torch.stack([grad.abs().sum() for grad in found if grad is not None])


def main() -> None:
    """Prints and keeps the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[65_536, 151_936])
    parser.add_argument("--positions", type=int, nargs="+", default=[16, 256, 1024])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--length", type=int, default=1024, help="tokens of prompt and answer, in the second table")
    parser.add_argument("--pairs", type=int, default=2, help="of a batch, in the second table, or with --loss")
    parser.add_argument("--loss", action="store_true", help="the DPO loss of pairs instead")
    parser.add_argument("--dtype", default="float32" if not torch.cuda.is_available() else "bfloat16")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = (
        f"{torch.cuda.get_device_name() if device == 'cuda' else platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, trl {version('trl')}, width {args.hidden}, {args.dtype}; "
        "times and bytes as ratios to ours."
    )
    head = ["| vocabulary | positions | mode | form | time | MiB | bytes |", "|---|---|---|---|---|---|---|"]
    sizes = list(product(args.vocabularies, args.positions))
    if args.loss:
        of_pairs = {name: preference(form, args.pairs) for name, form in forms(device).items() if name != "liger"}
        if find_spec("liger_kernel"):
            of_pairs["liger"] = liger_preference(args.pairs)
            about += f" liger-kernel {version('liger-kernel')}."
        rows = [row for size in sizes for row in lines(of_pairs, MODES[1:], *size, args, device)]
        told = [f"The DPO loss of {args.pairs} pairs. {about}", "", *head, *rows]
        write_file(RESULTS.with_name("preference_loss.md"), "\n".join(told) + "\n")
        return
    told = [about, "", *head]
    for size in sizes:
        told += lines(forms(device), MODES, *size, args, device)
    told += [
        "",
        f"{args.pairs} pairs of {args.length} tokens, float32: prompts read once, as a ratio to whole rows.",
        "",
        "| model | prompt | mode | time | bytes |",
        "|---|---|---|---|---|",
        *prompt_lines(args.length, args.pairs, device, args.repeats),
    ]
    write_file(RESULTS, "\n".join(told) + "\n")


if __name__ == "__main__":
    main()
