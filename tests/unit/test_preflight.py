"""The verification's options are checked by a process that finds the same modules as this one."""

import sys
from pathlib import Path

import pytest

from streamconv import UsageError
from streamconv.verification.preflight import check_arguments


def test_modules_of_the_current_folder_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "path"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "accelerate.py").write_text(f"import sys\nprint('from {name}')\nsys.exit(2)")
    monkeypatch.delitem(sys.modules, "torch", raising=False)  # or no process would be started
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="from path"):
        check_arguments("cpu", "image.png", "builtin")
