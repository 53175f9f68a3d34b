"""How fast text becomes token blocks: `python benchmarks/tokenise.py TEXT TOKENIZER [NAME]`.

TEXT is whatever `--data` takes, TOKENIZER a directory. An empty cache each time, three times; and the time to fetch and
collate a batch of 16 blocks of 1,024 tokens. Writes `benchmarks/results/tokenise/<NAME>.json`.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from fastffn.convert.files import write_json
from fastffn.data.blocks import collate, token_blocks
from fastffn.data.text import find_text
from fastffn.data.tokenise import encoded_pieces
from fastffn.data.tokenizer import load_tokenizer
from fastffn.measure.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "tokenise"


def main() -> None:
    """Measures, writes, prints."""
    import datasets

    data, tokenizer = sys.argv[1], load_tokenizer(sys.argv[2])
    name = sys.argv[3] if len(sys.argv) > 3 else "here"
    rounds, tokens = [], 0
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            datasets.config.HF_DATASETS_CACHE = Path(folder)
            begun, cpu = time.perf_counter(), time.process_time()
            blocks = token_blocks(data, tokenizer, 1024)
            rounds.append({"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu})
            tokens = (len(blocks.train) + len(blocks.validation)) * 1024
            rows = blocks.train
            fetches = []
            for first in range(0, 16 * 50, 16):
                begun = time.perf_counter()
                collate(rows.__getitems__(list(range(first, first + 16))))
                fetches.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    pieces = list(find_text(data).pieces())
    reading = time.perf_counter() - begun
    begun = time.perf_counter()
    for _ in encoded_pieces(tokenizer, pieces):
        pass
    result = {
        "text": Path(data).name,
        "tokens": tokens,
        "rounds": rounds,
        "tokens_per_second": tokens / min(r["seconds"] for r in rounds),
        "reading_alone_seconds": reading,
        "encoding_alone_seconds": time.perf_counter() - begun,
        "batch_seconds": statistics.median(fetches),
        "machine": describe_machine(),
    }
    write_json(RESULTS / f"{name}.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
