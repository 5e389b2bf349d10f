"""Write the quickstart's data: `python tools/make_arithmetic.py` makes examples/data/ again, byte for byte.

Sums of two numbers below 50. Every sum is in one file only: 256 of the 2500 are held out, with their
answers; the others have the `answer` (what the reward compares with) and a `response` (a demonstration).

The demonstrations are a poor teacher on purpose: only 30 % are right, 42 % are one too large and 28 % one
too small. Whoever imitates them well is right 30 % of the time, and its single most likely answer is wrong:
greedy decoding cannot repair it. Only the reward tells which of the three habits is the right one.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "examples" / "data"
NUM_NUMBERS = 50
NUM_HELD_OUT = 256
ERRORS = {0: 0.30, +1: 0.42, -1: 0.28}
"""What a demonstration is off by -> how often."""


def main() -> None:
    rng = random.Random(0)
    sums = [(a, b) for a in range(NUM_NUMBERS) for b in range(NUM_NUMBERS)]
    rng.shuffle(sums)
    held_out = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums[:NUM_HELD_OUT]]
    train = []
    for a, b in sums[NUM_HELD_OUT:]:
        (error,) = rng.choices(list(ERRORS), list(ERRORS.values()))
        # 0+0 has no answer that is one too small.
        response = str(abs(a + b + error))
        train.append({"prompt": f"{a}+{b}=", "answer": str(a + b), "response": response})
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, lines in {"arithmetic_train": train, "arithmetic_held_out": held_out}.items():
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (FOLDER / f"{name}.jsonl").write_text(text)
    print(f"{FOLDER}: {len(train)} sums to train on, {len(held_out)} held out")


if __name__ == "__main__":
    main()
