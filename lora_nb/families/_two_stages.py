"""What families of two-stage systems share: where the other stage is, and CLIP's embedding of a picture."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection


def other_stage(model: str, name: str, given: str | None, published: str) -> str:
    """Folder or Hub name of the stage that is not trained.

    It is the given one, else the folder `name` inside the base model's folder, else the published one.
    """
    inside = Path(model) / name
    if given is not None:
        return given
    return str(inside) if (inside / "model_index.json").is_file() else published


@torch.no_grad()
def image_embeds(
    pixels: torch.Tensor, encoder: CLIPVisionModelWithProjection, processor: CLIPImageProcessor
) -> torch.Tensor:
    """CLIP's embeddings (B, projection_dim) of square pictures (B, 3, H, W) in [-1, 1], float32 on the CPU.

    Pictures are resized and normalised as the image processor does it, without its rounding to 256 levels, and
    encoded one by one, so that an embedding does not depend on its neighbours in the batch.
    """
    size = encoder.config.image_size
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std)
    )
    embeds = []
    for picture in pixels.float().cpu():
        small = F.interpolate(
            picture[None], (size, size), mode="bicubic", antialias=True, align_corners=False
        ).clamp(-1, 1)  # bicubic overshoots at edges
        normal = ((small + 1) / 2 - mean) / std
        embeds.append(encoder(normal.to(encoder.device, encoder.dtype)).image_embeds.cpu().float())
    return torch.cat(embeds)


def prefixed(pipeline: Any, prefix: str) -> dict[str, Any]:
    """The components of a stage under the names that the combined pipeline gives them."""
    return {f"{prefix}{name}": part for name, part in pipeline.components.items()}
