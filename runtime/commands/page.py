"""A self-contained HTML page, or an SVG picture, of a text whose tokens are coloured by the bits they read.

The page needs no network: hovering a token shows the depth of every linear in every block; below stand the histogram of
bits and the average of each linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from runtime.commands.picture import PAGE_COLOURS, Scale
from runtime.generation import Step

LINEARS = ("q", "k", "v", "output", "gate", "up", "down")


@dataclass(frozen=True)
class Fragment:
    """Text that one or more tokens made; a prompt, which is not coloured, has none."""

    text: str
    steps: Sequence[Step] = ()

    @property
    def bits(self) -> float:
        """Average of its tokens."""
        return float(np.mean([step.bits for step in self.steps]))


def html_page(title: str, fragments: Iterable[Fragment], scale: Scale) -> str:
    """The page as text, UTF-8. title: for example the model's name and its budget."""
    fragments = list(fragments)
    steps = [step for fragment in fragments for step in fragment.steps]
    average = f"{np.mean([step.bits for step in steps]):.2f}" if steps else "none"
    text = "".join(_span(fragment, scale) for fragment in fragments)
    summary = f"{len(steps)} tokens, {average} bits on average"
    return _PAGE.format(
        title=escape(title),
        summary=summary,
        text=text,
        legend=_legend(scale),
        histogram=_histogram(steps, scale),
        linears=_linears(steps, scale),
        names=", ".join(f'"{name}"' for name in LINEARS),
        colours=", ".join(f'"{PAGE_COLOURS[Scale().level(2 * depth)]}"' for depth in (1, 2, 3, 4)),
    )


def _span(fragment: Fragment, scale: Scale) -> str:
    if not fragment.steps:
        return f'<span class="prompt">{escape(fragment.text)}</span>'
    depths = np.concatenate([step.depths for step in fragment.steps])
    digits = "".join(map(str, depths.ravel().tolist()))
    colour = PAGE_COLOURS[scale.level(fragment.bits)]
    return (
        f'<span class="t" style="background:{colour}" data-bits="{fragment.bits:.2f}" '
        f'data-n="{len(fragment.steps)}" data-depths="{digits}">{escape(fragment.text)}</span>'
    )


def _legend(scale: Scale) -> str:
    cells = (
        f'<span style="background:{colour}">{scale.centre(index):.3g}</span>'
        for index, colour in enumerate(PAGE_COLOURS)
    )
    return "".join(cells)


def _histogram(steps: Sequence[Step], scale: Scale) -> str:
    counts = np.bincount([scale.level(step.bits) for step in steps], minlength=len(PAGE_COLOURS))
    return "".join(
        _row(f"{scale.centre(index):.3g}", count / max(counts.max(), 1), PAGE_COLOURS[index], str(count))
        for index, count in enumerate(counts)
    )


def _linears(steps: Sequence[Step], scale: Scale) -> str:
    if not steps:
        return ""
    means = 2 * np.mean([step.depths for step in steps], axis=(0, 1))
    return "".join(
        _row(name, bits / 8, PAGE_COLOURS[scale.level(bits)], f"{bits:.2f}")
        for name, bits in zip(LINEARS, means.tolist(), strict=True)
    )


def _row(label: str, share: float, colour: str, value: str) -> str:
    return (
        f'<tr><td>{label}</td><td><div class="bar" style="width:{240 * share:.0f}px;background:{colour}"></div></td>'
        f"<td>{value}</td></tr>"
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.7 Georgia, serif; color: #222; background: #fff; max-width: 46em; margin: 2em auto;
  padding: 0 1em }}
