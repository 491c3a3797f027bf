"""Share a run on the Hub: an allow-list of its files in one commit, a step of its own that may be repeated.

What goes up is what `shareable` lists and nothing else: never a checkpoint, a history, a config or a tracker's log.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from lora_nb import formats
from lora_nb.errors import FormatError, HubError
from lora_nb.formats import FILE_NAME, KOHYA_FILE
from lora_nb.redaction import kinds, public, redacted
from lora_nb.report import Run, write_card, write_report
from lora_nb.report.card import FILE as CARD
from lora_nb.report.page import FILE as REPORT

MESSAGE = "LoRA by lora_nb"


@dataclass(frozen=True)
class Push:
    """What an upload sent, or would send: names in the repository with their bytes.

    url: of the commit that the repository is at now; empty if nothing was sent.
    """

    repo_id: str
    files: dict[str, int]
    url: str = ""

    def table(self) -> str:
        """Plain text: where to, and a line for each file."""
        size = sum(self.files.values()) / 1e6
        verb = "is at" if self.url else "would get"
        lines = [f"{self.repo_id} {verb} {self.url or f'{len(self.files)} files, {size:.2f} MB'}"]
        lines += [f"{count:>12,}  {name}" for name, count in self.files.items()]
        return "\n".join(lines)


def push_to_hub(
    run: str | Path,
    repo_id: str,
    private: bool = True,
    token: str | None = None,
    dry_run: bool = False,
) -> Push:
    """Write card and report of a run and upload its shareable files as one commit; again is the same or an update.

    repo_id: user/name, or a name in your own space. private: of a repository that is made now; one that exists keeps
    what it is. token: of the Hub; empty means the one of `hf auth login` or HF_TOKEN. dry_run: list the files, and send
    nothing. Raises CheckpointError if there is no run, FormatError if its adapter is missing or names a folder of
    yours, HubError if there is no token or the Hub says no; then the same call may be repeated.
    """
    if not dry_run:
        repo_id = destination(repo_id, token)
    write_report(run, repo_id)
    write_card(run, repo_id)
    files = shareable(run)
    sizes = {name: file.stat().st_size for name, file in files.items()}
    if dry_run:
        return Push(repo_id, sizes)
    hub = HfApi(token=token)
    with _spoken(repo_id):
        hub.create_repo(repo_id, private=private, exist_ok=True)
        additions = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
        commit = hub.create_commit(repo_id, additions, commit_message=MESSAGE)
    return Push(repo_id, sizes, str(commit.commit_url))


def destination(repo_id: str, token: str | None = None) -> str:
    """The full name user/name of a repository that this token may write to, as the Hub says now; raises HubError."""
    if not (token or get_token()):
        raise HubError(
            "There is no Hub token here, so nothing can be uploaded; log in with `hf auth login`, or set HF_TOKEN."
        )
    with _spoken(repo_id):
        user = HfApi(token=token).whoami()
    return repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"


def shareable(run: str | Path) -> dict[str, Path]:
    """The files of a run that may be uploaded, by name in the repository; what is not there is left out.

    Adapter and Kohya file with their certificates, card, report, and the samples that the card shows.
    """
    read = Run.read(run)
    adapters = [name for name in (FILE_NAME, KOHYA_FILE) if (read.folder / name).is_file()]
    if FILE_NAME not in adapters:
        raise FormatError(
            f"{read.folder} has no {FILE_NAME} to share; train to the end of a step there first."
        )
    for name in adapters:
        _refuse_private(read.folder / name)
    names = [*adapters, *(Path(n).stem + ".certificate.json" for n in adapters), CARD, REPORT]
    names += [
        file.relative_to(read.folder).as_posix() for row in read.gallery().values() for file in row
    ]
    return {name: read.folder / name for name in names if (read.folder / name).is_file()}


def _refuse_private(file: Path) -> None:
    """An adapter by an older version may name its base model by the folder that it lay in."""
    header = formats.read_header(file)[0]
    for key, value in header.items():
        if kinds(value) or (key == "base_model" and public(value) != value):
            raise FormatError(
                f"The header of {file.name} names a folder or a secret of yours ({key}), so it is not shared; train "
                "one step more with this version, which writes it without."
            )


@contextmanager
def _spoken(repo_id: str) -> Iterator[None]:
    """One sentence for what the Hub or the way to it may say; no token in it."""
    again = "nothing is lost, run the same again"
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise HubError("There is no Hub token here; log in with `hf auth login`.") from error
    except OfflineModeIsEnabled as error:
        raise HubError("HF_HUB_OFFLINE forbids all uploads here; unset it.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = "the token may not write there" if status in (401, 403) else again
        raise HubError(
            f"The Hub refused {repo_id} with status {status} ({_why(error)}); {hint}."
        ) from error
    except (_transport_error(), OSError, RuntimeError) as error:
        cause = error.__cause__ or error
        raise HubError(
            f"The Hub could not be reached for {repo_id} ({_why(cause)}); {again}."
        ) from error
    except ValueError as error:
        raise HubError(
            f"The Hub cannot take {repo_id} ({_why(error)}); choose another name."
        ) from error


def _transport_error() -> type[Exception]:
    """What the HTTP library of the installed huggingface_hub raises: that is httpx before 2.0 and httpx2 since."""
    return sys.modules[type(get_session()).__module__.partition(".")[0]].HTTPError


def _why(error: BaseException) -> str:
    """The first line of an error."""
    lines = [line for line in redacted(str(error)).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")
