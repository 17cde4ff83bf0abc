"""Of the wrong MATH problems that the searches visited: how many a path makes right, by the kind of gold answer.

python results/qwen2.5-coder-0.5b/answers_met.py
"""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

FOLDER = Path(__file__).parent


def kind(answer: str) -> str:
    """What the gold answer is."""
    answer = answer.strip("$ ")
    if not re.fullmatch(r"-?\d+", answer):
        return "no integer"
    return "integer from 0 to 16" if 0 <= int(answer) <= 16 else "another integer"


def main() -> None:
    """Prints the table, and what the base model answers most often."""
    wrong, repaired, answers = Counter(), Counter(), Counter()
    for path in sorted(FOLDER.glob("draw_*.jsonl.gz")):
        with gzip.open(path, "rt") as lines:
            visited = [record for record in map(json.loads, lines) if record["set"].startswith("dart")]
        answers.update(record["base_response"].partition("}")[0] for record in visited)
        for record in visited:
            if not record["base_correct"]:
                wrong[kind(record["answer"])] += 1
                repaired[kind(record["answer"])] += record["kind"] == "wrong_to_right"
    for name, count in wrong.items():
        print(f"{name:22s} {repaired[name]:3d} of {count:3d} ({repaired[name] / count:.0%})")
    print("most frequent answers of the base:", answers.most_common(5), "of", answers.total())


if __name__ == "__main__":
    main()
