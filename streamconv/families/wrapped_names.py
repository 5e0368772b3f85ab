"""Names of tensors without the parts that wrappers of modules insert.

A wrapper keeps the wrapped module under an attribute, whose name then is a part of the names of all tensors inside:
`blocks.0._orig_mod.norm1.weight`. The parts are dropped from a backbone's keys, but not from the prefix before them,
so that two copies of a model never get the same names.
"""

from collections.abc import Iterator

_WRAPPERS = frozenset(
    {
        "_checkpoint_wrapped_module",  # torch's activation checkpointing
        "_fsdp_wrapped_module",  # FSDP
        "_fpw_module",  # FSDP of torch 1.11 and of FairScale
        "_orig_mod",  # torch.compile
        "_forward_module",  # Lightning Fabric, and Lightning with DeepSpeed
        "module",  # DataParallel, DistributedDataParallel, AveragedModel
        "base_layer",  # a layer that PEFT adapts
    }
)
_TRAINED_COPY = "modules_to_save"  # PEFT's name for copies of a module that it trains; the next part names the adapter
_INSERTED = _WRAPPERS | {_TRAINED_COPY}
_UNTRAINED = "original_module"  # PEFT's name for the module that the copy replaces


def unwrapped(name: str) -> str:
    """Return a name without the parts that wrappers insert.

    >>> unwrapped("blocks.0._checkpoint_wrapped_module.attn.qkv.base_layer.weight")
    'blocks.0.attn.qkv.weight'
    """
    parts = name.split(".")
    return ".".join(parts[i] for i in _kept(parts)) if not _INSERTED.isdisjoint(parts) else name


def prefix_before(name: str, unwrapped_name: str, key: str) -> str | None:
    """Return the start of ``name`` before ``key``, up to a dot; None if it does not end in the whole parts of ``key``.

    >>> name = "teacher.module.blocks.0._orig_mod.norm1.weight"
    >>> prefix_before(name, unwrapped(name), "blocks.0.norm1.weight")
    'teacher.module.'
    """
    if unwrapped_name != key and not unwrapped_name.endswith(f".{key}"):
        return None
    if name == unwrapped_name:
        return name[: -len(key)]
    parts = name.split(".")
    start = [*_kept(parts)][-1 - key.count(".")]
    return ".".join([*parts[:start], ""]) if start else ""


def untrained_start(name: str) -> str:
    """Return the start of the names in a module that PEFT replaces with a trained copy; empty if it is none."""
    if _UNTRAINED not in name:
        return ""
    before, found, _ = f".{name}".partition(f".{_UNTRAINED}.")
    return f"{before}{found}"[1:] if found else ""


def _kept(parts: list[str]) -> Iterator[int]:
    """Yield the positions of the parts that no wrapper inserted."""
    for i, part in enumerate(parts):
        if part not in _WRAPPERS and part != _TRAINED_COPY and (i == 0 or parts[i - 1] != _TRAINED_COPY):
            yield i
