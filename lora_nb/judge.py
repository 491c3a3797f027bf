"""A small model that looks at pictures: which style, and which thing?

A convolutional picture tower and a text tower over a BPE vocabulary meet in two spaces, one for styles
and one for concepts, as in CLIP (Radford et al. 2021). It is trained by data/build/train_judge.py and
ships in data/judge with its own accuracy on real drawings that it has never seen.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from lora_nb.env import data_dir
from lora_nb.errors import DataError, ModelError

SIZE = 128  # pixels of a side that the picture tower sees


class PictureTower(nn.Module):
    """Pictures (N, 3, 128, 128) in [-1, 1] to features (N, width).

    Every stage is pooled, not only the last: a style shows in colours and edges, a thing in shapes.
    """

    def __init__(self, channels: Sequence[int] = (64, 96, 160, 320)):
        super().__init__()
        self.stem = _convolution(3, channels[0], 5, stride=4)
        widths = (channels[0], *channels)
        self.stages = nn.ModuleList(_Residual(a, b) for a, b in zip(widths, channels, strict=False))
        self.palette = Palette()
        self.width = 2 * sum(widths) + self.palette.width

    def forward(self, pixels: Tensor) -> Tensor:
        grids = [self.stem(pixels)]
        for stage in self.stages:
            grids.append(stage(grids[-1]))
        pooled = [(grid.mean(dim=(2, 3)), grid.amax(dim=(2, 3))) for grid in grids]
        return torch.cat([self.palette(pixels), *(part for pair in pooled for part in pair)], dim=1)


class Palette(nn.Module):
    """Which colours there are, white paper left out: pictures (N, 3, H, W) to features (N, width).

    A hand has its paints: their shares alone tell 95 of 100 unseen drawings apart, where convolutions on colours
    told 82. Every second pixel is spread over the eight nearest of 16 x 16 x 16 colours.
    """

    LEVELS = 16

    def __init__(self, width: int = 128):
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(self.LEVELS**3, width), nn.ReLU())
        self.width = width

    def forward(self, pixels: Tensor) -> Tensor:
        return self.mix(self.shares(pixels))

    @torch.no_grad()
    def shares(self, pixels: Tensor) -> Tensor:
        """Square roots of the shares (N, 4096); all 0 for a white page."""
        place = (pixels[..., ::2, ::2].float().flatten(2).clamp(-1, 1) + 1) / 2 * (self.LEVELS - 1)
        low = place.floor().clamp(max=self.LEVELS - 2)
        part = place - low
        counts = torch.zeros(len(pixels), self.LEVELS**3, device=pixels.device)
        for corner in range(8):
            up = [corner >> axis & 1 for axis in range(3)]
            index, weight = 0, 1
            for axis in range(3):
                index = index * self.LEVELS + low[:, axis].long() + up[axis]
                weight = weight * (part[:, axis] if up[axis] else 1 - part[:, axis])
            counts.scatter_add_(1, index, weight)
        counts[:, -1] = 0
        return (counts / counts.sum(1, keepdim=True).clamp(min=1e-6)).sqrt()


class _Residual(nn.Module):
    def __init__(self, width: int, wider: int):
        super().__init__()
        stride = 1 if width == wider else 2
        self.first = _convolution(width, wider, 3, stride)
        self.second = nn.Sequential(
            nn.Conv2d(wider, wider, 3, padding=1, bias=False), nn.BatchNorm2d(wider)
        )
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(width, wider, 1, stride)

    def forward(self, grid: Tensor) -> Tensor:
        return F.relu(self.skip(grid) + self.second(self.first(grid)))


def _convolution(width: int, wider: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(width, wider, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(wider), nn.ReLU())


class TextTower(nn.Module):
    """Texts, as lists of token numbers, to features (N, width): the mean of their tokens, then a layer."""

    def __init__(self, vocabulary: int, width: int = 256):
        super().__init__()
        self.tokens = nn.EmbeddingBag(vocabulary, width, mode="mean")
        self.mix = nn.Sequential(nn.Linear(width, width), nn.GELU())
        self.width = width

    def forward(self, tokens: Tensor, starts: Tensor) -> Tensor:
        """tokens: of all texts, one after the other. starts: (N,) where each text begins."""
        states = self.tokens(tokens, starts)
        return states + self.mix(states)


class Judge(nn.Module):
    """Scores pictures for style and concept.

    styles: all style words. names: all concept names that a picture is ranked among. card: what training
    measured on real held-out drawings, with the number of them. tokenizer: texts to token numbers.
    """

    def __init__(
        self, tokenizer: Tokenizer, styles: Sequence[str], names: Sequence[str], card: dict
    ):
        super().__init__()
        self.tokenizer, self.card = tokenizer, card
        self.styles, self.names = tuple(styles), tuple(names)
        self.picture = PictureTower()
        self.text = TextTower(tokenizer.get_vocab_size())
        self.heads = nn.ModuleDict(
            {
                space: nn.ModuleList(
                    [
                        nn.Linear(self.picture.width, width, bias=False),
                        nn.Linear(self.text.width, width, bias=False),
                    ]
                )
                for space, width in (("style", 32), ("concept", 128))
            }
        )
        self.log_scale = nn.ParameterDict({s: nn.Parameter(torch.tensor(2.3)) for s in self.heads})

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts as the text tower takes them, on its device."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        starts = torch.tensor([0, *(len(each) for each in ids[:-1])]).cumsum(0)
        flat = torch.tensor([token for each in ids for token in each])
        device = self.text.tokens.weight.device
        return flat.to(device), starts.to(device)

    def logits(self, features: Tensor, texts: Sequence[str], space: str) -> Tensor:
        """Scaled cosine similarities (N, texts) of picture features with texts, in one of the spaces."""
        return self.similar(features, self.tokens(texts), space)

    def similar(self, features: Tensor, tokens: tuple[Tensor, Tensor], space: str) -> Tensor:
        """The same with texts that are tokens already."""
        of_picture, of_text = self.heads[space]
        pictures = F.normalize(of_picture(features), dim=-1)
        words = F.normalize(of_text(self.text(*tokens)), dim=-1)
        return self.log_scale[space].exp().clamp(max=100) * pictures @ words.T

    def knows(self, style: str, concepts: Sequence[str]) -> bool:
        """Whether the judge was taught this style and all of these names."""
        return style in self.styles and set(concepts) <= set(self.names)

    @torch.no_grad()
    def style_probabilities(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(N, styles) float32: each row sums to 1."""
        return self.logits(self._features(images), self.styles, "style").softmax(-1).numpy()

    @torch.no_grad()
    def concept_ranks(self, images: Sequence[Image.Image], concepts: Sequence[str]) -> np.ndarray:
        """(N,) integers: the place of the right name among all names, 1 is best.

        concepts: the right name of each picture. Raises DataError for a name that the judge was not taught.
        """
        if len(images) != len(concepts):
            raise DataError(
                f"concept_ranks: {len(images)} pictures but {len(concepts)} names; give one for each"
            )
        unknown = sorted(set(concepts) - set(self.names))
        if unknown:
            raise DataError(
                f"concept_ranks: the judge was not taught {unknown[0]!r}; judge.names lists its "
                f"{len(self.names)} names"
            )
        logits = self.logits(self._features(images), self.names, "concept")
        right = torch.tensor([self.names.index(name) for name in concepts])
        return (logits > logits.gather(1, right[:, None])).sum(1).numpy() + 1

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(N, 160) float32 of length 1: where a picture lies in the spaces of concepts and of styles."""
        seen = self._features(images)
        spaces = [F.normalize(self.heads[space][0](seen), dim=-1) for space in self.heads]
        return F.normalize(torch.cat(spaces, dim=-1), dim=-1).numpy()

    def _features(self, images: Sequence[Image.Image]) -> Tensor:
        if not images:
            raise DataError("the judge got no pictures; give at least one")
        return torch.cat([self.picture(to_pixels(images[i : i + 64])) for i in _starts(images)])


def _starts(images: Sequence) -> range:
    return range(0, len(images), 64)


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of any size and mode to (N, 3, 128, 128) in [-1, 1]."""
    arrays = [
        np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))
        for image in images
    ]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


@cache
def load_judge(folder: Path | None = None) -> Judge:
    """The judge that ships in data/judge, or one of the same layout; ModelError if it is not there."""
    folder = folder or data_dir() / "judge"
    missing = [n for n in ("judge.json", "tokenizer.json") if not (folder / n).is_file()]
    if missing:
        raise ModelError(f"{folder}: no {missing[0]}; data/build/train_judge.py writes a judge")
    card = json.loads((folder / "judge.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    judge = Judge(tokenizer, card.pop("styles"), card.pop("names"), card)
    judge.load_state_dict(load_file(folder / "judge.safetensors"))
    return judge.float().eval()
