"""Verifications in several threads do not disturb each other or the process that calls them."""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.utils
import pytest
import torch
import transformers
from torch import nn

from streamconv import Verification
from streamconv.families.registry import find_model
from streamconv.verification.empty_weights import empty_weights
from streamconv.verification.load import load_pretrained
from streamconv.verification.patch_pca import principal_components
from streamconv.verification.reference import build_original
from tests import api
from tests.checkpoints import alter, checkpoint_with_settings, make_states, saved
from tests.support import tiny, verdicts

pytestmark = pytest.mark.transformers


def process_state() -> dict[str, Any]:
    """Everything of the process that running a model could change, except random numbers, which any thread draws."""
    logging, hub = transformers.utils.logging, huggingface_hub.utils
    modules = {name: module for name, module in sys.modules.items() if name.startswith("torch.nn.modules.")}
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "TF32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "cuDNN": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "oneDNN": torch.backends.mkldnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "safe globals": list(torch.serialization.get_safe_globals()),
        "functions of torch": dict(vars(torch)),
        "modules": {name: dict(vars(value)) for name, value in vars(nn).items() if isinstance(value, type)},
        "initializers": {name: vars(module).copy() for name, module in {**modules, "init": nn.init}.items()},
        "methods": {name: value for name, value in vars(transformers.PreTrainedModel).items() if name != "__doc__"},
        "verbosity": (logging.get_verbosity(), hub.logging.get_verbosity()),
        "progress bars": (logging.is_progress_bar_enabled(), hub.are_progress_bars_disabled()),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "environment": dict(os.environ),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "streams": (sys.stdout, sys.stderr, sys.excepthook, list(sys.path), os.getcwd()),
    }


def changes(before: dict[str, Any]) -> set[str]:
    after = process_state()
    return {name for name in before if before[name] != after[name]}


class Caller(threading.Thread):
    """A thread of the caller's that builds layers, and looks for changes of the process, until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before, self.changed, self.layers = process_state(), set[str](), set[tuple[str, torch.dtype]]()
        self.is_initialized, self.stopped = True, threading.Event()

    def run(self) -> None:
        while not self.stopped.is_set():
            self.changed |= changes(self.before)
            layer = nn.Linear(3, 4)
            self.layers.add((layer.weight.device.type, layer.weight.dtype))
            self.is_initialized &= bool(layer.weight.detach().abs().max() <= 3**-0.5)


@contextmanager
def watched() -> Iterator[Caller]:
    caller = Caller()
    caller.start()
    yield caller
    caller.stopped.set()
    caller.join()


Jobs = dict[Callable[[], Verification], Verification]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Verifications of a classifier and a cast model, both correct, and of damaged folders, with their results."""
    folder = tmp_path_factory.mktemp("jobs")
    backbone, head = (saved(state, folder / f"{i}.pth") for i, state in enumerate(make_states(tiny(classes=5))))
    source = saved(make_states(tiny())[0], folder / "x.pth")
    classifier = api.convert(backbone, folder / "classifier", head=head).output
    cast = api.convert(source, folder / "cast", dtype="bfloat16").output
    missing = api.convert(source, folder / "missing", dtype="float16").output
    alter(missing, lambda state: state.update(extra=state.pop("encoder.layer.2.mlp.fc1.weight")))
    changed = api.convert(source, folder / "changed").output
    alter(changed, lambda state: state["encoder.layer.1.mlp.fc2.weight"].add_(1))
    made = [lambda: api.verify(classifier, backbone, head=head, device="cpu")]
    made += [lambda output=output: api.verify(output, source, device="cpu") for output in (cast, missing, changed)]
    return {job: job() for job in made}  # which also imports modules, and so changes the process


def results(found: Verification) -> tuple[Any, ...]:
    numbers = [{k: v for k, v in check.numbers.items() if k != "seconds"} for check in found.checks]
    return verdicts(found), [check.problems for check in found.checks], numbers, found.predictions, found.pictures


def test_verifications_in_threads_disturb_neither_each_other_nor_the_caller(
    jobs: Jobs,
) -> None:
    expected = [results(found) for found in jobs.values()]
    assert [list(result[0].values()) for result in expected] == [
        [True, True, True, True, True], [True, True, True, True, True], [False, True, False, None, True],
        [False, True, True, False, True],
    ]  # fmt: skip
    with watched() as caller, ThreadPoolExecutor(len(jobs)) as pool:
        for _ in range(3):
            assert [results(found) for found in pool.map(lambda job: job(), jobs)] == expected
    assert caller.changed == set()
    assert caller.layers == {("cpu", torch.float32)}
    assert caller.is_initialized
    assert changes(caller.before) == set()


