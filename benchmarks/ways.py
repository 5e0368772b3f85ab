"""The ways to convert that are compared, each run as a process of its own: python -m benchmarks.ways WAY SOURCE OUT.

Peers are called through their public API, as their documentation says. Their key names come from
streamconv's plan, which favours them: it costs them nothing and they read nothing for it.
"""

import sys
from pathlib import Path
from typing import Any


def renamed(state_dict: dict[str, Any], source: Path) -> dict[str, Any]:
    import streamconv

    result = {}
    for move in streamconv.plan(source).moves:
        value = state_dict[move.source]
        if len(move.targets) == 1:
            result[move.targets[0]] = value
        else:  # chunks of one storage would count as shared tensors, of which only one is kept
            result |= {name: part.clone() for name, part in zip(move.targets, value.chunk(3), strict=True)}
    return result


def mmap_save(source: Path, out: Path) -> None:
    """torch.load(mmap=True), renamed, huggingface_hub.save_torch_state_dict."""
    import torch
    from huggingface_hub import save_torch_state_dict

    state_dict = torch.load(source, map_location="cpu", mmap=True, weights_only=True)
    out.mkdir()
    save_torch_state_dict(renamed(state_dict, source), out)


def whole_model(source: Path, out: Path) -> None:
    """The original script's way without its two forward passes: both models whole in memory, save_pretrained."""
    import torch
    import transformers

    import streamconv
    from streamconv.verify.originals import dinov2

    plan = streamconv.plan(source)
    original = dinov2.build(plan.geometry)
    original.load_state_dict(torch.load(source, map_location="cpu", weights_only=True))
    config = transformers.Dinov2Config(**plan.config)
    state_dict = renamed(original.state_dict(), source)
    # load_state_dict of the original script no longer fits transformers 5's names; this does on 4 and 5.
    model = transformers.Dinov2Model.from_pretrained(None, config=config, state_dict=state_dict)
    model.save_pretrained(out)


WAYS = {"torch.load(mmap) + save_torch_state_dict": mmap_save, "original script's way": whole_model}

if __name__ == "__main__":
    WAYS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
