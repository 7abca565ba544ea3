"""`mobiquant run` and `mobiquant chat` in a terminal and in a pipe: colours, pages, commands, Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tiny import TINY

from export.to_gguf import export_synthetic
from mobiquant.cli import main
from runtime.commands.page import Fragment, html_page, svg_picture
from runtime.commands.picture import Scale, coloured, histogram
from runtime.generation import Step

ROOT = Path(__file__).parent.parent
GREEDY = ("-n", "12", "--temp", "0")
COLOUR = re.compile("\033\\[38;5;\\d+m")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context so long that an answer does not end by itself before Ctrl-C."""
    target = tmp_path_factory.mktemp("console") / "random.gguf"
    export_synthetic(replace(TINY, context_length=50_000), target, "random")
    return target


def command(*arguments: object, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mobiquant", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
    )


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self._master, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mobiquant", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm-256color", **environment},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)
        self.output = ""

    def read_until(self, pattern: str) -> str:
        """What came since the last call, up to a match of `pattern`."""
        start, end = len(self.output), time.monotonic() + 30
        while not re.search(pattern, self.output[start:]):
            assert time.monotonic() < end, self.output[start:]
            if select.select([self._master], [], [], 0.2)[0]:
                try:
                    self.output += os.read(self._master, 4096).decode("utf-8", errors="replace")
                except OSError:  # the other end is closed
                    break
        return self.output[start:]

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def end(self) -> int:
        status = self.process.wait(timeout=30)
        os.close(self._master)
        return status


# In a pipe


def test_run_as_json_is_the_python_result(path: Path) -> None:
    done = command("run", "-m", path, "-p", "hi", *GREEDY, "--avg-bits", "3", "--json")
    result = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert result["usage"]["completion_tokens"] == 12 == len(result["bits"]["tokens"])
    assert 2 <= result["bits"]["average"] <= 8
    plain = command("run", "-m", path, "-p", "hi", *GREEDY, "--avg-bits", "3")
    assert plain.stdout == result["choices"][0]["text"] + "\n"


def test_stop_string_ends_the_text_before_it(path: Path) -> None:
    whole = command("run", "-m", path, "-p", "hi", *GREEDY).stdout
    stop = whole[4:6]
    assert command("run", "-m", path, "-p", "hi", *GREEDY, "-r", stop).stdout == whole[: whole.index(stop)] + "\n"


def test_interactive_run_goes_on_with_what_is_typed(path: Path) -> None:
    done = command("run", "-m", path, "-p", "hi", *GREEDY, "-i", text="more\nand more\n")
    assert done.returncode == 0
    assert re.findall(r"prompt (\d+) tokens", done.stderr) == ["3", str(3 + 12 + 5), str(3 + 12 + 5 + 12 + 9)]


def test_prompt_cache_saves_computing_the_prompt_again(path: Path, tmp_path: Path) -> None:
    cache = tmp_path / "session.bin"
    options = ("run", "-m", path, *GREEDY, "--avg-bits", "3", "--json", "--prompt-cache", cache)
    first, second, longer = (
        json.loads(command(*options, "-p", prompt).stdout) for prompt in ("a beginning", "a beginning", "a beginning!")
    )
    assert [result["timings"]["prompt_n"] for result in (first, second, longer)] == [12, 1, 1]
    assert second["choices"] == first["choices"]
    cache.write_bytes(cache.read_bytes()[:-1])
    done = command(*options, "-p", "a beginning")
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*session\.bin: state: expected \d+ bytes .*; delete it to begin anew\n", done.stderr)


def test_show_bits_in_a_pipe_is_plain_text_with_a_histogram(path: Path) -> None:
    plain = command("run", "-m", path, "-p", "hi", *GREEDY, "--avg-bits", "3")
    shown = command("run", "-m", path, "-p", "hi", *GREEDY, "--avg-bits", "3", "--show-bits")
    assert shown.stdout == plain.stdout
    assert "\033" not in shown.stderr
    counts = re.findall(r"^ *[\d.]+ +(\d+)", shown.stderr, re.MULTILINE)
    assert sum(map(int, counts)) == 12


def test_chat_answers_every_line_and_obeys_commands(path: Path) -> None:
    options = ("-m", path, *GREEDY, "--bits", "8", "-sys", "Be brief.")
    done = command("chat", *options, text="one\n/bits 3\ntwo\n/bits 4\nthree\n/reset\none\n/exit\nnever read\n")
    assert done.returncode == 0, done.stderr
    bits = [float(bits) for bits in re.findall(r"average bits ([\d.]+)", done.stderr)]
    assert len(bits) == 4
    assert (bits[0], bits[2], bits[3]) == (8, 4, 4) and bits[1] not in (2, 4, 6, 8)
    assert "3 bits on average from now on" in done.stderr and "4 bits for every token from now on" in done.stderr
    prompts = [int(tokens) for tokens in re.findall(r"prompt (\d+) tokens", done.stderr)]
    assert prompts[0] < prompts[1] < prompts[2] and prompts[3] == prompts[0]


def test_chat_computes_only_what_is_new_also_after_a_change_of_precision(path: Path) -> None:
    done = command("chat", "-m", path, *GREEDY, "--json", text="first message\n/bits 2\nsecond\n")
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["timings"]["prompt_n"] == first["usage"]["prompt_tokens"]
    assert second["timings"]["prompt_n"] <= second["usage"]["prompt_tokens"] - first["usage"]["prompt_tokens"]
    assert set(second["bits"]["tokens"]) == {2.0}


