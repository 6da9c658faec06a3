"""Make a small task for lm-eval out of a text: which ten words come next?

    python tools/make_lm_eval_task.py tasks
    layersweep lm-eval MODEL --tasks next_words --include-path tasks --kv K3V2

A document is a paragraph of 80 words or more: 70 words of context, the ten that follow, and those
of three other paragraphs. The text is the beginning of the Debian Administrator's Handbook, which
comes with the repository. The same text always gives the same task.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

TEXT = Path(__file__).parent / "prose/handbook.txt"
CONTEXT, NEXT, CHOICES = 70, 10, 4
TASK = """\
task: next_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {documents}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def documents(text: str) -> list[dict[str, object]]:
    """The right choice's place goes round; the wrong ones follow in the paragraphs after it."""
    paragraphs = [paragraph.split() for paragraph in text.split("\n\n")]
    words = [some for some in paragraphs if len(some) >= CONTEXT + NEXT]
    following = [" ".join(some[CONTEXT : CONTEXT + NEXT]) for some in words]
    found = []
    for index, some in enumerate(words):
        gold = index % CHOICES
        choices = [following[(index + 1 + wrong) % len(words)] for wrong in range(CHOICES - 1)]
        choices.insert(gold, following[index])
        found.append({"context": " ".join(some[:CONTEXT]), "choices": choices, "gold": gold})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, default=TEXT)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(one) for one in documents(asked.text.read_text("utf-8"))]
    path = asked.folder.resolve() / "next_words.jsonl"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    (asked.folder / "next_words.yaml").write_text(TASK.format(documents=path), "utf-8")
    print(f"{len(lines)} documents in {asked.folder}")


if __name__ == "__main__":
    main()
