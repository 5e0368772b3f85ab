"""The parity check: the original model with the original file, and transformers with the output, on the same input.

Both run layer by layer, and each layer's output is compared as soon as both have it, so memory holds one
layer of each model and two outputs. On a CPU, the two agree bit for bit in most cases.
transformers splits some layers that are one matrix product in the original, and a processor may round the parts
differently from the whole. Then the last bits differ in float32, and both models run again in float64, where rounding
errors are far smaller than the effect of any wrong weight.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from streamconv.errors import StreamconvError
from streamconv.verification.comparison import Comparison, largest_difference
from streamconv.verification.lockstep import Pair, Variant, run_converted, run_pair
from streamconv.verification.machine import is_out_of_memory, refuse_machine_failure
from streamconv.verification.precision import exact_float32
from streamconv.verification.result import CastCost, Check

PROVES = "the original model and transformers compute the same output in every layer, from one image"
FLOAT32_TOLERANCE = 1e-3  # as in the original conversion script
# Relative to a layer output's largest value. Rounding causes 1e-15; the last bit of one float32 weight, 1e-12.
FLOAT64_TOLERANCE = 1e-13


@dataclass(frozen=True)
class Verdict:
    """The result of `compare`. ``problems`` and ``numbers`` are those of the check.

    ``outputs`` are both models' last states in float32, the original's first.
    """

    problems: tuple[str, ...]
    numbers: Mapping[str, Any]
    note: str
    not_checked: str
    outputs: Mapping[str, tuple[Tensor, Tensor]]
    cast_cost: CastCost | None


def check_parity(pair: Pair, name: str, pixels: Tensor, default_dtype: torch.dtype) -> tuple[Check, Verdict | None]:
    """Run both models on ``pixels``, (1, C, S, S), and compare every state.

    Args:
        default_dtype: The dtype that ``from_pretrained`` gives the output by default.
    """
    size = pixels.shape[-1]
    proves = f"{PROVES} at {size}x{size}"
    try:
        with exact_float32(pair.device):
            verdict = compare(pair, pixels, f"comparing both models at {size}x{size}", default_dtype)
    except StreamconvError:  # a source that is read while the model runs
        raise
    except Exception as error:  # torch or transformers rejects the output or the source, or a GPU fails
        if pair.device.type != "cpu":
            raise  # the caller finds out which
        refuse_machine_failure(error, str(pair.device))
        problem = f"{type(error).__name__}: {error}"
        return Check(name, False, proves, (problem,), {"error": problem}), None
    numbers = {"size": size, "native_size": pair.native_size, **verdict.numbers}
    proves += verdict.note
    return Check(name, not verdict.problems, proves, verdict.problems, numbers, verdict.not_checked), verdict


def compare(pair: Pair, pixels: Tensor, what: str, default_dtype: torch.dtype) -> Verdict:
    """Run both models on ``pixels``, (1, C, H, W), and compare every state within the device's rounding errors.

    The original runs as transformers does. If its authors' code differs by design, it also runs as published; that
    is reported, but decides nothing.
    """
    is_native = pixels.shape[-2:] == (pair.native_size,) * 2
    known_difference = pair.architecture.known_difference(pair.dimensions, is_native)
    decisive, published, uncast = Variant(), Variant(as_transformers=False), Variant(is_cast=False)
    variants = [decisive]
    if not pair.is_read_once:
        variants += [published] * (known_difference is not None) + [uncast] * (pair.cast_to is not None)
    found = run_pair(pair, pixels, torch.float32, variants, what)
    in_float32, in_float64 = found[decisive], None
    numbers: dict[str, Any] = {}
    not_checked = []
    if not in_float32.problems and max(in_float32.relative().values(), default=0.0) > 0:
        try:
            in_float64 = run_pair(pair, pixels, torch.float64, [decisive], f"{what}, in float64")[decisive]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            numbers["float32_only"] = f"{pair.device} has too little memory for float64"
            limit = f"errors below {FLOAT32_TOLERANCE:g} of a layer's largest value"
            not_checked.append(f"{numbers['float32_only']}, so {limit} cannot be excluded")
    if in_float64 is not None:
        problems, judged = _judge(in_float64, FLOAT64_TOLERANCE)
        differences = in_float32.relative()
        numbers["float32"] = {"largest": max(differences.values()), "differences": differences}
    else:
        problems, judged = _judge(in_float32, FLOAT32_TOLERANCE if "float32_only" in numbers else 0.0)
    if (start := (in_float64 or in_float32).not_finite_from) is not None:
        not_checked.append(f"infinite and NaN outputs, from {start} on, prove nothing")
    if published in found and known_difference is not None:
        numbers["as_published"] = {name: found[published].differences[name] for name in found[published].outputs}
        numbers["known_difference"] = asdict(known_difference)
    return Verdict(
        problems,
        {**numbers, **judged},
        " (decided by a second pass in float64)" if in_float64 is not None else "",
        "; ".join(not_checked),
        in_float32.outputs,
        _cast_cost(pair, pixels, found[uncast], default_dtype) if uncast in found and not problems else None,
    )


def _judge(found: Comparison, tolerance: float) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the problems of a comparison and its numbers."""
    differences = found.relative()
    failed = [name for name, difference in differences.items() if not difference <= tolerance]
    problems = list(found.problems)
    if failed:
        size = f"{differences[failed[0]]:.3g} (absolute: {found.differences[failed[0]]:.3g})"
        others = f"{len(failed) - 1} of the {len(differences) - 1} other layer outputs"
        rest = f"; {others} differ{'s' if len(failed) == 2 else ''} too" if failed[1:] else ""
        problems.append(f"the first difference is in {failed[0]}: {size}{rest}")
    return tuple(problems), {
        "tolerance": tolerance, "largest": max(differences.values(), default=math.inf), "differences": differences,
        "absolute": found.differences, "first": failed[0] if failed else None,
    }  # fmt: skip


def _cast_cost(pair: Pair, pixels: Tensor, uncast: Comparison, default_dtype: torch.dtype) -> CastCost | None:
    """Compare the output, as ``from_pretrained`` loads it by default, with the uncast original."""
    found: dict[str, Tensor] = {}
    total = pair.state_count

    def keep(name: str, state: Tensor) -> None:
        pair.progress("measuring the cost of the cast", min(len(found), total), total, "steps")
        found[name] = state if name in uncast.outputs else state[:0]

    if default_dtype == torch.float32:
        found = {name: converted for name, (_, converted) in uncast.outputs.items()}
    else:
        run_converted(pair, pixels, default_dtype, keep)
    if not uncast.outputs.keys() <= found.keys():
        return None
    return CastCost(
        dtype=str(default_dtype).removeprefix("torch."),
        largest=max(largest_difference(found[name].float(), stored) for name, (stored, _) in uncast.outputs.items()),
        largest_in_float32=max(uncast.differences[name] for name in uncast.outputs),
        magnitude=max(uncast.magnitudes[name] for name in uncast.outputs),
    )
