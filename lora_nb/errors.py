"""The exceptions of this package: each message is one sentence that says what is wrong, where, and what to do."""


class LoraNbError(Exception):
    """Any error that the user can mend; the command line prints it without a traceback and exits with 2."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows instead of a traceback: the sentence."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(LoraNbError):
    """A setting that cannot be trained with, or a key that no setting has."""


class DataError(LoraNbError):
    """Pictures or captions that cannot be trained on."""


class ModelError(LoraNbError):
    """A base model that is missing, incomplete or of another family."""


class FormatError(LoraNbError):
    """A LoRA file that cannot be read, or that does not fit the model."""


class CheckpointError(LoraNbError):
    """A run folder or checkpoint that cannot be continued."""


class NumericsError(LoraNbError):
    """Numbers that stopped being finite, or a run that changed nothing."""


class HubError(LoraNbError):
    """The Hub cannot be reached, or does not want what is sent."""
