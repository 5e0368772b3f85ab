"""What a token may do is read from the Hub's answer to whoami, before anything is converted."""

import re
from typing import Any

import pytest

from streamconv.hub.rights import missing_right
from tests.hub_server import fine_grained, who

READ, WRITE = {"role": "read"}, {"role": "write"}


@pytest.mark.parametrize(
    ("user", "repo", "reason"),
    [
        (who(WRITE), "ada/x", None),
        (who(WRITE), "Ada/x", None),
        (who(READ), "ada/x", "read-only"),
        (who(WRITE), "eve/x", "eve is neither your account, ada, nor an organisation"),
        (who(WRITE, lab="write"), "lab/x", None),
        (who(WRITE, lab="contributor"), "LAB/x", None),
        (who(WRITE, lab="read"), "lab/x", "your role in lab is read-only"),
        (who(fine_grained("repo.content.read")), "ada/x", "read-only"),
        (who(fine_grained("repo.content.read", "repo.write")), "ada/x", None),
        (who(fine_grained("repo.write"), lab="admin"), "lab/x", "can write only to ada$"),
        (who(fine_grained(lab=["repo.write"]), lab="admin"), "lab/x", None),
        (who(fine_grained(lab=["repo.write"], mit=["repo.write"])), "ada/x", "can write only to lab and mit$"),
        (who(fine_grained()), "ada/x", "read-only"),
    ],
)
def test_missing_right_is_named(user: dict[str, Any], repo: str, reason: str | None) -> None:
    for exists in (True, False):
        found = missing_right(user, repo, exists=exists, create_pr=False)
        assert found is None if reason is None else re.search(reason, found or "")


def test_token_for_one_repository_writes_to_it_once_it_exists() -> None:
    user = who(fine_grained(ada__x=["repo.write"]))
    assert missing_right(user, "ada/x", exists=True, create_pr=False) is None
    assert missing_right(user, "ada/x", exists=False, create_pr=False) == "the token can write only to ada/x"
    assert missing_right(user, "ada/y", exists=True, create_pr=False) == "the token can write only to ada/x"


@pytest.mark.parametrize(
    "token", [WRITE, fine_grained(everywhere=["discussion.write"]), fine_grained("discussion.write")]
)
def test_pull_request_needs_no_right_to_write_to_the_repository(token: dict[str, Any]) -> None:
    assert missing_right(who(token), "eve/x", exists=True, create_pr=True) is None
    assert missing_right(who(token), "eve/x", exists=False, create_pr=True) is not None  # it would have to be created
    assert missing_right(who(READ), "eve/x", exists=True, create_pr=True) == "the token is read-only"


@pytest.mark.parametrize(
    "user",
    [
        {"name": "ada"},
        {"name": "ada", "auth": None},
        {"name": "ada", "auth": {"type": "oauth"}},
        {"name": "ada", "auth": {"accessToken": {"role": "fineGrained"}}},
        {"name": "ada", "auth": {"accessToken": {"role": "write"}}},  # without the organisations
        {"name": "ada", "orgs": [], "auth": {"accessToken": {"role": "a new one"}}},
    ],
)
def test_rights_that_the_answer_does_not_show_are_not_refused(user: dict[str, Any]) -> None:
    assert missing_right(user, "lab/x", exists=False, create_pr=False) is None
