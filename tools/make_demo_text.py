"""Make the held-out text that ships with the demo, from the celery 5.7.0 wheel.

    pip download --no-deps celery==5.7.0
    python tools/make_demo_text.py celery-5.7.0-py3-none-any.whl

Celery is code of the same kind as the demo model's training text, from a project that is
not in it. Every .py file longer than 2000 characters, tests left out, stands under a
heading line "= path =", in order of path; the text ends before the first file that would
take it over the size limit. The same wheel always gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import zipfile
from pathlib import Path

MAX_BYTES = 900_000
MIN_CHARACTERS = 2000
DEFAULT_OUT = Path(__file__).parent.parent / "src/layersweep/demo/text"

SOURCE_NOTE = """\
# heldout.txt

Source files of celery 5.7.0 (PyPI wheel `{wheel}`, sha256 `{wheel_sha}`).
Held out from step 2 of the demo model's training (../model/MODEL_CARD.md).
{files} files, from `{first}` to `{last}`, each stripped and put under a
heading line `= path =`; {size} bytes, sha256 `{text_sha}`.

`python tools/make_demo_text.py {wheel}` writes this folder. Celery's licence
(BSD-3-Clause) is in `LICENSE.celery` and covers this text.
"""


def read_sources(wheel: zipfile.ZipFile) -> dict[str, str]:
    """Path -> text of the files that the demo text is chosen from, in order of path."""
    names = sorted(n for n in wheel.namelist() if n.endswith(".py") and "test" not in n)
    texts = {name: wheel.read(name).decode("utf-8") for name in names}
    return {name: text for name, text in texts.items() if len(text) > MIN_CHARACTERS}


def join_articles(sources: dict[str, str], max_bytes: int) -> tuple[str, list[str]]:
    """Whole articles under headings, up to `max_bytes` of UTF-8; and the paths that are in."""
    text, paths = "", []
    for path, source in sources.items():
        longer = text + f"= {path} =\n\n{source.strip()}\n\n"
        if len(longer.encode()) > max_bytes:
            break
        text = longer
        paths.append(path)
    return text, paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()

    with zipfile.ZipFile(args.wheel) as wheel:
        text, paths = join_articles(read_sources(wheel), MAX_BYTES)
        licence = wheel.read("celery-5.7.0.dist-info/licenses/LICENSE")
    data = text.encode()
    note = SOURCE_NOTE.format(
        wheel=args.wheel.name,
        wheel_sha=hashlib.sha256(args.wheel.read_bytes()).hexdigest(),
        files=len(paths),
        first=paths[0],
        last=paths[-1],
        size=len(data),
        text_sha=hashlib.sha256(data).hexdigest(),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "heldout.txt").write_bytes(data)
    (args.out / "LICENSE.celery").write_bytes(licence)
    (args.out / "SOURCE.md").write_text(note, encoding="utf-8")
    print(f"{len(paths)} files, {len(data)} bytes -> {args.out}")


if __name__ == "__main__":
    main()
