"""From the bytes of a picture file to an upright RGB picture, refusing what is unsafe or unclear by its header.

Sizes and crops for training are in transforms.
"""

import io
import warnings
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

# Pillow opens more, among them EPS, for which it starts another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
MAX_PIXELS = 64_000_000
MAX_BYTES = 4 * MAX_PIXELS  # an uncompressed RGBA picture of MAX_PIXELS

ORIENTATION = 0x0112  # the EXIF tag

RESAVE = "open it in a picture editor and save it again as PNG, or remove it"
SHRINK = f"save it smaller than {MAX_PIXELS // 1_000_000} megapixels"


def suffix(name: str) -> str:
    """The end of a file's name from its last dot on, in lower case; something without a dot if it has none."""
    return name[name.rfind(".") :].lower()


class BadPicture(Exception):
    """A picture that cannot be used: what is wrong and what to do; callers add the place."""

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.what, self.fix = what, fix


Remark = tuple[str, str, str]  # severity, what, fix


class Decoded(NamedTuple):
    """A picture ready for use, its format (one of FORMATS), and remarks on it."""

    image: Image.Image
    format: str
    remarks: list[Remark]


def decode(data: bytes) -> Decoded:
    """The upright RGB picture on white, with remarks on what was done to it.

    Raises BadPicture. The header is checked (format, size) before any pixel is decoded.
    """
    image, kind = _open(io.BytesIO(data))
    try:
        remarks = _remarks(image, kind)
        image.load()
        turned = image.getexif().get(ORIENTATION) in range(2, 9)
        upright = ImageOps.exif_transpose(image)
        rgb, note = _to_rgb(upright)
    except BadPicture:
        raise
    except Exception as error:  # Pillow's decoders raise some ten kinds on damaged data
        raise BadPicture(f"the picture cannot be decoded ({_reason(error)})", RESAVE) from error
    if turned:
        remarks.append(("note", "has an EXIF rotation", "it is turned upright when loaded"))
    if note:
        remarks.append(("note", *note))
    return Decoded(rgb, kind, remarks)


def header(stream: BinaryIO) -> tuple[str, int, int, list[Remark]]:
    """Format, upright width and height in pixels, and remarks, without decoding; raises BadPicture.

    The rotation of a PNG may stand behind its pixels and is not seen.
    """
    image, kind = _open(stream)
    try:
        remarks = _remarks(image, kind)
        seen = kind != "PNG" or "exif" in image.info  # else Pillow decodes to look for it
        across = seen and image.getexif().get(ORIENTATION) in range(5, 9)
    except Exception as error:  # as in decode
        raise BadPicture(f"the picture cannot be opened ({_reason(error)})", RESAVE) from error
    return (kind, *(image.size[::-1] if across else image.size), remarks)


def _remarks(image: Image.Image, kind: str) -> list[Remark]:
    if kind == "JPEG" or not getattr(image, "is_animated", False):
        return []
    fix = "only the first frame is used; save another as PNG to use that one"
    return [("warning", f"has several frames ({kind})", fix)]


def _open(stream: BinaryIO) -> tuple[Image.Image, str]:
    """The picture, not yet decoded, and its format; raises BadPicture."""
    if not stream.read(1):
        fix = "copy it again from its source, or remove it"
        raise BadPicture("the file is empty (0 bytes)", fix)
    stream.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # our own limit is lower
            image = Image.open(stream, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadPicture("has far more pixels than can be trained on", SHRINK) from error
    except Image.UnidentifiedImageError as error:
        what = f"is not a picture in one of the formats {', '.join(FORMATS)}"
        raise BadPicture(what, RESAVE) from error
    except Exception as error:  # as in decode; a PNG text bomb ends here too
        raise BadPicture(f"the picture cannot be opened ({_reason(error)})", RESAVE) from error
    if image.width * image.height > MAX_PIXELS:
        raise BadPicture(f"is {image.width} x {image.height} pixels", SHRINK)
    return image, "JPEG" if image.format == "MPO" else str(image.format)  # MPO: with a thumbnail


def _to_rgb(image: Image.Image) -> tuple[Image.Image, tuple[str, str] | None]:
    """RGB of any Pillow mode, and what was done if it could surprise."""
    if image.mode.startswith("I"):
        return _from_integers(image)
    if image.mode == "F":
        return _from_floats(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getextrema()[3][0] == 255:
            return rgba.convert("RGB"), None
        white = Image.new("RGBA", rgba.size, "white")
        note = ("has transparent parts", "they are put on white")
        return Image.alpha_composite(white, rgba).convert("RGB"), note
    if image.mode == "CMYK":
        return _from_cmyk(image), ("is in CMYK (print colours)", "it is converted to RGB")
    return image.convert("RGB"), None


def _from_integers(image: Image.Image) -> tuple[Image.Image, tuple[str, str]]:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        what = f"has 32-bit values from {values.min()} to {values.max()}"
        raise BadPicture(what, "save it with 8 or 16 bits")
    grey = np.round(values / 257).astype(np.uint8)  # 65535 / 257 = 255
    note = ("has 16 bits per pixel", "values 0 to 65535 are scaled to 0 to 255")
    return Image.fromarray(grey).convert("RGB"), note


def _from_floats(image: Image.Image) -> tuple[Image.Image, tuple[str, str]]:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise BadPicture("has values that are not finite numbers", RESAVE)
    if values.min() < 0 or values.max() > 255:
        what = f"has floating-point values from {values.min():g} to {values.max():g}"
        raise BadPicture(what, "scale the values to 0 to 1")
    scale = 255 if values.max() <= 1 else 1
    note = ("has floating-point values", "0 to 1 (or 0 to 255) is scaled to 0 to 255")
    return Image.fromarray(np.round(values * scale).astype(np.uint8)).convert("RGB"), note


def _from_cmyk(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB")
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    srgb = ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
