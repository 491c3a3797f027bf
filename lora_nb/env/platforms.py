"""Which platform this is, if a person looks on, how long the session may last, and its secrets."""

import os
import sys

_SESSION_HOURS = {"colab": 12.0, "kaggle": 12.0}  # at most; an idle one ends much sooner


def where() -> str:
    """The platform: "colab", "kaggle" or "local"."""
    if "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules:
        return "colab"
    return "kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else "local"


def session_hours() -> float | None:
    """How long the platform lets a session live, in hours; None where nobody ends it.

    LORA_NB_SESSION_HOURS says it for any other place, such as a batch queue.
    """
    if said := os.environ.get("LORA_NB_SESSION_HOURS"):
        return float(said)
    return _SESSION_HOURS.get(where())


def session_end() -> float | None:
    """When the platform will end this session, in seconds as time.time() counts; None where nobody ends it.

    A session is as old as the first process of its container.
    """
    hours = session_hours()
    if hours is None:
        return None
    import psutil

    return psutil.Process(min(psutil.pids())).create_time() + 3600 * hours


def headless() -> bool:
    """True where no person looks on: LORA_NB_HEADLESS=1, CI, Kaggle's batch runs, no kernel."""
    if os.environ.get("LORA_NB_HEADLESS", "0") != "0" or os.environ.get("CI"):
        return True
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch":
        return True
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return not hasattr(shell, "kernel")


def why_no_background() -> str:
    """Why a thread cannot move what a finished cell shows, in one clause; empty where it can."""
    if headless():
        return "nobody looks on here"
    if where() == "colab":
        return "Colab shows nothing that a thread does once its cell has ended"
    return ""


def hand_over_token() -> None:
    """Give Kaggle's HF_TOKEN secret to the Hub client, which finds Colab's by itself; never shown, never needed."""
    if where() != "kaggle" or "HF_TOKEN" in os.environ:
        return
    try:
        from kaggle_secrets import UserSecretsClient

        os.environ["HF_TOKEN"] = UserSecretsClient().get_secret("HF_TOKEN")
    except Exception:  # no such secret, no network, or another image: the course needs no token
        return
