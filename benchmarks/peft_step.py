"""A language model's training step under PEFT: ``python -m benchmarks.peft_step`` (some ten minutes on two cores).

A Llama of random weights, built from a config, is trained by PEFT's HiRA, the same accelerated, RLRR as a method of
PEFT, and LoRA, over all its linears. Steps take turns. Time is that of forward and backward, as a ratio to accelerated
HiRA; memory is the peak of what a step allocates, without the gradients.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import timing
from benchmarks.measures import peak_and_results, relative_error
from benchmarks.tables import markdown
from benchmarks.timing import Call, Rounds, Variant
from rlrr_kernels.peft import RlrrConfig, accelerate_hira

OURS, HIRA = "HiRA accelerated", "HiRA"
#: Name -> a PEFT config, given a rank. All start as the plain model; RLRR has no shift, as the others have none.
METHODS: dict[str, Callable[..., Any]] = {
    OURS: peft.HiraConfig,
    HIRA: peft.HiraConfig,
    "RLRR": lambda r, **options: RlrrConfig(r=r, shift=False, **options),
    "LoRA": peft.LoraConfig,
}
#: The largest relative difference of a gradient of accelerated HiRA to PEFT's.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def model_for(name: str, r: int, dtype: torch.dtype, base: nn.Module) -> nn.Module:
    """A copy of ``base`` with adapters of a method in all linears of its blocks."""
    torch.manual_seed(0)
    config = METHODS[name](r=r, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(base).to(dtype), config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.1)  # else the other factor's gradient is 0
    if name == OURS and accelerate_hira(model).left:
        raise RuntimeError("a HiRA layer was not accelerated")
    return model


def step_of(model: nn.Module, tokens: Tensor) -> Call:
    """Forward and backward; the gradients are cleared before, untimed. It returns them."""

    def run() -> tuple[Tensor, ...]:
        model(input_ids=tokens, labels=tokens).loss.backward()
        return tuple(p.grad for p in model.parameters() if p.grad is not None)

    return Call(run, lambda: model.zero_grad(set_to_none=True))


def measure(
    r: int, dtype: torch.dtype, base: nn.Module, tokens: Tensor, rounds: int
) -> tuple[dict[str, Rounds], dict[str, int]]:
    """Time and memory of each method.

    Returns:
        The rounds, and the peak in bytes, by method.

    Raises:
        RuntimeError: If accelerated HiRA's gradients are not PEFT's, or a step fails.
    """
    calls = {name: step_of(model_for(name, r, dtype, base), tokens) for name in METHODS}
    measured = {name: peak_and_results(call) for name, call in calls.items()}
    error = relative_error(measured[OURS][1], measured[HIRA][1])
    if not error <= LIMITS[dtype]:
        raise RuntimeError(f"accelerated HiRA's gradients differ from PEFT's by {error:.1e}")
    variants = {name: lambda call=call: Variant([call]) for name, call in calls.items()}  # type: ignore[misc]
    found = timing.interleaved(variants, timing.WallClock(), 60.0, (min(rounds, 5), rounds))
    for name, of in found.items():
        if of.error is not None:
            raise RuntimeError(f"{name}: {of.error}")
    return found, {name: peak for name, (peak, _) in measured.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peft_step", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=15, help="most for a case")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs=2, default=(4, 128), help="sequences and tokens of each")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": args.hidden * 43 // 16, "vocab_size": 1000}
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=args.layers, num_attention_heads=8, **sizes))
    tokens = torch.randint(0, 1000, args.batch)
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        for r in args.ranks:
            found, peaks = measure(r, dtype, base, tokens, args.rounds)
            ours = found[OURS].seconds
            for name, of in found.items():
                ratios = [theirs / own for theirs, own in zip(of.seconds, ours, strict=True)]
                spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                case = [str(dtype).removeprefix("torch."), str(r), name]
                lines.append([*case, spread, f"{peaks[name] / 1e6:.0f}"])
    print(markdown(["dtype", "r", "method", "time / ours, median (range)", "peak, MB"], lines, left=3))
    return 0


if __name__ == "__main__":
    sys.exit(main())
