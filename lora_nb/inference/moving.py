"""The samples of a training as one moving picture."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lora_nb.errors import DataError
from lora_nb.inference.watching import samples

FILE_NAME = "samples.gif"
BAR = 16  # pixels above the pictures, for the label


def gif(run: str | Path, seconds: float = 0.7, columns: int = 4) -> Path:
    """Write a run's samples/ as samples.gif beside it, a frame for the base and each step; returns the path.

    Every frame has the same pictures in the same places, `columns` in a row, under its label; the last one stays three
    times as long. seconds: how long a frame shows. Raises DataError if the run has no samples.
    """
    found = samples(run)
    if not found:
        raise DataError(
            f"There are no sample pictures in {Path(run) / 'samples'}; train with validation_prompts and with_samples."
        )
    # A set that an interrupt cut short would leave holes.
    size = max(len(files) for files in found.values())
    frames = [_frame(label, files, columns) for label, files in found.items() if len(files) == size]
    durations = [round(1000 * seconds)] * (len(frames) - 1) + [round(3000 * seconds)]
    file = Path(run) / FILE_NAME
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return file


def _frame(label: str, files: list[Path], columns: int) -> Image.Image:
    pictures = [Image.open(file).convert("RGB") for file in files]
    width, height = pictures[0].size
    columns = min(columns, len(pictures))
    lines = -(-len(pictures) // columns)
    frame = Image.new("RGB", (width * columns, BAR + height * lines), "white")
    for index, picture in enumerate(pictures):
        line, column = divmod(index, columns)
        frame.paste(picture, (width * column, BAR + height * line))
    ImageDraw.Draw(frame).text((4, 2), label, fill="black", font=ImageFont.load_default(11))
    # One palette for each frame, made for it: dithering to a shared one flickers.
    return frame.quantize(256, dither=Image.Dither.NONE)
