"""Plans from names and shapes alone, against the keys and shapes of the authors' modules."""

from pathlib import Path

import pytest

from streamconv import MappingError
from streamconv.families.dinov2 import FAMILY
from streamconv.families.registry import all_families, family_named, find_model
from tests.support import GOLDEN, WEB_DINO, expanded, plan_of_shapes


@pytest.mark.parametrize("name", [model.name for family in all_families() for model in family.models])
def test_every_published_model_maps_the_authors_keys_to_transformers_keys(name: str, tmp_path: Path) -> None:
    assert name in GOLDEN, "add its keys to tests/golden, as streamconv/families/README.md describes"
    golden = GOLDEN[name]
    chunks = golden.get("chunks", ())
    source, target = (expanded(golden[side], golden["layers"], chunks) for side in ("source", "target"))
    plan = plan_of_shapes(source, tmp_path, find_model(name)[1].backbone.filename)
    assert plan.model is not None
    assert plan.model.name == name
    assert {name: tensor.info.shape for shard in plan.shards for name, tensor in shard.tensors} == target
    sources = family_named(plan.family_name).sources(plan.dimensions, plan.model.block_chunks)
    assert {key: info.shape for key, info in sources.items()} == source
    left_out = expanded({key: [] for key in golden.get("left_out", ())}, golden["layers"])
    assert [move.source for move in plan.mapping] == [key for key in sources if key not in left_out]
    assert plan.config.get("num_attention_heads") == golden["heads"]


def test_licenses_are_those_of_the_authors() -> None:
    """The licences are Apache 2.0 in DINOv2's README, and CC-BY-NC in Web-SSL's."""
    for model in FAMILY.models:
        assert model.licence == ("cc-by-nc-4.0" if model.name in WEB_DINO else "apache-2.0")


def test_dinov3_has_a_licence_of_its_own() -> None:
    """Both are in the metadata of the models on the Hub, and the link is in the authors' MODEL_CARD.md."""
    link = "https://ai.meta.com/resources/models-and-libraries/dinov3-license"
    models = [model for family in all_families() for model in family.models if model.name.startswith("dinov3")]
    assert {(model.licence, model.licence_link) for model in models} == {("dinov3-license", link)}


@pytest.mark.parametrize("name", WEB_DINO)
def test_shapes_shared_by_several_models_identify_none_of_them(name: str, tmp_path: Path) -> None:
    """Three Web-DINO models differ only in their training data, so only their names distinguish them."""
    golden = GOLDEN[name]
    plan = plan_of_shapes(expanded(golden["source"], golden["layers"], golden["chunks"]), tmp_path, "mine.pth")
    assert (plan.model is None) == (name[:14] in ("webssl_dino2b_", "webssl_dino3b_"))


def test_file_of_another_model_than_named_is_refused(tmp_path: Path) -> None:
    shapes = expanded(GOLDEN["dinov2_vitb14"]["source"], 12)
    with pytest.raises(MappingError, match="its shapes are those of dinov2_vitb14"):
        plan_of_shapes(shapes, tmp_path, model=find_model("dinov2_vits14")[1])
