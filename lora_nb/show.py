"""Show the real source of anything in a notebook, so that no notebook carries a copy of it."""

import inspect
import textwrap
from pathlib import Path
from typing import Any


def show_source(thing: Any) -> None:
    """Print the source of a function, class, method or module, under its file and line."""
    thing = inspect.unwrap(thing.fget if isinstance(thing, property) else thing)
    file = Path(inspect.getsourcefile(thing))
    lines, start = inspect.getsourcelines(thing)
    package = next((p for p in file.parents if not (p / "__init__.py").exists()), file.parent)
    print(f"# {file.relative_to(package).as_posix()}, line {max(start, 1)}")
    print(textwrap.dedent("".join(lines)).rstrip())
