"""The layers of the package, and what importing it costs."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import streamconv
from streamconv import verification
from streamconv.verification.preflight import PACKAGES
from tests.support import run_python


def test_imports_go_downwards_only() -> None:
    linter = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(linter, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout


def test_only_verification_imports_torch_and_other_large_packages() -> None:
    names = [
        module.name
        for module in pkgutil.walk_packages(streamconv.__path__, "streamconv.")
        if not module.name.startswith("streamconv.verification.") and module.name != "streamconv.__main__"
    ]
    assert {"streamconv.cli.commands", "streamconv.jobs.verify", "streamconv.families.dinov2"} <= set(names)
    code = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        "large = {'torch', 'numpy', 'transformers', 'accelerate', 'torchvision', 'PIL', 'rich', 'tqdm'}\n"
        "print(sorted(large & set(sys.modules)))"
    )
    assert run_python(code) == "[]\n"


def test_every_package_that_verification_imports_is_checked_for_before_the_work() -> None:
    trees = [ast.parse(file.read_text("utf-8")) for file in Path(verification.__path__[0]).rglob("*.py")]
    nodes = [node for tree in trees for node in tree.body]  # those inside functions are needed for a part only
    modules = [each.name for node in nodes if isinstance(node, ast.Import) for each in node.names]
    modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    imported = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"streamconv"}
    assert imported - {"safetensors", "numpy"} == PACKAGES.keys()  # transformers requires both


def test_unit_tests_import_no_torch() -> None:
    code = (
        "import sys, pytest\n"
        f"pytest.main(['--collect-only', '-q', '-n', '0', '-p', 'no:cacheprovider', {str(Path(__file__).parent)!r}])\n"
        "print([name for name in ('torch', 'transformers', 'torchvision') if name in sys.modules])"
    )
    assert run_python(code).splitlines()[-1] == "[]"


def test_package_lists_its_public_names() -> None:
    assert {name for name in dir(streamconv) if not name.startswith("__")} | {"__version__"} == {*streamconv.__all__}
