"""No size that a source's files state makes verification compute with images that take all memory."""

import json
from dataclasses import replace
from pathlib import Path

from streamconv import Verification
from tests import api
from tests.checkpoints import make_states, saved
from tests.support import tiny


def verified(folder: Path, positions: int, processor: dict[str, object]) -> Verification:
    source = saved(make_states(replace(tiny(layers=1), positions=positions))[0], folder / "x.pth")
    (folder / "mine.json").write_text(json.dumps({"image_processor_type": "BitImageProcessor", **processor}))
    api.convert(source, folder / "out", image_processor=folder / "mine.json", num_heads=2)
    found = api.verify(folder / "out", source, num_heads=2, device="cpu", thorough=True)
    assert found.passed
    return found


def test_models_are_not_compared_with_very_many_patches(tmp_path: Path) -> None:
    found = verified(tmp_path, 81 * 81 + 1, {"size": {"shortest_edge": 1_134}, "crop_size": 1_134})
    assert found.check("parity").numbers["size"] == 1_120
    assert found.check("native").passed is None
    assert found.check("preprocessing").passed


def test_image_processor_of_very_many_pixels_is_not_run(tmp_path: Path) -> None:
    found = verified(tmp_path, 17, {"size": {"shortest_edge": 10**6}})
    assert found.check("parity").numbers["size"] == 56
    assert found.check("preprocessing").passed is None
    assert "1000000" in found.check("preprocessing").not_checked
