"""Command line options, interruptions and the progress bar."""

from streamconv.cli import progress_bar, terminal
from streamconv.cli.options import with_values


def test_interruption_shows_the_command_without_its_secrets() -> None:
    words = ["run", "https://me:word@h/x.pth?sig=word", "--image=http://me:word@h/y.png", "-o", "a b"]
    shown = terminal._redacted_command(words)
    assert shown.startswith("streamconv run https://h/x.pth --image=http://h/y.png -o 'a b'  (with the full URLs")
    assert "word" not in shown
    assert terminal._redacted_command(["run", "x.pth"]) == "streamconv run x.pth"


def test_progress_bar_does_not_interpret_markup_from_a_server() -> None:
    bar = progress_bar._bar()
    bar.add_task("503 [/bold] [red]", amount="[/x]")
    with bar.console.capture() as shown:
        bar.console.print(bar.get_renderable())
    assert "503 [/bold] [red]" in shown.get()


def test_push_to_hub_needs_no_value() -> None:
    for words, read in (
        ("run x --push-to-hub", "run x --push-to-hub="),
        ("run x --push_to_hub --json", "run x --push_to_hub= --json"),
        ("run x --push-to-hub me/it --json", "run x --push-to-hub me/it --json"),
        ("run --push-to-hub=it x", "run --push-to-hub=it x"),
        ("", ""),
    ):
        assert with_values(words.split()) == read.split()
