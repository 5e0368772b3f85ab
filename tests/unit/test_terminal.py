"""Command line options, interruptions and the progress bar."""

from streamconv.cli import progress_bar, terminal


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
