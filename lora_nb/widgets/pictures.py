"""Pictures as bytes for widgets and pages."""

import base64
import io
from collections.abc import Sequence

from PIL import Image


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90} if kind == "WEBP" else {}))
    return buffer.getvalue()


def img(data: bytes, kind: str, attributes: str = "") -> str:
    return f'<img {attributes} src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    width, height = pictures[0].size
    row = Image.new("RGB", (width * len(pictures), height))
    for index, picture in enumerate(pictures):
        row.paste(picture, (width * index, 0))
    return row
