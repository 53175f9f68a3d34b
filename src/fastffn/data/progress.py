"""How far reading and tokenising have come: a bar on a terminal, elsewhere a line once a minute."""

from __future__ import annotations

import sys
import time

_SECONDS_BETWEEN_LINES = 60.0


class Progress:
    """Shows bytes read where it is known how many there are, documents elsewhere; always tokens.

    Args:
        what: the text's name.
        total: bytes to read, or None.
    """

    def __init__(self, what: str, total: int | None) -> None:
        self.what = what
        self.total = total
        self.begun = self.said = time.perf_counter()
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            unit, scale = ("B", True) if total is not None else (" documents", False)
            self.bar = tqdm(total=total, unit=unit, unit_scale=scale, desc=f"tokenising {what}")

    def update(self, position: int, documents: int, tokens: int) -> None:
        """Takes note of bytes read, documents and tokens so far."""
        now = time.perf_counter()
        rate = f"{tokens:,} tokens, {tokens / max(now - self.begun, 1e-9):,.0f} a second"
        if self.bar is not None:
            self.bar.set_postfix_str(rate, refresh=False)
            self.bar.update((documents if self.total is None else position) - self.bar.n)
        elif now - self.said >= _SECONDS_BETWEEN_LINES:
            self.said = now
            read = f"{position / 1e6:,.0f} of {self.total / 1e6:,.0f} MB read, " if self.total is not None else ""
            print(f"Tokenising {self.what}: {read}{documents:,} documents, {rate}.", flush=True)

    def close(self) -> None:
        """Ends the bar, which stays to be seen."""
        if self.bar is not None:
            self.bar.close()
