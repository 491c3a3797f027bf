"""A plain mutator: damage that files really suffer, and values that parsers stumble over. No coverage feedback."""

import random

WORDS = [b"\0", b"\xff" * 8, b"\x7f\xff\xff\xff", b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}"]
WORDS += [b'""', b"\xed\xa0\x80", b"../"]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four random changes: flip, replace, insert, delete, repeat, cut, a changed number, a strange word."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(out) + 1)
        size = draw.choice((1, 1, 2, 4, 8, 64))
        what = draw.randrange(8)
        if what == 0 and out:
            out[place % len(out)] ^= 1 << draw.randrange(8)
        elif what == 1:
            out[place : place + size] = draw.randbytes(size)
        elif what == 2:
            out[place:place] = draw.randbytes(size)
        elif what == 3:
            del out[place : place + size]
        elif what == 4:
            out[place:place] = out[place : place + size] * draw.randint(1, 3)
        elif what == 5:
            del out[draw.choice((place, max(len(out) - size, 0))) :]
        elif what == 6:
            digits = [i for i, byte in enumerate(out) if 48 <= byte <= 57]
            if digits:
                out[draw.choice(digits)] = draw.randrange(48, 58)
        else:
            word = draw.choice(WORDS)
            out[place : place + draw.choice((0, len(word)))] = word
    return bytes(out)
