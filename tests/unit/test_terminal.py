"""Interruptions."""

from streamconv.cli.shown import command_to_resume


def test_interruption_shows_the_command_without_its_secrets() -> None:
    words = ["run", "https://me:word@h/x.pth?sig=word", "--image=http://me:word@h/y.png", "-o", "a b"]
    shown = command_to_resume(words)
    assert shown.startswith("streamconv run https://h/x.pth --image=http://h/y.png -o 'a b'  (with the full URLs")
    assert "word" not in shown
    assert command_to_resume(["run", "cache::https://me:word@h/x"]).startswith("streamconv run cache::https://h/x")
    assert command_to_resume(["run", "x.pth"]) == "streamconv run x.pth"
