"""Find the first wrong step of every response in a file, count them, and make a page to look at.

    python examples/find_errors.py responses.jsonl --out found        # found.jsonl and found.html

A line of the file: {"problem": ..., "response": ..., "answer": ...}. It needs the extra "detect", no GPU, and on one
CPU core a few milliseconds a response (the maths detector stops at 5 s). The command `prefixloss detect` does the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from prefixloss.detect.choose import by_name
from prefixloss.io.files import write_whole
from prefixloss.steps import split


def annotate(lines: list[dict[str, str]], detector: str) -> list[dict[str, object]]:
    """The lines with `steps`, `first_error` (from 0, None for none), `reason` and `confidence`."""
    steps = [[span.of(line["response"]) for span in split(line["response"], "markers")] for line in lines]
    found = by_name(detector).detect_batch([x["problem"] for x in lines], steps, [x.get("answer") for x in lines])
    return [
        {**line, "steps": cut, "first_error": error.step, "reason": error.reason, "confidence": error.confidence}
        for line, cut, error in zip(lines, steps, found, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, default=Path("found"))
    parser.add_argument("--detector", default="maths")
    given = parser.parse_args()

    made = annotate([json.loads(line) for line in given.file.read_text().splitlines()], given.detector)
    written = given.out.with_suffix(".jsonl")
    write_whole(written, lambda file: file.write("".join(json.dumps(x) + "\n" for x in made).encode()))
    page = given.out.with_suffix(".html")
    subprocess.run([sys.executable, "-m", "prefixloss", "show", str(written), "--html", str(page)], check=True)
    where = Counter("no error found" if x["first_error"] is None else f"step {x['first_error'] + 1}" for x in made)
    for place, count in sorted(where.items()):
        print(f"{place}: {count}")


if __name__ == "__main__":
    main()
