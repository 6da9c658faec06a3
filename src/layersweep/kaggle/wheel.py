"""layersweep as a wheel, from the package that runs: installed or a checkout, without a network.

A wheel of a pure Python package is a zip of its files, its metadata and a list of hashes, so it
needs no build backend, which would have to be downloaded. Equal files give an equal wheel.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import re
import zipfile
from pathlib import Path

import layersweep
from layersweep.errors import InputError

TAG = "py3-none-any"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first that a zip can say
HINT = "`pip install` layersweep or a clone of it, or give --wheel FILE"
# The image has them for its own driver, and they are gigabytes.
IMAGE_ALONE = re.compile(
    r"torch|torchvision|torchaudio|(pytorch_)?triton|(nvidia|cuda)_.*", re.IGNORECASE
)


def write_wheel(folder: Path) -> Path:
    """layersweep-VERSION-py3-none-any.whl in `folder`. Raises InputError if the package was
    never installed or its metadata belongs to another version."""
    files = _package_files() | _metadata_files()
    record = f"{_info()}/RECORD"
    lines = [f"{name},{_hash(data)},{len(data)}" for name, data in sorted(files.items())]
    files[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    path = folder / f"layersweep-{layersweep.__version__}-{TAG}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), data, zipfile.ZIP_DEFLATED)
    return path


def check_wheel(path: Path) -> str:
    """The package's name of a wheel file that may go beside ours; raises InputError otherwise."""
    name, *rest = path.name.removesuffix(".whl").split("-")
    named = path.suffix == ".whl" and len(rest) in (4, 5) and rest[0][:1].isdigit()
    if not named or not zipfile.is_zipfile(path):
        raise InputError(
            f"--wheel {path}: found no wheel, needed NAME-VERSION-...-TAGS.whl",
            hint="`pip download --no-deps NAME` fetches one",
        )
    if IMAGE_ALONE.fullmatch(name):
        raise InputError(
            f"--wheel {path}: found {name}, needed a package that may be replaced on Kaggle",
            hint="torch, triton and nvidia-* stay those of the image: they belong to its driver",
        )
    return name


def _package_files() -> dict[str, bytes]:
    package = Path(layersweep.__file__).parent
    return {
        f"layersweep/{path.relative_to(package).as_posix()}": path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def _metadata_files() -> dict[str, bytes]:
    try:
        found = importlib.metadata.distribution("layersweep")
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            "layersweep: found no installed metadata, needed it for the wheel", hint=HINT
        ) from error
    if found.version != layersweep.__version__:
        raise InputError(
            f"layersweep: found metadata of {found.version}, needed {layersweep.__version__}: the "
            "installation is older than the code",
            hint=HINT,
        )
    wheel = f"Wheel-Version: 1.0\nGenerator: layersweep\nRoot-Is-Purelib: true\nTag: {TAG}\n"
    licence = found.read_text("licenses/LICENSE")
    return {
        **({} if licence is None else {f"{_info()}/licenses/LICENSE": licence.encode()}),
        f"{_info()}/METADATA": (found.read_text("METADATA") or "").encode(),
        f"{_info()}/WHEEL": wheel.encode(),
        f"{_info()}/entry_points.txt": (found.read_text("entry_points.txt") or "").encode(),
    }


def _info() -> str:
    return f"layersweep-{layersweep.__version__}.dist-info"


def _hash(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
    return f"sha256={digest.decode()}"
