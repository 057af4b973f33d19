"""`python -m tests.learning.table [SEEDS]` prints what each policy gains in each environment.

A number is the part of the way from uniform to the best fixed mixture by which the final mean loss
of all domains went down, as mean over seeds, and the standard deviation over them; where mixing
does not matter it is how far the final loss is above uniform's, in thousandths of what was learned.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from tests.learning.contenders import CONTENDERS, play
from tests.learning.environments import gained
from tests.learning.worlds import EVERYWHERE


def main(seeds: range) -> None:
    """Print the table, column by column as it is found."""
    torch.set_num_threads(1)
    cells: dict[str, list[str]] = {name: [] for name in CONTENDERS}
    for make in EVERYWHERE:
        environment = make()
        uniform = environment.expected(environment.uniform())
        for name, config in CONTENDERS.items():
            scores = np.array([play(config, environment, seed).score for seed in seeds])
            if environment.name == "neutral":
                cells[name].append(f"{1000 * (scores.mean() / uniform - 1):+.1f}‰")
            else:
                parts = [gained(environment, score) for score in scores]
                cells[name].append(f"{np.mean(parts):.2f} ± {np.std(parts):.2f}")
            print(environment.name, name, cells[name][-1], file=sys.stderr, flush=True)
    print("| policy | " + " | ".join(make.__name__ for make in EVERYWHERE) + " |")
    print("| --- |" + " ---: |" * len(EVERYWHERE))
    for name, row in cells.items():
        print(f"| {name} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main(range(int(sys.argv[1]) if len(sys.argv) > 1 else 3))
