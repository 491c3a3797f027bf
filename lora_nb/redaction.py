"""Secrets and people's folders in text: find them in a notebook before it is shared, take them out of what we write."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lora_nb.errors import DataError

# What is kept from a match is the group "keep", before the secret.
PATTERNS = {
    "Hugging Face token": r"(?P<keep>)\bhf_[A-Za-z0-9]{8,}",
    "API key": r"(?P<keep>)\bsk-[A-Za-z0-9_-]{16,}",
    "GitHub token": r"(?P<keep>)\b(?:gh[pousr]_|github_pat_)[A-Za-z0-9_]{20,}",
    "wandb or Kaggle key": r"(?i)(?P<keep>\b(?:wandb|kaggle|key)\b.{0,40}?)(?<![0-9a-f])(?:[0-9a-f]{40}|[0-9a-f]{32})"
    r"(?![0-9a-f])",
    "password or token": r"(?i)(?P<keep>\b\w*(?:token|secret|password|api_?key)[\\\"']*\s*[:=]\s*[\\\"']+)"
    r"[^\s\\\"']{8,}",
    "home folder": r"(?P<keep>)(?:/home|/Users|[A-Za-z]:\\{1,2}Users)[/\\]{1,2}"
    r"(?!(?:me|you|user|jovyan)\b)[^/\\\s\"'<>]+",
}
KINDS = {kind: re.compile(pattern) for kind, pattern in PATTERNS.items()}


class Finding(NamedTuple):
    """What was found and in which place of a notebook; the secret itself is never repeated."""

    where: str
    kind: str


def redacted(text: str) -> str:
    """The last look before writing: no token, no key, no home folder."""
    if (home := Path.home()) != Path(home.anchor):  # "/" in some containers
        text = text.replace(f"{home}/", "~/")
    for kind, pattern in KINDS.items():
        text = pattern.sub(rf"\g<keep>{'~' if kind == 'home folder' else '(removed)'}", text)
    return text


def public(value: Any) -> str:
    """A path as it may be shown: relative to where we are, or its last name alone; other values as they are."""
    if value is None:
        return "none"
    path = Path(value)
    if path.exists() and path.resolve().is_relative_to(Path.cwd()):
        return path.resolve().relative_to(Path.cwd()).as_posix()
    outside = path.is_absolute() or path.parts[:1] == ("~",) or ".." in path.parts
    return path.name if outside else str(value)


def shown(value: Any) -> Any:
    """A setting as it may be shown: what may be a path by `public`, everything else as it is."""
    return public(value) if isinstance(value, str) and "/" in value else value


def kinds(text: str) -> list[str]:
    """The kinds of secrets in a text, by name."""
    return [kind for kind, pattern in KINDS.items() if pattern.search(text)]


def in_notebook(content: bytes, name: str) -> list[Finding]:
    """Secrets anywhere in a notebook's JSON: sources, outputs, widget state, metadata.

    Raises DataError if the content is no JSON object.
    """
    try:
        notebook = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is no notebook ({error}); save it again in Jupyter.") from error
    if not isinstance(notebook, dict):
        raise DataError(f"{name} is no notebook (not a JSON object); save it again in Jupyter.")
    return [Finding(where, kind) for where, text in _texts(notebook) for kind in kinds(text)]


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    """Every text with its place; the lines of a source or an output as one, so that none hides across two."""
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, str):
            yield where, value
        elif isinstance(value, dict):
            for key, item in value.items():
                place = f"{where}.{key}".lstrip(".")
                yield f"{where} (key)", key
                if isinstance(item, str):
                    yield place, f"{key} = '{item}'"  # a secret may be known by its key alone
                else:
                    waiting.append((place, item))
        elif isinstance(value, list):
            if value and all(isinstance(item, str) for item in value):
                yield where, "".join(value)
            waiting += [(f"{where}[{i}]", item) for i, item in enumerate(value)]
