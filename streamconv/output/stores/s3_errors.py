"""Explains why a request to S3 failed, whether the same request may succeed later, and what to do about it."""

from dataclasses import dataclass
from typing import Any

from streamconv.display import visible
from streamconv.files.address import Address
from streamconv.output.stores.store import MAX_REASON, StoreError
from streamconv.redaction import redacted

MISSING = frozenset({"NoSuchKey", "404"})
LOST = frozenset({"NoSuchUpload", "InvalidPart"})
_NOT_IMPLEMENTED = 501
_THROTTLED = frozenset(
    {"SlowDown", "503", "429", "Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded"}
)
_MAY_PASS = _THROTTLED | {"RequestTimeout", "BadDigest", "IncompleteBody", "OperationAborted", "InternalError"}
_REFUSED = frozenset({"AccessDenied", "403", "401", "AllAccessDisabled", "AccountProblem"})
_UNKNOWN_USER = frozenset(
    {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "NoCredentialsError"}
)


@dataclass(frozen=True)
class Failure:
    """A failed request. ``code`` is the store's own, such as "SlowDown", or the name of an exception."""

    code: str
    reason: str
    may_pass: bool

    @classmethod
    def of(cls, error: Exception, address: Address) -> "Failure":
        """Classify what s3fs or botocore raised. The reason is safe to show."""
        response = _response_of(error)
        details = response.get("Error") or {}
        code = str(details.get("Code") or type(error).__name__)
        text = redacted(str(details.get("Message") or error), address.secrets)
        reason = f"{code}: {text}" if text and text != code else code
        status = (response.get("ResponseMetadata") or {}).get("HTTPStatusCode", 0)
        may_pass = (
            code in _MAY_PASS or (status >= 500 and status != _NOT_IMPLEMENTED) if response else not _is_final(error)
        )
        return cls(visible(code), visible(reason, MAX_REASON).removesuffix("."), may_pass)


def _response_of(error: BaseException) -> dict[str, Any]:
    """Return the response to a request, as botocore parsed it; empty if there was none."""
    for each in (error, error.__cause__):
        if isinstance(response := getattr(each, "response", None), dict):
            return response
    return {}


def _is_final(error: Exception) -> bool:
    """Return whether an error without a response cannot be one of the network's."""
    from botocore.exceptions import BotoCoreError, ConnectionError, HTTPClientError
    from botocore.parsers import ResponseParserError

    return isinstance(error, BotoCoreError) and not isinstance(
        error, (ConnectionError, HTTPClientError, ResponseParserError)
    )


def explained(failure: Failure, operation: str, address: Address, bucket: str, tries: int) -> StoreError:
    """Return the error for a request that failed for good, after a number of ``tries``."""
    reason = failure.reason if tries == 1 else f"{failure.reason} (tried {tries} times)"
    code = failure.code
    if code == "NoSuchBucket" or (code == "404" and operation == "list_objects_v2"):
        problem = (
            f"there is no bucket {bucket}. Create it, or check the URL and the store's address (AWS_ENDPOINT_URL)."
        )
    elif code == "RequestTimeTooSkewed":
        problem = (
            f"the clock of this machine differs too much from the store's ({reason}). Set the clock, and run the same "
            "command again; it resumes."
        )
    elif code in _UNKNOWN_USER:
        problem = f"the store does not accept your credentials ({reason}). Check or renew them (AWS_PROFILE, …)."
    elif code in _REFUSED:
        problem = (
            f"the store refuses {operation} ({reason}). Your credentials must be allowed to list, read, write and "
            "delete objects there, and to list and abort multipart uploads."
        )
    elif code in _THROTTLED:
        problem = (
            f"the store asks for fewer requests: {reason}. Run the same command again later, or fewer processes at "
            "once; it resumes."
        )
    elif failure.may_pass:
        problem = f"{reason}. Check the network and the store, and run the same command again; it resumes."
    else:
        problem = f"{reason}. Check the URL and your credentials."
    return StoreError(f"{address} cannot be written: {problem}", code)
