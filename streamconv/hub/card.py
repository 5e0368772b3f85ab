"""The model card of a pushed model: what it is, how to use it, its origin, and what was verified.

The card is generated from the folder's manifest alone, so it cannot claim more than the manifest records.
huggingface_hub, which writes the card's front matter, is imported only when a card is made.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streamconv.display import visible
from streamconv.errors import OutputError
from streamconv.families.base import Family
from streamconv.families.registry import all_families
from streamconv.hub.names import published_model
from streamconv.output.manifest import MANIFEST_NAME, Manifest
from streamconv.planning.plan import IMAGE_PROCESSOR_NAME

CARD_NAME = "README.md"
# The first words of the comment in a generated card; the rest of the comment is for the reader.
MARKER = "<!-- streamconv:generated-card"
RANDOM_TAG = "random-weights"
MAX_LENGTH = 500  # characters of one text from elsewhere
_MARKUP = re.compile(
    r"[\\`*{}\[\]<>|#~$&@]"  # Markdown's and GitHub's punctuation, and TeX's
    r"|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # but not within a word, where it is no markup
    r"|:(?=//)|(?<=www)\."  # of an address, which would become a link
    r"|^[-+=]|(?<=^\d)[.)](?= |$)",  # what begins a list or underlines a heading
    re.IGNORECASE,
)
NOT_REPEATED = (
    f"**As recorded in {MANIFEST_NAME} by whoever made this folder.** Whoever published it did not repeat the "
    "verification."
)
VERDICTS = {True: "passed", False: "**FAILED**", None: "not run"}

# The Hub's name of a task: transformers' class for it, and the last line of the example.
USAGE = {
    "image-feature-extraction": ("AutoModel", "print(model(**inputs).last_hidden_state.shape)"),
    "image-classification": (
        "AutoModelForImageClassification",
        "print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])",
    ),
}


def make_card(
    manifest: Manifest,
    repo_id: str,
    license: str | None = None,
    tags: Sequence[str] = (),
    *,
    was_verified_here: bool = True,
) -> str:
    """Generate README.md for a finished conversion in the repository ``repo_id``.

    Args:
        license: The licence that the user gave, by its name on the Hub.
        tags: The user's tags, which are added to ours.
        was_verified_here: This machine reached the recorded verdict, if there is one.

    Raises:
        OutputError: the recorded verdict is damaged.
    """
    from huggingface_hub import ModelCard

    architecture = manifest.architecture
    family = next((family for family in all_families() if architecture in family.pipeline_tags), None)
    published = published_model(manifest)
    task = family.pipeline_tags[architecture] if family else None
    metadata = front_matter(
        license or (published[1].licence if published else None),
        [*_tags(manifest, family), *tags],
        base_model=f"{published[0].organisation}/{published[1].published_name}" if published else None,
        library_name="transformers",
        pipeline_tag=task,
    )
    sections = [
        f"# {repo_id.split('/')[-1]}",
        f"{MARKER} The next push replaces this card. Delete this line to keep your own changes. -->",
        *_warnings(manifest),
        _origin(manifest, license),
        *(["## Usage", _usage(repo_id, task, manifest)] if task else []),
        "## Provenance",
        "\n".join(_provenance(manifest, was_verified_here)),
        "## Verification",
        *([NOT_REPEATED] if manifest.verification and not was_verified_here else []),
        "\n".join(_recorded_verification(manifest)),
    ]
    return str(ModelCard(f"{metadata}\n" + "\n\n".join(sections) + "\n"))


def front_matter(license: str | None, tags: Sequence[str], **more: Any) -> str:
    """Return a card's metadata, with each tag once."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(license=license, tags=list(dict.fromkeys(tags)) or None, **more)
    return f"---\n{data.to_yaml()}\n---\n"


