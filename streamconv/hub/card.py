"""The model card of a pushed model: what it is, how to use it, its origin, and what was verified.

The card is generated from the folder's manifest alone, so it cannot claim more than the manifest records.
huggingface_hub, which writes the card's front matter, is imported only when a card is made.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from streamconv.errors import UsageError
from streamconv.families.base import Family, Model
from streamconv.families.registry import all_families, find_model

CARD_NAME = "README.md"
# The first words of the comment in a generated card; the rest of the comment is for the reader.
MARKER = "<!-- streamconv:generated-card"
SYNTHETIC_NAME = re.compile(r".*_synthetic_seed\d+(_head)?\.pth")  # named by `synth.temporary_checkpoint`
VERDICTS = {True: "passed", False: "**FAILED**", None: "not run"}

# The Hub's name of a task: transformers' class for it, and the last line of the example.
USAGE = {
    "image-feature-extraction": ("AutoModel", "print(model(**inputs).last_hidden_state.shape)"),
    "image-classification": (
        "AutoModelForImageClassification",
        "print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])",
    ),
}


def make_card(manifest: Mapping[str, Any], repo_id: str) -> str:
    """Generate README.md for a finished conversion in the repository ``repo_id``."""
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
        tags=[
            *([family.name] if family else []),
            "streamconv",
            *(["random-weights"] if _is_synthetic(manifest) else []),
        ],
    )
    sections = [
        f"# {repo_id.split('/')[-1]}",
        f"{MARKER} The next push replaces this card. Delete this line to keep your own changes. -->",
        *_warnings(manifest),
        _origin(manifest),
        *(["## Usage", _usage(repo_id, task)] if task else []),
        "## Provenance",
        "\n".join(_provenance(manifest)),
        "## Verification",
        "\n".join(_verification(manifest.get("verification") or {})),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def is_ours(card: str) -> bool:
    """True if the card was written by `make_card` and may be replaced."""
    return any(line.startswith(MARKER) for line in card.splitlines())


def _sources(manifest: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return manifest.get("source") or {}


def _is_synthetic(manifest: Mapping[str, Any]) -> bool:
    """True if the weights are random. Nothing else in this module decides that."""
    return any(SYNTHETIC_NAME.fullmatch(str(file.get("file"))) for file in _sources(manifest).values())


def _published(manifest: Mapping[str, Any]) -> tuple[Family, Model] | None:
    """The published model, if all source files have its authors' file names.

    For other files, the card claims neither a licence nor an origin: a fine-tuned checkpoint has the same
    shapes, so the manifest's "model" alone proves nothing.
    """
    try:
        family, model = find_model(str(manifest.get("model")))
    except UsageError:
        return None
    published = {"backbone": model.backbone.filename, **({"head": model.head.filename} if model.head else {})}
    converted = {role: file.get("file") for role, file in _sources(manifest).items()}
    return (family, model) if converted == published else None


def _warnings(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Warnings that come before everything else."""
    verification = manifest.get("verification")
    if not verification:
        yield "> **Not verified.** These files were converted, but never compared with their source."
    elif not verification.get("passed"):
        yield "> **Verification failed. Do not use this model.** The differences are listed at the end."
    if _is_synthetic(manifest):
        yield "> **Random weights.** They were generated for a test; the model has not been trained."


def _origin(manifest: Mapping[str, Any]) -> str:
    version = (manifest.get("versions") or {}).get("streamconv")
    names = " and ".join(_code(file.get("file")) for file in _sources(manifest).values())
    published = _published(manifest)
    model = f"{published[1].name}, as its authors published it" if published else "a model in its authors' format"
    licence = "" if published else " streamconv does not know its licence: please add it before publishing."
    return f"Converted to the Hugging Face format by streamconv {version} from {names}, {model}.{licence}"


def _usage(repo_id: str, task: str) -> str:
    auto_class, last_line = USAGE[task]
    lines = (
        "from PIL import Image",
        f"from transformers import AutoImageProcessor, {auto_class}",
        f'processor, model = (each.from_pretrained("{repo_id}") for each in (AutoImageProcessor, {auto_class}))',
        'inputs = processor(images=Image.open("picture.jpg"), return_tensors="pt")',
        last_line,
    )
    return "```python\n" + "\n".join(lines) + "\n```"


def _provenance(manifest: Mapping[str, Any]) -> Iterator[str]:
    yield "| source file | bytes | fingerprint |"
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
    yield from (f"Skipped: {_code(each)}.\n" for each in manifest.get("skipped") or ())
    if isinstance(cast := manifest.get("cast"), dict):
        yield f"The weights were cast from {_code(cast.get('from'))} to {_code(cast.get('to'))}."
        overflow_count = sum(file.get("overflow_count", 0) for file in (manifest.get("files") or {}).values())
        if overflow_count:
            yield f"{overflow_count:,} finite values were outside its range and are now infinite."
    if manifest.get("is_crc_checked"):
        yield "A fingerprint is the sha256 of the names, sizes and CRC-32s of a file's records."
        yield "Every byte that was read matched its CRC-32."
    else:
        yield "The source has no CRC-32s, so its bytes could not be checked for damage."


def _verification(verification: Mapping[str, Any]) -> Iterator[str]:
    if not verification:
        yield "No check was run."
        return
    yield "| check | result | claim |"
    yield "|---|---|---|"
    for check in verification.get("checks") or ():
        passed = check.get("passed")
        not_checked = check.get("not_checked")
        text = f"{check.get('proves')}. But {not_checked}." if not_checked else check.get("proves")
        yield f"| {_cell(check.get('name'))} | {VERDICTS[passed]} | {_cell(text)} |"
    for check in verification.get("checks") or ():
        numbers = check.get("numbers") or {}
        if "largest" in numbers:
            yield f"\nLargest difference in any layer: {numbers['largest']}; allowed: {numbers.get('tolerance')}."
    for problem in (problem for check in verification.get("checks") or () for problem in check.get("problems") or ()):
        yield f"\n- {_cell(problem)}"
    if verification.get("device"):
        versions = ", ".join(f"{name} {version}" for name, version in (verification.get("versions") or {}).items())
        yield f"\nRun on {_cell(verification['device'])} with {_cell(versions)}."


def _code(text: object) -> str:
    """``text`` as code in a table cell, safe for any file name."""
    return "`" + re.sub(r"[`|\s]+", " ", str(text).encode("utf-8", "replace").decode()).strip() + "`"


def _cell(text: object) -> str:
    """``text`` as plain text in a table cell: on one line, with markup escaped."""
    line = " ".join(str(text).encode("utf-8", "replace").decode().split())
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", line)
