"""The model card of a pushed model: what it is, how to use it, its origin, and what was verified.

The card is generated from the folder's manifest alone, so it cannot claim more than the manifest records.
huggingface_hub, which writes the card's front matter, is imported only when a card is made.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streamconv.families.base import Family, Model
from streamconv.families.registry import all_families
from streamconv.hub.markdown import as_code, as_text
from streamconv.hub.names import published_model
from streamconv.hub.verification_section import verification_section
from streamconv.output.manifest import MANIFEST_NAME, Manifest
from streamconv.planning.plan import IMAGE_PROCESSOR_NAME

CARD_NAME = "README.md"
# The first words of the comment in a generated card; the rest of the comment is for the reader.
MARKER = "<!-- streamconv:generated-card"
RANDOM_TAG = "random-weights"
_LICENCE_KEYS = ("license", "license_name", "license_link")

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
    licence: Mapping[str, str] | None = None,
    tags: Sequence[str] = (),
    *,
    was_verified_here: bool = True,
) -> str:
    """Generate README.md for a finished conversion in the repository ``repo_id``.

    Args:
        licence: The entries for a licence that the user gave or that an earlier card had; see `licence_entries`.
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
        [*_tags(manifest, family), *tags],
        **licence_entries(licence or {}, published[1] if published else None),
        base_model=f"{published[0].organisation}/{published[1].published_name}" if published else None,
        library_name="transformers",
        pipeline_tag=task,
    )
    sections = [
        f"# {repo_id.split('/')[-1]}",
        f"{MARKER} The next push replaces this card. Delete this line to keep your own changes. -->",
        *_warnings(manifest),
        _origin(manifest, licence),
        *(["## Usage", _usage(repo_id, task, manifest)] if task else []),
        "## Provenance",
        "\n".join(_provenance(manifest, was_verified_here)),
        "## Verification",
        *verification_section(manifest, was_verified_here=was_verified_here),
    ]
    return str(ModelCard(f"{metadata}\n" + "\n\n".join(sections) + "\n"))


def licence_entries(given: Mapping[str, str], published: Model | None) -> Mapping[str, str]:
    """Return a card's entries for a licence that was given, or else for that of a published model.

    A licence that the Hub does not know is the licence "other" with a name and a link.
    """
    if published is None or given.get("license") not in (None, published.licence):
        return given
    if not published.licence_link:
        return {"license": published.licence}
    return {"license": "other", "license_name": published.licence, "license_link": published.licence_link}


def front_matter(tags: Sequence[str], **more: Any) -> str:
    """Return a card's metadata, with each tag once."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(tags=list(dict.fromkeys(tags)) or None, **more)
    return f"---\n{data.to_yaml()}\n---\n"


def kept_metadata(card: str) -> tuple[dict[str, str], list[str]]:
    """Return the licence's entries and the tags that were added to a generated card; its successor keeps them.

    A published model's card has its authors' licence, which is not kept: its successor may be of another model.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        data: dict[str, Any] = ModelCard(card).data.to_dict()  # type: ignore[no-untyped-call]
    except (ValueError, YAMLError):
        return {}, []
    ours = {family.name for family in all_families()} | {"streamconv", RANDOM_TAG}
    tags = data.get("tags")
    added = [tag for tag in tags if isinstance(tag, str) and tag not in ours] if isinstance(tags, list) else []
    licence = {key: data[key] for key in _LICENCE_KEYS if isinstance(data.get(key), str) and "base_model" not in data}
    return licence, added


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


def _origin(manifest: Manifest, given: Mapping[str, str] | None) -> str:
    version = manifest.versions.get("streamconv")
    names = " and ".join(as_code(file.file) for file in manifest.source.values())
    published = published_model(manifest)
    shape = manifest.shaped_like or manifest.model
    model = f", a model shaped like {as_text(shape)}" if shape else ""  # whose format the manifest does not record
    if published:
        model = f", {published[1].name}, as its authors published it"
        if not all(file.address for file in manifest.source.values()):
            model = f", {published[1].name}, whose published name holds the first digits of its sha256"
    licence = "" if published or given else " streamconv does not know its licence: please add it before publishing."
    return f"Converted to the Hugging Face format by streamconv {as_text(version)} from {names}{model}.{licence}"


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
        address = f", {as_code(file.address)}" if file.address else ""
        digest = f", sha256 {as_code(file.sha256)}" if file.sha256 else ""
        yield f"| {as_code(file.file)}{address}{digest} | {file.size:,} | {as_code(file.fingerprint)} |"
    yield ""
    yield "| file | bytes | sha256 |"
    yield "|---|---|---|"
    for name, written in manifest.current_files.items():
        yield f"| {as_code(name)} | {written.size:,} | {as_code(written.sha256)} |"
    yield ""
    yield from (f"{as_text(note)}.\n" for note in manifest.notes)
    yield from (f"Skipped: {as_code(each)}.\n" for each in manifest.skipped)
    yield from (f"Edited after the conversion: {as_code(name)}.\n" for name in sorted(manifest.edited))
    if manifest.cast is not None:
        yield f"The weights were cast from {as_code(manifest.cast.get('from'))} to {as_code(manifest.cast.get('to'))}."
        overflow_count = sum(written.overflow_count for written in manifest.files.values())
        if overflow_count:
            yield f"{overflow_count:,} finite values were outside its range and are now infinite."
    yield "A fingerprint is the sha256 of a source's index: names, sizes and, if the file has them, CRC-32s."
    if manifest.is_crc_checked:
        source = "" if was_verified_here else f", according to {MANIFEST_NAME}"
        yield f"Every byte that was read matched its CRC-32{source}."
    else:
        yield (
            "The source has no CRC-32s, so its bytes could not be checked for damage, and the fingerprint does not "
            "cover its weights."
        )