def test_chat_takes_a_message_over_several_lines(path: Path, tmp_path: Path) -> None:
    message = tmp_path / "message.txt"
    message.write_text("two\nlines\n")
    from_file = command("chat", "-m", path, *GREEDY, "-f", message, "-st")
    assert from_file.returncode == 0
    assert command("chat", "-m", path, *GREEDY, text="two\\\nlines\n").stdout == from_file.stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/bits 9", "average bits: expected a number from 2 to 8, found 9.0"),
        ("/bits some", "/bits: expected a number from 2 to 8, found 'some'"),
        ("/dance", "/dance: expected a command, see /help"),
    ],
)
def test_bad_chat_command_in_a_pipe_is_one_line(path: Path, line: str, message: str) -> None:
    done = command("chat", "-m", path, text=line + "\n")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {message}\n")


def test_flags_that_contradict_are_named(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-m", str(path), "-p", "x", "--json", "--show-bits"]) == 1
    assert capfd.readouterr().err == "error: --json: expected without --show-bits and --html: the bits are in it\n"
    assert main(["run", "-m", str(path), "-p", "x", "--json", "-i"]) == 1
    assert capfd.readouterr().err == "error: --json: expected without -i\n"


# In a terminal


def test_control_c_ends_the_answer_and_not_the_program(path: Path) -> None:
    terminal = Terminal("chat", "-m", path, "--temp", "2", "--seed", "1")
    terminal.read_until("> ")
    terminal.send("hello\n")
    terminal.read_until("hello\r\n.")
    time.sleep(0.2)
    os.kill(terminal.process.pid, signal.SIGINT)
    assert "MB read per token" in terminal.read_until("read per token\r\n(.|\n)*> $")
    terminal.send("/bits 1\n")
    assert "error: average bits: expected" in terminal.read_until("error(.|\n)*> $")
    terminal.send("/help\n")
    assert "/show-bits" in terminal.read_until("goes on(.|\n)*> $")
    time.sleep(0.2)  # until it waits for input
    os.kill(terminal.process.pid, signal.SIGINT)  # at the prompt: only the line is thrown away
    terminal.read_until("> $")
    terminal.send("\x04")
    assert terminal.end() == 0


def test_bits_colour_a_terminal_unless_no_color_is_set(path: Path) -> None:
    options = ("run", "-m", path, "-p", "hi", *GREEDY, "--show-bits", "--avg-bits", "3")
    terminal = Terminal(*options)
    output = terminal.read_until("tokens\r\n(.|\n)*█")
    assert terminal.end() == 0
    assert len(COLOUR.findall(output)) >= 2
    plain = Terminal(*options, NO_COLOR="1")
    assert not COLOUR.search(plain.read_until("tokens\r\n(.|\n)*█"))
    assert plain.end() == 0


# Pictures


def step(bits: float) -> Step:
    return Step(1, bits, np.full((2, 7), 3, np.uint8))


def test_scale_covers_the_range_and_clips_the_rest() -> None:
    assert [Scale().level(bits) for bits in (1, 2, 2.2, 2.3, 5, 8, 9)] == [0, 0, 0, 1, 6, 12, 12]
    near = Scale(2.0, 1 / 6)
    assert [near.level(bits) for bits in (2, 3, 4, 8)] == [0, 6, 12, 12]


def test_colour_ends_at_every_line_end() -> None:
    assert re.fullmatch("\033\\[38;5;(\\d+)ma\033\\[0m\n\n\033\\[38;5;\\1mb\033\\[0m", coloured("a\n\nb", 4, Scale()))


def test_histogram_has_a_row_for_every_level_between() -> None:
    lines = histogram([2, 2, 3], Scale(), colour=False).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["2.00", "2"], ["2.50", "0"], ["3.00", "1"]]
    assert histogram([], Scale(), colour=False).count("\n") == 0


class Page(HTMLParser):
    """Collects what a browser would fetch or run, and the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tokens: list[dict[str, str | None]] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        self.outside += [value or "" for name, value in attrs if name in ("src", "href")]
        if attributes.get("class") == "t":
            self.tokens.append(attributes)


def test_page_is_self_contained_and_text_stays_text() -> None:
    hostile = "</span><script>alert(1)</script><img src=x>"
    page = Page()
    text = html_page(hostile, [Fragment(hostile), Fragment(hostile, [step(2.5), step(3.5)])], Scale())
    page.feed(text)
    assert page.outside == [] and "http" not in text
    assert page.tags.count("script") == 1 and "img" not in page.tags
    (token,) = page.tokens
    assert (token["data-bits"], token["data-n"], token["data-depths"]) == ("3.00", "2", "3" * 28)


def test_page_of_a_run_has_every_token(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "bits.html"
    done = command("run", "-m", path, "-p", "hi <b>", *GREEDY, "--avg-bits", "3", "--html", target)
    assert done.returncode == 0
    page = Page()
    page.feed(target.read_text(encoding="utf-8"))
    assert sum(int(token["data-n"] or 0) for token in page.tokens) == 12
    assert "12 tokens, " in target.read_text(encoding="utf-8") and "hi &lt;b&gt;" in target.read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["bits.html"]


def test_svg_shows_every_word_and_escapes_it() -> None:
    from xml.etree import ElementTree

    words = [Fragment(f"word{index} ", [step(2 + index % 6)]) for index in range(60)] + [Fragment("a<b & c", [step(4)])]
    root = ElementTree.fromstring(svg_picture("title", [Fragment("prompt " * 30), *words], Scale()))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("word59 ") == 1 and "a<b & c" in texts
