"""The model card of what is pushed: what it is, how to use it, what it was made from, and what was proven.

It is made from the folder's manifest and nothing else, so that it claims no more than was found.
huggingface_hub, which makes its header, is imported when a card is made.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from streamconv.errors import UsageError
from streamconv.families.base import Family, Model
from streamconv.families.registry import all_families, find_model

CARD_NAME = "README.md"
RANDOM = re.compile(r".*_synthetic_seed\d+(_head)?\.pth")  # as `synth.temporary_checkpoint` names them
VERDICTS = {True: "passed", False: "**FAILED**", None: "not run"}

# By the Hub's name for the task: transformers' class, and what to look at.
USES = {
    "image-feature-extraction": ("AutoModel", "print(model(**inputs).last_hidden_state.shape)"),
    "image-classification": (
        "AutoModelForImageClassification",
        "print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])",
    ),
}


def make_card(manifest: Mapping[str, Any], repo_id: str) -> str:
    """The text of README.md for a finished conversion in the repository ``repo_id``."""
    from huggingface_hub import ModelCard, ModelCardData

    architecture = str(manifest.get("architecture"))
    family = next((family for family in all_families() if architecture in family.pipeline_tags), None)
    published = _published(manifest)
    task = family.pipeline_tags[architecture] if family else None
    data = ModelCardData(
        license=published[1].licence if published else None,
        base_model=f"{published[0].organisation}/{published[1].published_name}" if published else None,
        library_name="transformers",
        pipeline_tag=task,
        tags=[*([family.name] if family else []), "streamconv", *(["random-weights"] if _is_random(manifest) else [])],
    )
    sections = [
        f"# {repo_id.split('/')[-1]}",
        *_warnings(manifest),
        _origin(manifest),
        *(["## Use", _use(repo_id, task)] if task else []),
        "## Provenance",
        "\n".join(_provenance(manifest)),
        "## Verification",
        "\n".join(_verification(manifest.get("verification") or {})),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def is_ours(card: str) -> bool:
    """Whether a card is one of `make_card`'s, which may be made anew."""
    return bool(re.search(r"^Converted to Hugging Face's format by streamconv \S+ from ", card, re.MULTILINE))


def _sources(manifest: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return manifest.get("source") or {}


def _is_random(manifest: Mapping[str, Any]) -> bool:
    return any(RANDOM.fullmatch(str(file.get("file"))) for file in _sources(manifest).values())


def _published(manifest: Mapping[str, Any]) -> tuple[Family, Model] | None:
    """The model whose authors' files these are by their names; of others, no licence and no origin is claimed.

    Shapes alone say "dinov2_vits14" of someone's fine-tuned file, too.
    """
    try:
        family, model = find_model(str(manifest.get("model")))
    except UsageError:
        return None
    theirs = {"backbone": model.backbone.filename, **({"head": model.head.filename} if model.head else {})}
    ours = {role: file.get("file") for role, file in _sources(manifest).items()}
    return (family, model) if ours == theirs else None


def _warnings(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What must be known before anything else."""
    verification = manifest.get("verification")
    if not verification:
        yield "> **Not verified.** These files were converted, and never compared with what they were made from."
    elif not verification.get("passed"):
        yield "> **Verification failed. Do not use this model.** What differs is listed at the end."
    if _is_random(manifest):
        yield "> **Random weights.** They were made for a test and have learned nothing."


def _origin(manifest: Mapping[str, Any]) -> str:
    version = (manifest.get("versions") or {}).get("streamconv")
    names = " and ".join(_code(file.get("file")) for file in _sources(manifest).values())
    published = _published(manifest)
    model = f"{published[1].name}, as its authors published it" if published else "a model in its authors' format"
    licence = "" if published else " Its licence is not known to streamconv: whoever publishes it should add it."
    return f"Converted to Hugging Face's format by streamconv {version} from {names}, {model}.{licence}"


def _use(repo_id: str, task: str) -> str:
    kind, shown = USES[task]
    lines = (
        "from PIL import Image",
        f"from transformers import AutoImageProcessor, {kind}",
        f'processor, model = (each.from_pretrained("{repo_id}") for each in (AutoImageProcessor, {kind}))',
        'inputs = processor(images=Image.open("picture.jpg"), return_tensors="pt")',
        shown,
    )
    return "```python\n" + "\n".join(lines) + "\n```"


def _provenance(manifest: Mapping[str, Any]) -> Iterator[str]:
    yield "| made from | bytes | fingerprint |"
    yield "|---|---|---|"
    for file in _sources(manifest).values():
        address = f", {_code(file['address'])}" if file.get("address") else ""
        yield f"| {_code(file.get('file'))}{address} | {file.get('size', 0):,} | {_code(file.get('fingerprint'))} |"
    yield ""
    yield "| file | bytes | sha256 |"
    yield "|---|---|---|"
    for name, file in (manifest.get("files") or {}).items():
        yield f"| {_code(name)} | {file.get('size', 0):,} | {_code(file.get('sha256'))} |"
    yield ""
    yield from (f"{_cell(note)}.\n" for note in manifest.get("notes") or ())
    yield from (f"Left out: {_code(each)}.\n" for each in manifest.get("skipped") or ())
    if isinstance(cast := manifest.get("cast"), dict):
        yield f"The weights were cast from {_code(cast.get('from'))} to {_code(cast.get('to'))}."
        overflow_count = sum(file.get("overflow_count", 0) for file in (manifest.get("files") or {}).values())
        if overflow_count:
            yield f"Beyond its range, and infinite now, are {overflow_count:,} values that were finite."
    if manifest.get("is_crc_checked"):
        yield "A fingerprint is a sha256 over the names, sizes and CRC-32s of a file's records."
        yield "Every byte read was checked against its CRC-32."
    else:
        yield "The source carries no CRC-32s, so that its bytes could not be checked for damage."


def _verification(found: Mapping[str, Any]) -> Iterator[str]:
    if not found:
        yield "None was run."
        return
    yield "| check | result | what it proves |"
    yield "|---|---|---|"
    for check in found.get("checks") or ():
        passed = check.get("passed")
        proves = f"not so: {check.get('proves')}" if passed is False else check.get("proves")
        not_checked = check.get("not_checked")
        text = f"{proves}. But {not_checked}." if not_checked else proves
        yield f"| {_cell(check.get('name'))} | {VERDICTS[passed]} | {_cell(text)} |"
    for check in found.get("checks") or ():
        numbers = check.get("numbers") or {}
        if "largest" in numbers:
            yield f"\nLargest difference in any layer: {numbers['largest']}; allowed: {numbers.get('tolerance')}."
    for problem in (problem for check in found.get("checks") or () for problem in check.get("problems") or ()):
        yield f"\n- {_cell(problem)}"
    if found.get("device"):
        versions = ", ".join(f"{name} {version}" for name, version in (found.get("versions") or {}).items())
        yield f"\nRun on {_cell(found['device'])} with {_cell(versions)}."


def _code(text: object) -> str:
    """As code in a table's cell, whatever a file's name holds."""
    return "`" + re.sub(r"[`|\s]+", " ", str(text).encode("utf-8", "replace").decode()).strip() + "`"


def _cell(text: object) -> str:
    """As plain text in a table's cell: no markup, and on one line."""
    line = " ".join(str(text).encode("utf-8", "replace").decode().split())
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", line)