h1, h2, td, .legend, .note, #detail {{ font-family: system-ui, sans-serif }}
h1 {{ font-size: 1.2em }} h2 {{ font-size: 1em; margin: 1.6em 0 .3em }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere }} .prompt {{ color: #666 }}
.t {{ border-radius: 3px; cursor: default }} .t:hover {{ outline: 2px solid #333 }}
.legend span {{ display: inline-block; padding: 0 .5em; font-size: .8em }}
.note {{ color: #666; font-size: .9em }} td {{ font-size: .85em; padding: 0 .8em 0 0; line-height: 1.4 }}
.bar {{ height: 1em; min-width: 1px; border-radius: 2px }}
#detail {{ position: fixed; display: none; background: #fff; border: 1px solid #999; border-radius: 6px;
  padding: .5em .7em; font-size: .75em; line-height: 1.3; box-shadow: 0 2px 8px #0003; pointer-events: none }}
#detail td, #detail th {{ font-size: 1em; padding: 0 .35em; text-align: center; font-weight: normal }}
</style></head><body>
<h1>{title}</h1>
<p class="note">{summary}. Colour: average bits per weight read to choose the token. Hover for every layer.</p>
<p class="legend">{legend}</p>
<div class="text">{text}</div>
<h2>Tokens by bits</h2><table>{histogram}</table>
<h2>Average bits by linear</h2><table>{linears}</table>
<div id="detail"></div>
<script>
const names = [{names}], colours = [{colours}], detail = document.getElementById("detail");
function show(event) {{
  const data = event.target.dataset, depths = [...data.depths], blocks = depths.length / names.length / data.n;
  let rows = "<tr><th>block</th>" + names.map(name => "<th>" + name + "</th>").join("") + "</tr>";
  for (let block = 0; block < blocks; block++) {{
    rows += "<tr><td>" + block + "</td>";
    for (let i = 0; i < names.length; i++) {{
      const depth = depths[block * names.length + i];
      rows += '<td style="background:' + colours[depth - 1] + '">' + 2 * depth + "</td>";
    }}
    rows += "</tr>";
  }}
  const more = data.n > 1 ? ", the first of " + data.n + " tokens" : "";
  detail.innerHTML = data.bits + " bits on average" + more + "<table>" + rows + "</table>";
  detail.style.display = "block";
  const box = detail.getBoundingClientRect();
  detail.style.left = Math.max(0, Math.min(event.clientX + 14, innerWidth - box.width - 4)) + "px";
  detail.style.top = Math.max(0, Math.min(event.clientY + 18, innerHeight - box.height - 4)) + "px";
}}
for (const token of document.querySelectorAll(".t")) {{
  token.addEventListener("mousemove", show);
  token.addEventListener("mouseleave", () => detail.style.display = "none");
}}
</script></body></html>
"""


_COLUMNS, _CHAR, _LINE, _MARGIN = 86, 8.2, 24, 16


def svg_picture(title: str, fragments: Iterable[Fragment], scale: Scale) -> str:
    """The coloured text as SVG for a document, with a legend; whitespace is collapsed."""
    parts = [f'<text x="{_MARGIN}" y="{_LINE}" font-weight="bold">{escape(title)}</text>']
    for index, colour in enumerate(PAGE_COLOURS):
        x = _MARGIN + index * 36
        parts.append(f'<rect x="{x}" y="{_LINE + 10}" width="36" height="16" fill="{colour}"/>')
        parts.append(f'<text x="{x + 6}" y="{_LINE + 22}" font-size="11">{scale.centre(index):.3g}</text>')
    column, y = 0, 4 * _LINE
    for fragment in fragments:
        text = " ".join(fragment.text.split("\n"))
        if column and column + len(text.rstrip()) > _COLUMNS:
            column, y, text = 0, y + _LINE, text.lstrip()
        for start in range(0, len(text), _COLUMNS):  # a prompt may be longer than a line
            line = text[start : start + _COLUMNS]
            if start:
                column, y = 0, y + _LINE
            x, width = _MARGIN + column * _CHAR, len(line) * _CHAR
            if fragment.steps:
                colour = PAGE_COLOURS[scale.level(fragment.bits)]
                parts.append(f'<rect x="{x:.1f}" y="{y - 16}" width="{width:.1f}" height="21" fill="{colour}"/>')
            parts.append(
                f'<text x="{x:.1f}" y="{y}" textLength="{width:.1f}" xml:space="preserve" '
                f'fill="{"#222" if fragment.steps else "#777"}">{escape(line)}</text>'
            )
            column += len(line)
    width, height = 2 * _MARGIN + _COLUMNS * _CHAR, y + _LINE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" font-family="monospace" '
        f'font-size="13.6"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )
