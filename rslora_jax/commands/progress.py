"""The bar that commands show for what takes long."""

from __future__ import annotations

import atexit
import contextlib
import time
from collections.abc import Callable, Iterator

from rslora_jax.terminal import bar_console, printable, start_bar


def progress_line(what: str, after: float = 2.0) -> Callable[[int, int], None]:
    """Return `progress(done, total)`, which shows a bar with the time left for what takes more than some seconds."""
    from rich.markup import escape
    from rich.progress import Progress

    console = bar_console()
    # Elsewhere than on a terminal, a bar that goes away leaves an empty line.
    begun, bar = time.monotonic(), Progress(console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(escape(printable(what)), total=None)

    def progress(done: int, total: int) -> None:
        if done < total and time.monotonic() - begun > after:
            if not bar.live.is_started:
                atexit.register(bar.stop)  # where the work is cut short, the cursor would stay hidden
                start_bar(bar)
            bar.update(task, completed=done, total=total)
        if done == total:
            bar.stop()
            atexit.unregister(bar.stop)

    return progress


@contextlib.contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """Give `say(text)`, which shows on a terminal what is under way; afterwards nothing of it is left."""
    from rich.markup import escape
    from rich.status import Status

    console = bar_console()
    if not console.is_terminal:
        yield lambda text: None
        return
    line = Status("", console=console)
    start_bar(line)
    try:
        yield lambda text: line.update(escape(printable(text)))
    finally:
        line.stop()
