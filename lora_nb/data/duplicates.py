"""Pictures that are there twice: the same file, or the same picture saved again in another size or quality."""

import numpy as np

from lora_nb.data.looks import Look
from lora_nb.data.report import Problems, Row

BITS = 3  # of the 64 of an outline
LEVELS = 8  # of 255, in any of the 4 x 4 mean colours
AHEAD = 3  # neighbours in sorted order that are compared


def check_duplicates(rows: list[Row], looks: list[Look], problems: Problems) -> None:
    """Warn of each row whose picture an earlier row has; equal length of rows and looks."""
    first: dict[str, Row] = {}
    near = _near([look.outline for look in looks])
    for i, (row, look) in enumerate(zip(rows, looks, strict=True)):
        other = first.setdefault(look.sha256, row)
        if other is not row and other.name == row.name:
            fix = "each line counts in training; remove one, or make a list of captions"
            problems.warning(row.name, "has more than one line", fix)
        elif other is not row:
            fix = "it counts twice in training; remove one"
            problems.warning(row.name, f"is the same picture as {other.name}", fix)
        elif i in near:
            fix = "if it is the same picture saved again, remove one: it counts twice in training"
            problems.warning(row.name, f"looks almost like {rows[near[i]].name}", fix)


def _near(outlines: list[str]) -> dict[int, int]:
    """For pictures that look like an earlier one: its number.

    Two outlines that differ in at most three bits agree in one of four quarters, so they lie close together when
    sorted with that quarter in front. Only so many neighbours are compared: this is for people, not a proof.
    """
    if len(outlines) < 2:
        return {}
    table = np.frombuffer(bytes.fromhex("".join(outlines)), np.uint8).reshape(len(outlines), -1)
    shape, colours = table[:, :8], table[:, 8:].astype(np.int16)
    bits = np.ascontiguousarray(shape).view(">u8").ravel()
    found: dict[int, int] = {}
    for quarter in range(0, 8, 2):
        turned = np.ascontiguousarray(np.roll(shape, -quarter, axis=1)).view(">u8").ravel()
        order = np.lexsort((colours.sum(1), turned))
        for ahead in range(1, AHEAD + 1):
            a, b = order[:-ahead], order[ahead:]
            alike = np.bitwise_count((bits[a] ^ bits[b]).astype(np.uint64)) <= BITS
            alike &= np.abs(colours[a] - colours[b]).max(1, initial=0) <= LEVELS
            for pair in zip(a[alike].tolist(), b[alike].tolist(), strict=True):
                later, earlier = max(pair), min(pair)
                found[later] = min(earlier, found.get(later, earlier))
    return found