def kept_metadata(card: str) -> tuple[str | None, list[str]]:
    """Return the licence and the tags that were added to a generated card; its successor keeps them.

    A published model's card has its authors' licence, which is not kept: its successor may be of another model.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        data: dict[str, Any] = ModelCard(card).data.to_dict()  # type: ignore[no-untyped-call]
    except (ValueError, YAMLError):
        return None, []
    ours = {family.name for family in all_families()} | {"streamconv", RANDOM_TAG}
    license, tags = data.get("license"), data.get("tags")
    added = [tag for tag in tags if isinstance(tag, str) and tag not in ours] if isinstance(tags, list) else []
    return (license if isinstance(license, str) and "base_model" not in data else None), added


def is_ours(card: str) -> bool:
    """True if the card was written by `make_card` and may be replaced."""
    return any(line.startswith(MARKER) for line in card.splitlines())


def _is_synthetic(manifest: Manifest) -> bool:
    """Return whether the weights are random."""
    return any(file.synthetic for file in manifest.source.values())


def _warnings(manifest: Manifest) -> Iterator[str]:
    """Warnings that come before everything else."""
    verification = manifest.verification
    if not verification:
        yield "> **Not verified.** These files were converted, but never compared with their source."
    elif not verification.get("passed"):
        yield "> **Verification failed. Do not use this model.** The differences are listed at the end."
    if _is_synthetic(manifest):
        yield "> **Random weights.** They were generated for a test; the model has not been trained."


def _tags(manifest: Manifest, family: Family | None) -> Iterator[str]:
    if family is not None:
        yield family.name
    yield "streamconv"
    if _is_synthetic(manifest):
        yield RANDOM_TAG


def _origin(manifest: Manifest, license: str | None) -> str:
    version = manifest.versions.get("streamconv")
    names = " and ".join(_code(file.file) for file in manifest.source.values())
    published = published_model(manifest)
    shape = manifest.shaped_like or manifest.model
    model = f", a model shaped like {_cell(shape)}" if shape else ""  # whose format the manifest does not record
    if published:
        model = f", {published[1].name}, as its authors published it"
        if not all(file.address for file in manifest.source.values()):
            model = f", {published[1].name}, whose published name holds the first digits of its sha256"
    licence = "" if published or license else " streamconv does not know its licence: please add it before publishing."
    return f"Converted to the Hugging Face format by streamconv {_cell(version)} from {names}{model}.{licence}"


def _usage(repo_id: str, task: str, manifest: Manifest) -> str:
    auto_class, last_line = USAGE[task]
    lines: tuple[str, ...] = (
        "from PIL import Image",
        f"from transformers import AutoImageProcessor, {auto_class}",
        f'processor, model = (each.from_pretrained("{repo_id}") for each in (AutoImageProcessor, {auto_class}))',
        'inputs = processor(images=Image.open("picture.jpg"), return_tensors="pt")',
        last_line,
    )
    if not _takes_pictures(manifest):
        lines = (
            "import torch",
            f"from transformers import {auto_class}",
            f'model = {auto_class}.from_pretrained("{repo_id}")',
            "channels, size = model.config.num_channels, model.config.image_size",
            'inputs = {"pixel_values": torch.rand(1, channels, size, size)}  # prepared as in the model\'s training',
            last_line,
        )
    return "```python\n" + "\n".join(lines) + "\n```"


def _takes_pictures(manifest: Manifest) -> bool:
    """Return whether there is an image processor, for images of three channels."""
    given = manifest.image_processor.config.get("image_mean") if manifest.image_processor is not None else None
    return IMAGE_PROCESSOR_NAME in manifest.files and not (isinstance(given, list) and len(given) != 3)


def _provenance(manifest: Manifest, was_verified_here: bool) -> Iterator[str]:
    yield "| source file | bytes | fingerprint |"
    yield "|---|---|---|"
    for file in manifest.source.values():
        address = f", {_code(file.address)}" if file.address else ""
        digest = f", sha256 {_code(file.sha256)}" if file.sha256 else ""
        yield f"| {_code(file.file)}{address}{digest} | {file.size:,} | {_code(file.fingerprint)} |"
    yield ""
    yield "| file | bytes | sha256 |"
    yield "|---|---|---|"
    for name, written in manifest.current_files.items():
        yield f"| {_code(name)} | {written.size:,} | {_code(written.sha256)} |"
    yield ""
    yield from (f"{_cell(note)}.\n" for note in manifest.notes)
    yield from (f"Skipped: {_code(each)}.\n" for each in manifest.skipped)
    yield from (f"Edited after the conversion: {_code(name)}.\n" for name in sorted(manifest.edited))
    if manifest.cast is not None:
        yield f"The weights were cast from {_code(manifest.cast.get('from'))} to {_code(manifest.cast.get('to'))}."
        overflow_count = sum(written.overflow_count for written in manifest.files.values())
        if overflow_count:
            yield f"{overflow_count:,} finite values were outside its range and are now infinite."
    yield "A fingerprint is the sha256 of a source's index: names, sizes and, if the file has them, CRC-32s."
    if manifest.is_crc_checked:
        claim = "very byte that was read matched its CRC-32."
        yield f"E{claim}" if was_verified_here else f"As {MANIFEST_NAME} records, e{claim}"
    else:
        yield (
            "The source has no CRC-32s, so its bytes could not be checked for damage, and the fingerprint does not "
            "cover its weights."
        )


def _recorded_verification(manifest: Manifest) -> list[str]:
    """Return the lines about the recorded verdict, which is JSON that another version or another person wrote."""
    try:
        return [*_verification(manifest.verification or {})]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise OutputError(
            f"{MANIFEST_NAME} is damaged: its field verification is not the record of a verification ({error}). "
            "Verify the folder against its source, which records it again."
        ) from error


def _verification(verification: Mapping[str, Any]) -> Iterator[str]:
    if not verification:
        yield "No check was run."
        return
    yield "| check | result | finding |"
    yield "|---|---|---|"
    for check in verification.get("checks") or ():
        result = VERDICTS[check["passed"] if isinstance(check.get("passed"), bool) else None]
        not_checked = check.get("not_checked")
        found = check.get("finding") or check.get("proves")
        text = f"{found}. But {not_checked}." if not_checked else found
        yield f"| {_cell(check.get('name'))} | {result} | {_cell(text)} |"
    for check in verification.get("checks") or ():
        numbers = check.get("numbers") or {}
        if "largest" in numbers:
            pixels = f" at {_cell(numbers['size'])}x{_cell(numbers['size'])}" if "size" in numbers else ""
            arithmetic = ", in a second pass in float64" if "float32" in numbers else ""
            largest, allowed = (float(numbers.get(key, "nan")) for key in ("largest", "tolerance"))
            yield f"\nLargest difference in any layer{pixels}{arithmetic}: {largest:.3g} (allowed: {allowed:g})."
        if check.get("passed") and (published := numbers.get("as_published")):
            found = ", ".join(f"{float(difference):.3g} ({_cell(name)})" for name, difference in published.items())
            yield (
                "\nBy design, not an error: transformers resizes position embeddings slightly differently from the "
                f"authors' code, which changes outputs by up to {found}."
            )
    if cast_cost := (verification.get("conclusion") or {}).get("cast_cost"):
        yield f"\n{_cell(cast_cost)}"
    for problem in (problem for check in verification.get("checks") or () for problem in check.get("problems") or ()):
        yield f"\n- {_cell(problem)}"
    if verification.get("device"):
        versions = ", ".join(f"{name} {version}" for name, version in (verification.get("versions") or {}).items())
        date = str(verification.get("date") or "").replace("T", " ").replace("+00:00", " UTC")
        yield f"\nRun on {_cell(verification['device'])} with {_cell(versions)}{f', {_cell(date)}' if date else ''}."
    if reference := verification.get("reference"):
        code = "streamconv's own" if reference == "builtin" else _cell(reference)
        yield f"Original model's code: {code}."


def _code(text: object) -> str:
    """``text`` as code in a table cell, safe for any file name."""
    return f"`{re.sub(r'[`| ]+', ' ', visible(str(text), MAX_LENGTH)).strip() or ' '}`"


def _cell(text: object) -> str:
    """``text`` as plain text in a paragraph or a table cell: on one line, with markup escaped."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(visible(str(text), MAX_LENGTH).split()))
