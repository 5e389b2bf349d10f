"""Write the quickstart's data: `python tools/make_arithmetic.py` makes examples/data/ again, byte for byte.

Sums of two numbers from 10 to 59. 256 of the 2500 are held out, with their answers, and occur nowhere else.
The others have an `answer`, which the reward compares with, and a `response`, a demonstration to imitate.

The demonstrations are a poor teacher on purpose: 30 % are right, 42 % are ten too large and 28 % ten too
small. Whoever imitates them perfectly is right 30 % of the time, and its single most likely answer is
wrong, so greedy decoding cannot repair it. Only the reward tells which of the three habits is right.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "examples" / "data"
NUMBERS = range(10, 60)
NUM_HELD_OUT = 256
NUM_DEMONSTRATIONS = 2
"""Per sum, drawn independently."""
ERRORS = {0: 0.30, 10: 0.42, -10: 0.28}
"""What a demonstration is off by -> how often."""


def main() -> None:
    rng = random.Random(0)
    sums = [(a, b) for a in NUMBERS for b in NUMBERS]
    rng.shuffle(sums)
    held_out = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums[:NUM_HELD_OUT]]
    train = []
    for a, b in sums[NUM_HELD_OUT:]:
        for error in rng.choices(list(ERRORS), list(ERRORS.values()), k=NUM_DEMONSTRATIONS):
            response = str(a + b + error)
            train.append({"prompt": f"{a}+{b}=", "answer": str(a + b), "response": response})
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, lines in {"arithmetic_train": train, "arithmetic_held_out": held_out}.items():
        (FOLDER / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    print(f"{FOLDER}: {len(train)} lines to train on, {len(held_out)} sums held out")


if __name__ == "__main__":
    main()
