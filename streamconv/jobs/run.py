"""The whole job: convert a checkpoint, verify the result, and publish it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from os import fspath
from pathlib import Path
from typing import Any

from streamconv.errors import UsageError
from streamconv.files.address import local_path
from streamconv.hub.repository import Repository
from streamconv.jobs.conversion import Conversion, PreparedConversion
from streamconv.jobs.convert import convert_prepared
from streamconv.jobs.convert_to_hub import Verify, convert_to_hub
from streamconv.jobs.model_options import check_options, started_models
from streamconv.jobs.options import ConversionOptions, PushOptions, StrPath, VerificationOptions
from streamconv.jobs.output_location import CONVERT_FIRST
from streamconv.jobs.prepare import PreparedSource, local_copy, prepared_source
from streamconv.jobs.publish import Published, publish_folder
from streamconv.jobs.push_target import OnPush, ignore_target, open_repository
from streamconv.jobs.synth import synthetic_model, temporary_checkpoint
from streamconv.jobs.verify import verify_prepared, verify_uploaded, write_report
from streamconv.output.manifest import Manifest
from streamconv.planning.repeats import refuse_repeats
from streamconv.progress import Progress, ignore_progress, job
from streamconv.source.resolve import default_output
from streamconv.verification.process import ModelRunner
from streamconv.verification.result import Verification


@dataclass(frozen=True)
class RunResult:
    """The results of `run`. ``verification`` is None if none was requested, ``published`` if nothing was pushed."""

    conversion: Conversion
    verification: Verification | None = None
    published: Published | None = None

    @property
    def passed(self) -> bool:
        """True if the output was verified, and every check that ran passed."""
        return self.verification is not None and self.verification.passed

    def as_dict(self) -> dict[str, Any]:
        """Return the results for JSON."""
        return {
            **self.conversion.as_dict(),
            "verification": self.verification.as_dict() if self.verification is not None else None,
            "published": self.published.url if self.published is not None else None,
        }


@job
def run(
    source: StrPath,
    output: StrPath | None = None,
    conversion: ConversionOptions = ConversionOptions(),
    verification: VerificationOptions | None = VerificationOptions(),
    push: PushOptions | None = None,
    *,
    synthetic_seed: int | None = None,
    progress: Progress = ignore_progress,
    on_result: Callable[[Conversion | Verification], None] = lambda result: None,
    on_push: OnPush = ignore_target,
) -> RunResult:
    """Convert a checkpoint, verify the result against it, and publish it.

    Nothing is pushed unless verification passed or ``push.unverified`` is set.

    Args:
        source: A model's name, or the path or URL of a checkpoint (https://, hf://, s3://, …).
        output: The folder to write to; by default, the name that the model was published under.
        conversion: The options of `convert`.
        verification: The options of `verify`; None to convert only.
        push: None to publish nothing. With ``conversion.stream``, each shard is uploaded and deleted before the next.
        synthetic_seed: Generate a random checkpoint of the model ``source`` with this seed, and convert that.
        progress: Called with the bytes or steps of each stage. An exception that it raises ends the job: see
            `Cancelled`.
        on_result: Called with each result as soon as it is available, in the caller's thread; it may raise, too.
        on_push: Called with the repository that will be pushed to, before anything is converted; it may raise, too.

    Raises:
        UsageError: the options contradict each other, or something that they name does not exist.
        SourceError, OutputError: as for `convert`; the same call resumes.
        HubError: as for `publish`.

    A difference that verification finds is a result, not an error: see `RunResult.passed`.
    """
    if synthetic_seed is not None and conversion.head is not None:
        raise UsageError("A synthetic model has its own head. Omit --head.")
    check_requests(verification, push)
    output = output if output is not None else default_output(source)
    with ExitStack() as stack:
        models = None
        if verification is not None:
            # Torch is imported while this process converts. What the user named is known to exist before that.
            models = stack.enter_context(started_models(verification, progress))
        synthetic, repository = None, None
        if synthetic_seed is not None:
            synthetic = synthetic_model(fspath(source))
            output = synthetic.published_name if output is None else output
            if push is not None:  # a wrong repository is refused before the checkpoint is generated
                repository = open_repository(push, local_path(output, "output folder", CONVERT_FIRST), None)
                on_push(repository.target)
            source, conversion = stack.enter_context(
                _synthetic(fspath(source), output, conversion, synthetic_seed, progress)
            )
        prepared = stack.enter_context(
            prepared_source(source, conversion, progress, output=output, synthetic=synthetic)
        )
        if push is not None and repository is None:
            planned = PreparedConversion.of(prepared, output, force=conversion.force)
            repository = open_repository(push, planned.folder, planned.provenance)
            on_push(repository.target)
        if push is not None and repository is not None and conversion.stream:
            refuse_repeats(prepared.plan.shards, is_allowed=conversion.allow_repeats)
            return _run_to_hub(
                prepared, output, repository, push, verification, models, conversion.force, progress, on_result
            )
        converted, prepared = convert_prepared(prepared, output, conversion, progress, stack)
        on_result(converted)
        verified = None
        if verification is not None and models is not None:
            if not conversion.stream:
                prepared = stack.enter_context(local_copy(prepared, progress))
            verified = verify_prepared(Path(converted.output), prepared, verification, models, progress)
            on_result(verified)
            write_report(verified, verification)
    published = None
    if push is not None and repository is not None and (push.unverified or (verified is not None and verified.passed)):
        published = publish_folder(Path(converted.output), repository, progress, push)
    return RunResult(converted, verified, published)


def check_requests(verification: VerificationOptions | None, push: PushOptions | None) -> None:
    """Refuse impossible requests before hours of work.

    Raises:
        UsageError: what was not verified would be pushed; or see `check_options`.
        OutputError: see `check_options`.
    """
    if push is not None and verification is None and not push.unverified:
        raise UsageError("Unverified models are not pushed. Omit --no-verify, or push anyway with --push-unverified.")
    if verification is not None:
        check_options(verification)


def _run_to_hub(
    prepared: PreparedSource,
    output: StrPath | None,
    repository: Repository,
    push: PushOptions,
    verification: VerificationOptions | None,
    models: ModelRunner | None,
    force: bool,
    progress: Progress,
    on_result: Callable[[Conversion | Verification], None],
) -> RunResult:
    verify = _verify_with(verification, models, progress) if verification is not None and models is not None else None
    done = convert_to_hub(prepared, output, repository, verify, push=push, force=force, progress=progress)
    on_result(done.conversion)
    if verification is not None and done.verification is not None:
        on_result(done.verification)
        write_report(done.verification, verification)
    return RunResult(done.conversion, done.verification, done.published)


def _verify_with(options: VerificationOptions, models: ModelRunner, progress: Progress) -> Verify:
    def verify(prepared: PreparedSource, manifest: Manifest, folder: Path) -> Verification:
        return verify_uploaded(prepared, manifest, folder, options, models, progress)

    return verify


@contextmanager
def _synthetic(
    model: str, output: StrPath | None, conversion: ConversionOptions, seed: int, progress: Progress
) -> Iterator[tuple[StrPath, ConversionOptions]]:
    folder = local_path(output, "output folder", CONVERT_FIRST) if output is not None else None
    with temporary_checkpoint(model, folder, seed, progress) as made:
        yield made.backbone, replace(conversion, head=made.head)
