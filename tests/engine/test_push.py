"""`streamconv push`: a verified folder is published without converting it again, on a simulated Hub."""

import json
import subprocess
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import streamconv
from streamconv import Destination, HubError, PushOptions, PushTarget, UsageError
from streamconv.hub.client import HubClient
from streamconv.hub.names import published_model
from streamconv.output.journal import JOURNAL_NAME
from streamconv.output.manifest import Manifest, WrittenFile
from streamconv.source.outputs import remember_output, remember_verdict, without_foreign_claims
from tests import api
from tests.hub_server import TOKEN, HubServer, fine_grained, running, who
from tests.support import PUBLISHED, Save, contents, run, run_with_hub, sha256_of, tiny


@pytest.fixture
def folder(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A verified folder in several shards, as its manifest says, and this machine's memory."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    done = api.convert(save(tiny())[0], tmp_path / "mine", max_shard_size="1MB")
    record(done.output, {"passed": True})
    return done.output


def record(folder: Path, verification: dict[str, Any] | None) -> None:
    manifest = Manifest.read(folder)
    assert manifest is not None
    if verification is not None:
        files = {name: vars(file) for name, file in manifest.files.items()}
        verification = {**verification, "output": {"files": files}}
        remember_verdict(verification)
    (folder / "streamconv.json").write_bytes(replace(manifest, verification=verification).to_bytes())


def card(hub: HubServer, repository: str = "ada/mine") -> dict[str, Any]:
    metadata: dict[str, Any] = ModelCard(hub.files(repository)["README.md"].decode()).data.to_dict()
    return metadata


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_verified_folder_is_pushed_and_the_same_once_more_changes_nothing(tmp_path: Path, folder: Path) -> None:
    before = contents(folder)
    with running() as hub:
        done = run_with_hub(hub, tmp_path, "push", "mine")
        (_, (first, _)) = hub.repos["ada/mine"].branches["main"]
        assert lines(done) == [f"published: {hub.url}/ada/mine/commit/{first}"]
        place = f"pushing to {hub.url}/ada/mine, a new repository: public (add --private for a private one)"
        assert " ".join(done.stderr.split()).startswith(place)
        assert hub.files("ada/mine").items() >= before.items()
        again = run_with_hub(hub, tmp_path, "push", "mine", "ada/mine", "--json")
        assert json.loads(again.stdout) == {
            "repository": "ada/mine", "url": f"{hub.url}/ada/mine/commit/{first}", "private": False,
            "was_published": True,
        }  # fmt: skip
        assert "which is public" in again.stderr
        shown = lines(run_with_hub(hub, tmp_path, "push", "mine", "-q"))
        assert shown == []
        assert lines(run_with_hub(hub, tmp_path, "push", "mine"))[0].startswith("already published, nothing was")
        assert len(hub.repos["ada/mine"].branches["main"]) == 2
        assert set(hub.uploads.values()) == {1}
    assert contents(folder) == before


def test_interrupted_upload_is_resumed_and_nothing_is_visible_before(tmp_path: Path, folder: Path) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    with running() as hub:
        hub.fail(f"PUT /upload/{sha256_of(shards[1])}", status=403, body={"error": "no"})
        done = run_with_hub(hub, tmp_path, "push", "mine", "--private")
        assert (done.returncode, done.stdout) == (4, "")
        assert hub.files("ada/mine").keys() == {".gitattributes"}
        assert hub.repos["ada/mine"].private
        done = run_with_hub(hub, tmp_path, "push", "mine", "--private")
        assert "which is private" in done.stderr
        assert lines(done)[0].startswith("published: ")
        assert set(hub.uploads.values()) == {1}
        assert len(hub.uploads) == len(shards)


def test_branches_and_pull_requests_are_pushed_to(hub: HubServer, tmp_path: Path, folder: Path) -> None:
    hub.put("lab/theirs", {"config.json": b"{}"})
    done = run("push", folder, "lab/theirs", "--create-pr", cwd=tmp_path)
    assert done.stdout == f"published: {hub.url}/lab/theirs/discussions/1\n"
    assert run("push", folder, "it", "--revision", "v1", cwd=tmp_path).returncode == 0
    assert "config.json" in hub.files("ada/it", "v1")


@pytest.mark.parametrize(
    ("verification", "message"), [(None, "has not been verified"), ({"passed": False}, "failed verification")]
)
def test_folder_that_is_not_verified_is_refused_with_the_command_to_run(
    hub: HubServer, tmp_path: Path, folder: Path, verification: dict[str, Any] | None, message: str
) -> None:
    record(folder, verification)
    for words in ((), ("--dry-run",)):
        done = run("push", folder, *words, cwd=tmp_path, COLUMNS="300")
        assert done.returncode == 2
        assert f"{folder} {message}. Verify it first: `streamconv verify {folder} source.pth`." in done.stderr
    assert not hub.log
    manifest = json.loads((folder / "streamconv.json").read_bytes())
    for name in ("--reference=theirs", "\x1b[2J", "x" * 1_000):
        manifest["source"]["backbone"]["file"] = name
        (folder / "streamconv.json").write_text(json.dumps(manifest))
        assert f"Verify it first: `streamconv verify {folder} SOURCE`." in run("push", folder, cwd=tmp_path).stderr
    done = run("push", folder, "--unverified", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "erif" in hub.files("ada/mine")["README.md"].decode().partition("## Usage")[0]
    done = run("push", folder, "--push-unverified", cwd=tmp_path)
    assert done.stderr == "error: No such option --push-unverified. Did you mean --unverified?\n"


@pytest.mark.parametrize("name", ["README.md", "config.json", "streamconv.json"])
def test_target_of_a_link_is_not_published(hub: HubServer, tmp_path: Path, folder: Path, name: str) -> None:
    """Somebody else's folder may have a README.md that is a link to a token."""
    (tmp_path / "secret").write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"hf_secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    for words in ((), ("--dry-run",), ("--unverified",)):
        done = run("push", folder, *words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (4, "")
        assert f"{name} is a link. To publish the file" in done.stderr
    assert "ada/mine" not in hub.repos


def test_command_that_verifies_names_the_source(tmp_path: Path, folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert manifest is not None
    own = manifest.source["backbone"]
    for sources, model, words in (
        ({"backbone": replace(own, address="https://h/x.pth")}, None, "https://h/x.pth"),
        ({"backbone": replace(own, file="model.safetensors")}, None, "SOURCE"),
        ({"backbone": own, "head": replace(own, file="a head.pth")}, None, "source.pth --head 'a head.pth'"),
        (
            {"backbone": replace(own, file="dinov2_vits14_pretrain.pth", published=True)},
            "dinov2_vits14", "dinov2_vits14",
        ),
        (
            {"backbone": replace(own, file="dinov2_vits14_pretrain.pth", found_in_cache=True)},
            "dinov2_vits14", "dinov2_vits14",
        ),
    ):  # fmt: skip
        changed = replace(manifest, verification=None, source=sources, model=model)
        (folder / "streamconv.json").write_bytes(changed.to_bytes())
        with pytest.raises(UsageError, match=rf"`streamconv verify {folder} {words}`\.$"):
            streamconv.publish(folder)


def test_dry_run_checks_everything_and_changes_nothing(hub: HubServer, tmp_path: Path, folder: Path) -> None:
    words = ("push", folder, "--dry-run")
    done = json.loads(run(*words, "--json", cwd=tmp_path).stdout)
    assert done["dry_run"] is True
    assert done["push"] == {
        "repository": "ada/mine", "url": f"{hub.url}/ada/mine", "exists": False, "private": None
    }  # fmt: skip
    sizes = {each["file"]: each["bytes"] for each in done["files"]}
    assert {name: len(data) for name, data in contents(folder).items()}.items() <= sizes.items()
    assert sizes.keys() - contents(folder).keys() == {"README.md"}
    assert not any(each["is_present"] for each in done["files"])
    assert not hub.requests("^(PUT|POST (?!/api/validate-yaml))")
    assert not hub.repos
    shown = run(*words, "--private", cwd=tmp_path, COLUMNS="200").stdout
    assert f"push      to {hub.url}/ada/mine, a new repository: private\n" in shown
    assert run("push", folder, cwd=tmp_path).returncode == 0
    shown = run(*words, cwd=tmp_path, COLUMNS="200").stdout
    assert "which is public\n" in shown
    assert "files     none: the repository already has all of them\n" in shown
    (folder / "config.json").write_text("{}")
    refused = run(*words, cwd=tmp_path)
    assert (refused.returncode, "config.json was changed after" in refused.stderr) == (4, True)


def test_unfinished_or_missing_folder_is_refused(hub: HubServer, tmp_path: Path, folder: Path) -> None:
    assert "none is not a folder" in run("push", "none", cwd=tmp_path).stderr
    (folder / JOURNAL_NAME).write_text("{}\n")
    done = run("push", folder, cwd=tmp_path)
    assert (done.returncode, "holds an unfinished conversion" in done.stderr) == (4, True)
    assert not hub.log


# Licence and tags


def test_own_model_gets_the_licence_and_tags_that_its_user_gives(hub: HubServer, tmp_path: Path, folder: Path) -> None:
    assert run("push", folder, cwd=tmp_path).returncode == 0
    assert card(hub).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "does not know its licence" in hub.files("ada/mine")["README.md"].decode()
    words = ("--license", "CC-BY-4.0", "--tag", "radiology", "--tag", "dinov2", "--tag", "radiology")
    done = run("push", folder, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (card(hub)["license"], card(hub)["tags"]) == ("cc-by-4.0", ["dinov2", "streamconv", "radiology"])
    assert "does not know its licence" not in hub.files("ada/mine")["README.md"].decode()
    run("push", folder, "--tag", "x-ray", cwd=tmp_path)  # what was added before is kept
    assert (card(hub)["license"], card(hub)["tags"]) == ("cc-by-4.0", ["dinov2", "streamconv", "radiology", "x-ray"])
    run("push", folder, "--license", "mit", cwd=tmp_path)
    assert card(hub)["license"] == "mit"


def test_licence_of_a_published_model_is_its_authors(
    hub: HubServer, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not stay when another model takes its place."""
    manifest = Manifest.read(folder)
    assert manifest is not None
    own = replace(manifest.source["backbone"], **PUBLISHED)
    published = replace(manifest, model="dinov2_vits14", source={"backbone": own})
    (folder / "streamconv.json").write_bytes(published.to_bytes())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    remember_output(published.source, published.files)
    done = run("push", folder, "--license", "mit", cwd=tmp_path)
    message = "dinov2_vits14 was published under the licence apache-2.0, not mit. Omit --license."
    assert (done.returncode, message in " ".join(done.stderr.split())) == (2, True)
    assert run("push", folder, "--license", "apache-2.0", "--tag", "mine", cwd=tmp_path).returncode == 0
    assert (card(hub, "ada/dinov2-small")["license"], "base_model" in card(hub, "ada/dinov2-small")) == (
        "apache-2.0", True,
    )  # fmt: skip
    (folder / "streamconv.json").write_bytes(manifest.to_bytes())
    assert run("push", folder, "dinov2-small", cwd=tmp_path).returncode == 0
    assert card(hub, "ada/dinov2-small").keys() == {"library_name", "pipeline_tag", "tags"}


def test_folder_from_someone_else_is_not_pushed_as_its_authors(
    hub: HubServer, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest may claim anything. A model that was made or compared with the source here is known."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    manifest = Manifest.read(folder)
    assert manifest is not None
    forged = replace(
        manifest, model="dinov2_vits14", source={"backbone": replace(manifest.source["backbone"], **PUBLISHED)}
    )
    (folder / "streamconv.json").write_bytes(forged.to_bytes())
    for words in ((), ("--dry-run",)):
        done = run("push", folder, *words, cwd=tmp_path, COLUMNS="400")
        assert done.returncode == 0, done.stderr
        assert f"ada/{folder.name}" in done.stdout + done.stderr
        assert f"verify it first: `streamconv verify {folder} dinov2_vits14`" in done.stderr
    text = hub.files(f"ada/{folder.name}")["README.md"].decode()
    assert not card(hub).keys() & {"license", "base_model"}
    assert "as its authors published it" not in text
    assert hub.repos[f"ada/{folder.name}"].titles == ["Add the model, converted by streamconv"]
    remember_output(forged.source, {"model.safetensors": WrittenFile(1, "ab")})  # other weights
    assert not published_model(without_foreign_claims(forged))
    remember_output(manifest.source, manifest.files)  # not the authors' source
    assert not published_model(without_foreign_claims(forged))
    other = replace(forged.source["backbone"], fingerprint="another")
    remember_output({"backbone": other}, forged.files)
    assert not published_model(without_foreign_claims(forged))
    remember_output(forged.source, forged.files)
    assert published_model(without_foreign_claims(forged))
    assert run("push", folder, cwd=tmp_path).returncode == 0
    assert card(hub, "ada/dinov2-small")["base_model"] == "facebook/dinov2-small"
    assert hub.repos["ada/dinov2-small"].titles == ["Add dinov2_vits14, converted by streamconv"]


def test_verdict_from_another_machine_is_named_as_such(hub: HubServer, tmp_path: Path, folder: Path) -> None:
    """Anybody can write into a manifest that verification passed, also a user who converts on another machine."""
    manifest = json.loads((folder / "streamconv.json").read_text())
    check = {"name": "parity", "passed": True, "proves": "the same outputs", "problems": [], "numbers": {}}
    manifest["verification"]["checks"] = [check]
    (folder / "streamconv.json").write_text(json.dumps(manifest))
    for words in (("--dry-run",), ()):
        done = run("push", folder, *words, cwd=tmp_path, COLUMNS="400")
        assert done.returncode == 0, done.stderr
        assert (
            f"this machine did not verify these files, and the model card says so. To verify them first: `"
            f"streamconv verify {folder} source.pth`" in done.stderr
        )
    text = hub.files("ada/mine")["README.md"].decode()
    assert "## Verification\n\n**As recorded in streamconv.json.** The verification was not repeated" in text
    assert "| parity | passed | the same outputs |" in text
    assert "Every byte that was read matched its CRC-32, according to streamconv.json." in text
    remember_verdict(manifest["verification"])
    done = run("push", folder, cwd=tmp_path, COLUMNS="400")
    assert (done.returncode, "did not verify" in done.stderr) == (0, False)
    text = hub.files("ada/mine")["README.md"].decode()
    assert "| parity | passed | the same outputs |" in text
    assert "s recorded in" not in text
    assert "\nEvery byte that was read matched its CRC-32." in text


def test_unverified_push_shows_no_verdict_about_other_files(hub: HubServer, tmp_path: Path, folder: Path) -> None:
    manifest = json.loads((folder / "streamconv.json").read_text())
    manifest["verification"]["output"]["files"]["config.json"]["sha256"] = "0" * 64
    (folder / "streamconv.json").write_text(json.dumps(manifest))
    assert run("push", folder, "--unverified", cwd=tmp_path).returncode == 0
    text = hub.files("ada/mine")["README.md"].decode()
    assert "> **Not verified.**" in text
    assert "No check was run." in text


def test_edited_folder_is_not_its_authors_own(hub: HubServer, tmp_path: Path, folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert manifest is not None
    own = replace(
        manifest, model="dinov2_vits14", source={"backbone": replace(manifest.source["backbone"], **PUBLISHED)}
    )
    remember_output(own.source, own.files)
    edited = replace(own, edited={"config.json": WrittenFile(2, "ab")})
    assert published_model(without_foreign_claims(own))
    assert not published_model(without_foreign_claims(edited))
    assert not published_model(
        without_foreign_claims(replace(own, files={**own.files, "config.json": WrittenFile(2, "ab")}))
    )
    assert not published_model(without_foreign_claims(replace(own, model="dinov2_vitb14")))
    remember_output(own.source, edited.current_files)  # as after a verification of the edited folder
    assert published_model(without_foreign_claims(edited))


def test_licence_that_the_hub_does_not_know_is_refused_before_anything_is_uploaded(
    hub: HubServer, tmp_path: Path, folder: Path, save: Save
) -> None:
    for words in (("push", folder), ("push", folder, "--dry-run"), ("run", "source.pth", "-o", "new", "--push-to-hub")):
        done = run(*words, "--license", "apache 2.0", "--tag", "x", cwd=tmp_path, COLUMNS="400")
        assert done.returncode == 2, done.stderr
        assert 'does not accept this licence and these tags: - Error: "license" must be one of [apa' in done.stderr
        assert "Did you mean apache-2.0? https://huggingface.co/docs" in done.stderr
    assert not (tmp_path / "new").exists()
    assert not hub.repos


def test_licence_and_tags_do_not_change_the_users_own_card(hub: HubServer, tmp_path: Path, folder: Path) -> None:
    hub.put("ada/theirs", {"README.md": b"theirs"})
    done = run("push", folder, "theirs", "--tag", "x", cwd=tmp_path, COLUMNS="300")
    assert (done.returncode, "ada/theirs has a model card that streamconv did not write" in done.stderr) == (2, True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine")
    done = run("push", folder, "--license", "mit", cwd=tmp_path, COLUMNS="300")
    assert (done.returncode, "is your own model card, which --license and --tag do not" in done.stderr) == (2, True)
    assert run("push", folder, cwd=tmp_path).returncode == 0
    assert hub.files("ada/mine")["README.md"].endswith(b"mine")


@pytest.mark.parametrize("text", ["---\nlicense: nope\n---\n", "---\na: [1\n---\nmine", "---\n- a\n---\n"])
def test_card_that_the_hub_would_refuse_is_named_before_the_upload(
    hub: HubServer, tmp_path: Path, folder: Path, text: str
) -> None:
    (folder / "README.md").write_text(text)
    done = run("push", folder, cwd=tmp_path, COLUMNS="400")
    assert done.returncode == 2, done.stderr
    assert f"The Hub does not accept {folder}/README.md: " in done.stderr
    assert "Correct its metadata." in done.stderr
    assert not hub.requests("^(PUT|POST (?!/api/validate-yaml))")


# Rights


def test_right_to_write_is_checked_before_anything_is_converted(
    hub: HubServer, tmp_path: Path, folder: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.users["hf_lab"] = who({"role": "write"}, lab="read")
    hub.users["hf_one"] = who(fine_grained(ada__it=["repo.write"]))
    hub.put("ada/locked", {"x": b""})
    hub.put("ada/it", {"x": b""})
    before = sorted(path.name for path in tmp_path.iterdir())
    for token, repo, reason in (
        ("hf_lab", "lab/it", "your role in lab is read-only"),
        ("hf_one", "ada/new", "the token can write only to ada/it"),
        (TOKEN, "eve/it", "eve is neither your account, ada, nor an organisation that you are a member of"),
    ):
        for words in (
            ("push", folder, repo), ("push", folder, repo, "--dry-run"),
            ("run", "source.pth", "-o", "new", "--push-to-hub", repo),
            ("run", "source.pth", "-o", "new", "--push-to-hub", repo, "--dry-run"),
        ):  # fmt: skip
            done = run(*words, cwd=tmp_path, HF_TOKEN=token, COLUMNS="400")
            assert done.returncode == 4, done.stderr
            assert f"{repo} cannot be written: {reason}. Choose another" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not hub.requests("^(POST|PUT)")
    monkeypatch.setenv("HF_TOKEN", "hf_one")
    assert streamconv.publish(folder, PushOptions(Destination("it"))).repository == "ada/it"


def test_repository_that_the_hub_does_not_let_the_token_write_to_is_refused(hub: HubServer, folder: Path) -> None:
    """Roles within an organisation's repositories are known to the Hub only."""
    if "write" not in signature(HubClient().api.auth_check).parameters:
        pytest.skip("this version of huggingface_hub cannot ask")
    hub.put("ada/it", {"x": b""})
    hub.fail("GET /api/models/ada/it/auth-check/write", status=403, body={"error": "no"})
    with pytest.raises(HubError, match="the token may not write to this repository"):
        streamconv.publish(folder, PushOptions(Destination("it")))
    hub.fail("GET /api/models/ada/it/auth-check/write", status=404, body={"error": "no such address"})
    assert streamconv.publish(folder, PushOptions(Destination("it"))).repository == "ada/it"


def test_caller_learns_where_a_push_goes_and_can_end_it(hub: HubServer, folder: Path) -> None:
    seen: list[PushTarget] = []
    done = streamconv.publish(folder, PushOptions(Destination(private=True)), on_push=seen.append)
    assert seen == [PushTarget("ada/mine", f"{hub.url}/ada/mine", exists=False, private=True)]
    assert (done.private, done.was_published) == (True, False)

    def stop(target: PushTarget) -> None:
        assert (target.exists, target.private) == (True, True)
        raise streamconv.Cancelled

    with pytest.raises(streamconv.Cancelled):
        streamconv.publish(folder, PushOptions(Destination("mine")), on_push=stop)
