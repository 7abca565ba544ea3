"""Counters of the server in the text form that Prometheus reads."""

from __future__ import annotations

from collections import Counter
from typing import Any


class Metrics:
    """Sums since the start; used from the event loop only."""

    def __init__(self) -> None:
        self._requests: Counter[int] = Counter()
        self._sums: Counter[str] = Counter()

    def count_request(self, status: int) -> None:
        """One request was answered, or given up with 499."""
        self._requests[status] += 1

    def count_answer(self, result: dict[str, Any]) -> None:
        """The totals of one finished answer: a result, or the last chunk of a stream."""
        usage, timings, bits = result["usage"], result["timings"], result["bits"]
        self._sums["prompt_tokens_total"] += usage["prompt_tokens"]
        self._sums["generated_tokens_total"] += usage["completion_tokens"]
        self._sums["prompt_seconds_total"] += timings["prompt_ms"] / 1e3
        self._sums["generation_seconds_total"] += timings["predicted_ms"] / 1e3
        self._sums["generated_bits_total"] += (bits["average"] or 0) * usage["completion_tokens"]

    def text(self, *, waiting: int, busy: int) -> str:
        """The exposition. waiting: requests in the queue; busy: sessions at work."""
        lines = ["# HELP mobiquant_requests_total Requests by HTTP status.", "# TYPE mobiquant_requests_total counter"]
        lines += [f'mobiquant_requests_total{{status="{code}"}} {n}' for code, n in sorted(self._requests.items())]
        for name, meaning in _COUNTERS.items():
            lines += [f"# HELP mobiquant_{name} {meaning}", f"# TYPE mobiquant_{name} counter"]
            lines.append(f"mobiquant_{name} {self._sums[name]:g}")
        for name, meaning, value in (
            ("requests_waiting", "Requests in the queue.", waiting),
            ("sessions_busy", "Sessions at work.", busy),
        ):
            lines += [f"# HELP mobiquant_{name} {meaning}", f"# TYPE mobiquant_{name} gauge"]
            lines.append(f"mobiquant_{name} {value}")
        return "\n".join(lines) + "\n"


_COUNTERS = {
    "prompt_tokens_total": "Prompt tokens, those found in a cache included.",
    "generated_tokens_total": "Tokens generated.",
    "prompt_seconds_total": "Time until the first token of every answer.",
    "generation_seconds_total": "Time after it.",
    "generated_bits_total": "Sum over generated tokens of the average bits read; over generated_tokens_total the mean.",
}
