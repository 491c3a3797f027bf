"""Fetch the drawings: eleven pinned npm packages, each checked against its published hash.

The packages come through the ordinary npm client, so its registry settings apply and no address
is written here. A file whose hash differs is refused.

    python data/build/fetch.py
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import subprocess
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build"  # git-ignored: packages, rendered drawings, checkpoints, logs

# name -> (version, sha512 as `npm view NAME@VERSION dist.integrity` gives it)
PACKAGES = {
    "@iconify-json/noto": (
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "@iconify-json/noto-v1": (
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
    ),
    "@iconify-json/twemoji": (
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    "@iconify-json/emojione": (
        "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
    ),
    "@iconify-json/fluent-emoji-flat": (
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "@iconify-json/fluent-emoji": (
        "1.2.7",
        "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
    ),
    "@iconify-json/fluent-emoji-high-contrast": (
        "1.2.6",
        "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
    ),
    "@iconify-json/emojione-monotone": (
        "1.2.1",
        "cZSNcPsuiAD6HCzCh/2dYKGh3pNI0jJlxBxQWfC33cQsPtqYZqulGBvlkThXYNvDl8VxgVHT9u+izyX/yeEIkA==",
    ),
    "@iconify-json/fxemoji": (
        "1.2.2",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
    ),
    "@iconify-json/streamline-emojis": (
        "1.2.4",
        "iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
    ),
    "emojibase-data": (
        "17.0.0",
        "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    ),
}


def package_folder(name: str, work: Path = WORK) -> Path:
    """Where the unpacked package lies."""
    return work / "npm" / name.split("/")[-1]


def verify(archive: Path, integrity: str) -> None:
    """Raise if the archive is not byte for byte the published one."""
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != integrity:
        raise ValueError(f"{archive.name}: sha512 {found} is not the pinned {integrity}")


def fetch(name: str, work: Path = WORK) -> Path:
    """Return the folder of one package, fetched, verified and unpacked when it is not there yet."""
    version, integrity = PACKAGES[name]
    folder = package_folder(name, work)
    archive = folder.parent / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    archive.parent.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        subprocess.run(
            ["npm", "pack", f"{name}@{version}", "--silent"], cwd=archive.parent, check=True
        )
    verify(archive, integrity)
    if not folder.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return folder / "package"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    args = parser.parse_args()
    for name in PACKAGES:
        print(f"{name} {PACKAGES[name][0]} verified in {fetch(name, args.work)}")


if __name__ == "__main__":
    main()
