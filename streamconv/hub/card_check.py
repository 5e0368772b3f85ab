"""Asks the Hub whether it accepts a model card's metadata: it would refuse a wrong licence only after the upload."""

from streamconv.errors import UsageError
from streamconv.families.near_names import did_you_mean, near_names
from streamconv.hub.client import HubClient

LICENCES_URL = "https://huggingface.co/docs/hub/repositories-licenses"
# The names on the Hub of the licences that most models have, as suggestions; the Hub decides which it accepts.
FREQUENT_LICENCES = (
    "apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "cc0-1.0",
    "bsd-2-clause", "bsd-3-clause", "gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0", "openrail", "unlicense",
)  # fmt: skip


def check_card(text: str, title: str, license: str | None = None) -> None:
    """Require that the Hub accepts a model card.

    Args:
        text: The card, or only its front matter.
        title: What messages call it.
        license: The licence that the user gave for it.

    Raises:
        UsageError: the Hub does not accept it.
        HubError: the Hub cannot be asked.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    def refusal() -> str | None:
        try:
            ModelCard(text).validate()
        except (ValueError, YAMLError) as error:
            return str(error)
        return None

    if not text.startswith("---"):  # it has no metadata, which the Hub accepts
        return
    problem = HubClient().call(f"{title} cannot be checked", refusal)
    if problem is None:
        return
    fix = "Correct its metadata."
    if license is not None and license not in FREQUENT_LICENCES:
        fix = f"{did_you_mean(near_names(license, FREQUENT_LICENCES))} {LICENCES_URL} lists the licences.".lstrip()
    raise UsageError(f"The Hub does not accept {title}: {' '.join(problem.split()):.200}. {fix}")
