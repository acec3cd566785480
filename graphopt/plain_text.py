"""Tables as text, for `print` and log files."""

from __future__ import annotations

from rich.console import Console, RenderableType


def plain_text(content: RenderableType, width: int = 100) -> str:
    """What rich would print, without colours, in lines of so many characters."""
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(content)
    return capture.get().rstrip()
