"""Networks drawn by hypothesis, cut and compared, in numbers too large for every day's tests."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from benchmarks.common import EVIDENCE, here
from tests.support.random_networks import KINDS, check, networks

__all__ = ["draw_networks"]

#: Networks that are drawn with one seed.
PIECE = 100


def draw_networks(count: int, first: int, minutes: float, *, resume: bool) -> tuple[dict[str, Any], str]:
    """Draw, cut and compare networks, a hundred with each seed; what is found is added to ``random.jsonl``.

    Args:
        count: How many.
        first: The first seed.
        minutes: When to stop, done or not.
        resume: Add to what is stored, seeds that are there excepted; else it is begun anew.
    """
    lines = EVIDENCE / "engine" / "random.jsonl"
    lines.parent.mkdir(parents=True, exist_ok=True)
    if not resume:
        lines.unlink(missing_ok=True)
    done = {json.loads(line)["seed"] for line in lines.read_text("utf-8").splitlines()} if lines.is_file() else set()
    start = time.monotonic()
    for number in sorted({*range(first, first + -(-count // PIECE))} - done):
        if time.monotonic() - start > 60 * minutes:
            break
        piece = {**_piece(number), "at": here()}
        with lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(piece) + "\n")
        print(piece, flush=True)
    return _summary(lines)


def _piece(number: int) -> dict[str, Any]:
    """The networks of one seed: how many there were, how long they took, what failed."""
    tried = 0

    @seed(number)
    @settings(
        max_examples=PIECE,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
    )
    @given(networks)
    def compare(drawn: Any) -> None:
        nonlocal tried
        tried += 1
        check(drawn)

    failure, start = "", time.monotonic()
    try:
        compare()
    except Exception as error:  # written down, and the next seed is drawn
        notes = getattr(error, "__notes__", [])
        failure = "\n".join([f"{type(error).__name__}: {str(error)[:300]}", *notes])
    return {"seed": number, "networks": tried, "seconds": round(time.monotonic() - start, 1), "failure": failure}


def _summary(lines: Path) -> tuple[dict[str, Any], str]:
    """All pieces so far, each seed once."""
    pieces = {piece["seed"]: piece for piece in map(json.loads, lines.read_text(encoding="utf-8").splitlines())}
    total, failed = sum(p["networks"] for p in pieces.values()), [p for p in pieces.values() if p["failure"]]
    seconds = sum(p["seconds"] for p in pieces.values())
    text = (
        f"{total} networks of {len(pieces)} seeds in {seconds:.0f} s, {len(failed)} seeds with a mismatch or a crash. "
        f"Each has up to ten steps of {len(KINDS)} kinds ({', '.join(KINDS)}), is cut twice, in float64, and compared "
        "with its masked original; its parameters are counted, its MACs held against FlopCounterMode, and one step "
        "back is made."
    )
    failures = "\n".join(f"- seed {p['seed']}: {p['failure'].splitlines()[0]}" for p in failed)
    return {"networks": total, "seeds": len(pieces), "seconds": seconds}, f"{text}\n\n{failures}".strip()
