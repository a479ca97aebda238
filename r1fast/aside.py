"""Where results that are made anew leave those before them: nothing is deleted."""

import time
from pathlib import Path


def new_aside(folder: Path) -> Path:
    """`folder/replaced/<time>`, which does not exist."""
    now, number = time.strftime("%Y%m%d-%H%M%S"), 1
    aside = folder / "replaced" / now
    while aside.exists():  # twice in one second
        number += 1
        aside = folder / "replaced" / f"{now}-{number}"
    return aside
