"""Rows of a data set on the Hub, or of a local folder of parquet files, through the `datasets` library.

It is loaded only where such a data set is named: it takes 80 MB and a second.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from lora_nb.config import DataSpec
from lora_nb.data.metadata import captions_of, check_column
from lora_nb.data.report import Problems
from lora_nb.data.sources import Found, TableSource

if TYPE_CHECKING:
    import datasets


def in_table(spec: DataSpec, split: str) -> bool:
    """Whether a split comes from dataset_name; a validation_data_dir goes before its validation split."""
    return bool(spec.dataset_name) and not (split == "validation" and spec.validation_data_dir)


def table_splits(spec: DataSpec, problems: Problems) -> "datasets.DatasetDict":
    """All splits by name, empty with a problem if there are none; `datasets` keeps them in its cache."""
    import datasets

    try:
        return datasets.load_dataset(spec.dataset_name, spec.dataset_config_name)
    except Exception as error:  # its own kinds, pyarrow's, the Hub's and the network's
        what = f"the data set cannot be loaded ({' '.join(str(error).split())[:200]})"
        fix = "check the name, the configuration and the network"
        problems.error(str(spec.dataset_name), what, fix)
        return datasets.DatasetDict()


def read_table(spec: DataSpec, split: str, problems: Problems) -> list[Found]:
    """The rows of one split; pictures stay encoded."""
    from datasets import Image

    name = str(spec.dataset_name)
    splits = table_splits(spec, problems)
    if not splits:
        return []
    if split not in splits:
        fix = f"name a data set with a split {split!r}"
        problems.error(name, f"has no split {split!r}, only {', '.join(splits)}", fix)
        return []
    table = splits[split]
    wanted = [("image_column", spec.image_column)]
    if spec.instance_prompt is None:
        wanted.append(("caption_column", spec.caption_column))
    have = [
        check_column(name, setting, column, table.column_names, problems)
        for setting, column in wanted
    ]
    if not all(have):
        return []
    try:
        table = table.cast_column(spec.image_column, Image(decode=False))
    except Exception:  # pyarrow raises several kinds; the type says it all
        kind = table.features[spec.image_column]
        fix = "set image_column to the column with the pictures"
        problems.error(name, f"the column {spec.image_column!r} holds no pictures but {kind}", fix)
        return []
    return _rows(table, spec, problems)


def _rows(table: "datasets.Dataset", spec: DataSpec, problems: Problems) -> list[Found]:
    from datasets import Image

    home = Path(str(spec.dataset_name)).expanduser()
    home = home if home.is_dir() else None
    images = [c for c, kind in table.features.items() if isinstance(kind, Image)]
    rows, only = [], table.select_columns([spec.image_column])
    for number, values in enumerate(table.remove_columns(images)):
        where = f"row {number}"
        own = values.pop(spec.caption_column, None)
        captions = captions_of(spec.instance_prompt or own, where, problems)
        if captions:
            source = TableSource(only, spec.image_column, number, home)
            rows.append(Found(where, where, captions, source, values))
    return rows
