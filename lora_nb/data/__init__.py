"""Pictures and captions: checked before the first step (scan), loaded (pictures), turned into pixels (transforms).

What may go wrong with a data set is written down as one Problem each and shown all at once in a Report. Every random
choice is a function of (seed, position). Caching of latents and text states is in lora_nb.cache.
"""

from lora_nb.data.buckets import Order, size_of
from lora_nb.data.decode import SUFFIXES
from lora_nb.data.pictures import Pictures, load
from lora_nb.data.report import Problem, Report, Row
from lora_nb.data.scan import has_split, scan
from lora_nb.data.transforms import (
    Key,
    few_crops,
    geometry,
    pixels,
    row_at,
    to_image,
    transform_key,
    transform_setting,
    views,
)

__all__ = [
    "SUFFIXES",
    "Key",
    "Order",
    "Pictures",
    "Problem",
    "Report",
    "Row",
    "few_crops",
    "geometry",
    "has_split",
    "load",
    "pixels",
    "row_at",
    "scan",
    "size_of",
    "to_image",
    "transform_key",
    "transform_setting",
    "views",
]