def test_verification_leaves_random_numbers_alone(jobs: Jobs) -> None:
    torch.rand(7)  # whatever state a job might have set before
    before = torch.get_rng_state()
    for job in jobs:
        job()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "change",
    [
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_default_dtype(torch.float16),
        lambda: torch.set_default_device("meta"),
    ],
    ids=["float64", "float16", "meta"],
)
def test_verification_does_not_depend_on_the_callers_default_dtype_and_device(
    jobs: Jobs, change: Callable[[], None]
) -> None:
    def exact_results(found: Verification) -> tuple[Any, ...]:
        # transformers' default image processor, which is only reported, computes in the default dtype.
        checks = [replace(c, numbers={k: v for k, v in c.numbers.items() if k != "default"}) for c in found.checks]
        return results(replace(found, checks=tuple(checks)))

    expected = [exact_results(found) for found in jobs.values()]
    try:
        change()
        before = process_state()
        assert [exact_results(job()) for job in jobs] == expected
        assert changes(before) == set()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_loading_survives_a_default_dtype_that_another_thread_sets_for_a_moment(tmp_path: Path) -> None:
    """A decorator of transformers 4 would restore what another thread had set when the loading began."""
    model = transformers.Dinov2Model(transformers.Dinov2Config(hidden_size=32, num_attention_heads=2))
    model.save_pretrained(tmp_path)
    real = transformers.Dinov2Config.__init__

    def reset(self: Any, *args: Any, **kwargs: Any) -> None:
        torch.set_default_dtype(torch.float32)
        real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.Dinov2Config, "__init__", reset)
        torch.set_default_dtype(torch.bfloat16)
        load_pretrained(transformers.Dinov2Model, tmp_path, torch.float32)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Dinov2ForImageClassification", "DINOv3ViTModel", "SiglipVisionModel"])
def test_model_is_loaded_as_transformers_loads_it(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Their buffers include some that no file holds: a table of frequencies, and numbers of positions."""
    model_class = getattr(transformers, name)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 48}
    model = model_class(model_class.config_class(**sizes)).to(dtype)
    model.save_pretrained(tmp_path)
    wanted, report = model_class.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    found, found_report = load_pretrained(model_class, tmp_path, dtype)
    assert found_report == report
    assert type(found).__name__ == name
    tensors = {**dict(wanted.named_parameters()), **dict(wanted.named_buffers())}
    others = {**dict(found.named_parameters()), **dict(found.named_buffers())}
    assert tensors.keys() == others.keys()
    for key, value in tensors.items():
        assert (value.dtype, value.device) == (others[key].dtype, others[key].device), key
        assert torch.equal(value, others[key]), key


def test_empty_weights_need_no_memory_and_computed_values_are_real() -> None:
    with empty_weights(torch.bfloat16):
        layer = nn.Linear(1 << 20, 1 << 20)
        nn.init.trunc_normal_(layer.weight)
        rates = torch.linspace(0, 1, 3).tolist()
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.bfloat16)
    assert rates == [0, 0.5, 1]
    assert nn.Linear(1, 1).weight.device.type == "cpu"


def test_checkpoint_with_unknown_classes_changes_no_safe_globals(tmp_path: Path) -> None:
    _, checkpoint = checkpoint_with_settings("a namespace")
    source = saved(checkpoint, tmp_path / "x.pth")
    output = api.convert(source, tmp_path / "out").output
    api.verify(output, source, device="cpu")
    with watched() as caller:
        found = api.verify(output, source, device="cpu")
    assert "streamconv read its tensors" not in found.check("parity").not_checked
    assert caller.changed == set()


AUTHORS_CODE = """
import time
from streamconv.families.registry import find_model
from streamconv.verification.originals.dinov2 import build

time.sleep(0.05)

def dinov2_vits14(pretrained):
    model = build(find_model("dinov2_vits14")[1].dimensions)
    model.folder = __file__
    return model
"""


def test_authors_codes_in_two_threads_are_not_mixed_up(tmp_path: Path) -> None:
    """Both folders have a package of the same name, which torch.hub imports."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        (folder / "authors_package").mkdir(parents=True)
        (folder / "authors_package" / "__init__.py").write_text(AUTHORS_CODE)
        (folder / "hubconf.py").write_text("from authors_package import dinov2_vits14")
    plan: Any = SimpleNamespace(family_name="dinov2", model=find_model("dinov2_vits14")[1])
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda folder: build_original(plan, folder)[0], folders * 4))
    assert [Path(model.folder).parents[1] for model in models] == folders * 4
    assert "authors_package" not in sys.modules


def test_principal_components_are_those_of_torch() -> None:
    features = torch.randn(200, 24, generator=torch.Generator().manual_seed(1)) @ torch.diag(0.7 ** torch.arange(24))
    centred = features - features.mean(dim=0)
    _, _, wanted = torch.linalg.svd(centred, full_matrices=False)
    found = principal_components(centred)
    assert torch.allclose((wanted[:3] @ found).abs(), torch.eye(3), atol=1e-2)
