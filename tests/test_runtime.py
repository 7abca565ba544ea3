"""The Python half of the runtime: budgets, reuse of the cache, completions, text that streams."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny import TINY

from export.synthetic import synthetic_vocabulary
from export.to_gguf import export_synthetic
from runtime import MobiQuantError, Model
from runtime.budget import Budget
from runtime.sampling import SamplingSettings
from runtime.stream import StopStrings, TextStream
from runtime.tokens import Tokenizer

ROOT = Path(__file__).parent.parent
GREEDY = SamplingSettings(temperature=0)
TEXT = "naïve 日本語 😀👩‍👩‍👧 tail"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("runtime") / "random.gguf"
    export_synthetic(TINY, target, "random")
    return target


@pytest.fixture
def model(path: Path) -> Iterator[Model]:
    with Model(path, seed=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    vocabulary = synthetic_vocabulary()
    return Tokenizer(vocabulary.tokenizer_json, bos=vocabulary.bos_token, add_bos=True)


def first(model: Model, tokens: list[int], n: int) -> list[int]:
    return [token for token, _ in zip(model.generate(tokens, GREEDY), range(n), strict=False)]


# Budgets


def test_default_is_the_highest_precision_in_the_file(model: Model) -> None:
    assert model.bits == 8 and isinstance(model.bits, int)


def test_an_int_is_one_depth_and_a_float_is_routed(model: Model) -> None:
    model.bits = 4
    model.eval(model.tokenize("one depth"))
    assert (model.depths(0, model.position) == 2).all()
    model.reset()
    model.bits = 4.0
    model.eval(model.tokenize("routed by token, some deep and some not"))
    assert set(np.unique(model.depths(0, model.position))) >= {1, 2, 3}


@pytest.mark.parametrize("bits", [2.5, 3.0, 4.0, 6.0, 7.5])
def test_synthetic_routers_spend_about_the_average_asked_for(model: Model, bits: float) -> None:
    model.bits = bits
    model.eval(np.random.default_rng(0).integers(0, 256, 96))
    assert abs(model.stats.average_bits - bits) < 0.5


def test_average_bits_count_weights_read(model: Model) -> None:
    model.bits = 3.3
    model.eval(model.tokenize("count me"))
    weights = np.array([np.prod(TINY.linear(name)) for name in ("attn_q", "attn_k", "attn_v", "attn_output")])
    weights = np.append(weights, [np.prod(TINY.linear(name)) for name in ("ffn_gate", "ffn_up", "ffn_down")])
    depths = model.depths(0, model.position).astype(float)
    expected = 2 * (depths * weights).sum() / (weights.sum() * depths[..., 0].size)
    assert model.stats.average_bits == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bits", [3, 0, 10, 1.9, 8.1, float("nan")])
def test_bad_budget_is_refused_and_the_old_one_stays(model: Model, bits: float) -> None:
    model.bits = 6
    with pytest.raises(ValueError, match="bits: expected"):
        model.bits = bits
    assert model.bits == 6


def test_bits_and_average_bits_together_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="expected bits or average bits, found both"):
        Model(path, bits=4, avg_bits=4.0)


# Evaluation


def test_pieces_of_any_length_give_the_same_logits(path: Path, model: Model) -> None:
    tokens = model.tokenize("a prompt that is longer than the pieces it is computed in")
    expected = model.eval(tokens, all_logits=True)
    assert expected.shape == (len(tokens), TINY.vocab_size)
    with Model(path, n_batch=7) as pieces:
        np.testing.assert_array_equal(pieces.eval(tokens, all_logits=True), expected)
        pieces.reset()
        np.testing.assert_array_equal(pieces.eval(tokens), expected[-1])
        np.testing.assert_array_equal(pieces.logits, expected[-1])


def test_prompt_longer_than_the_context_says_both_numbers(model: Model) -> None:
    with pytest.raises(MobiQuantError, match="at most 96 tokens, found 97") as caught:
        model.eval([1] * 97)
    assert caught.value.status == "MQ_ERR_CONTEXT_FULL"
    assert model.position == 0
    model.eval([1] * 90)
    with pytest.raises(MobiQuantError, match="at most 96 tokens of which 90 are used, found 7 to add"):
        model.eval([1] * 7)


def test_token_outside_the_vocabulary_leaves_the_position(model: Model) -> None:
    model.eval([1, 2])
    with pytest.raises(MobiQuantError, match="272"):
        model.eval([3, 272])
    assert model.position == 2


def test_second_prompt_computes_only_what_is_new_and_gives_the_same_tokens(path: Path, model: Model) -> None:
    head = model.tokenize("the same beginning of a conversation, ")
    first(model, head + model.tokenize("one end", add_bos=False), 4)
    second = head + model.tokenize("other end", add_bos=False)
    before = model.stats
    reused = first(model, second, 6)
    assert (model.stats - before).tokens == len("other end") + 5
    with Model(path) as fresh:
        assert first(fresh, second, 6) == reused


def test_cache_of_another_budget_is_not_reused(path: Path, model: Model) -> None:
    tokens = model.tokenize("precision matters")
    first(model, tokens, 3)
    model.bits = 2
    with Model(path, bits=2) as fresh:
        assert first(model, tokens, 8) == first(fresh, tokens, 8)


def test_generation_ends_when_the_context_is_full(model: Model) -> None:
    tokens = model.tokenize("x" * 89)
    assert len(list(model.generate(tokens, GREEDY))) == 96 - len(tokens) + 1


def test_closed_model_refuses_every_use(path: Path) -> None:
    with Model(path) as model:
        model.eval([1])
    model.close()
    for use in (lambda: model.eval([1]), lambda: model.stats, lambda: model.tokenize("a"), lambda: model.n_ctx):
        with pytest.raises(ValueError, match="found it closed"):
            use()


# Completion


def test_completion_has_the_shape_of_llama_cpp_python(model: Model) -> None:
    result = model("hello", max_tokens=5)
    assert result["id"].startswith("cmpl-") and result["object"] == "text_completion"
    assert result["usage"] == {"prompt_tokens": 6, "completion_tokens": 5, "total_tokens": 11}
    (choice,) = result["choices"]
    assert set(choice) == {"text", "index", "logprobs", "finish_reason"}
    assert choice["finish_reason"] == "length"


def test_chunks_join_to_the_whole_completion(model: Model) -> None:
    options = {"max_tokens": 40, "temperature": 1.5, "seed": 3, "echo": True, "avg_bits": 3.0}
    whole = model("pröm", **options)["choices"][0]
    chunks = [chunk["choices"][0] for chunk in model("pröm", stream=True, **options)]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert whole["text"].startswith("pröm")
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_budget_of_a_completion_lasts_only_for_it(model: Model) -> None:
    model.bits = 6
    before = model.stats
    model("hi", max_tokens=3, bits=2)
    assert (model.stats - before).average_bits == 2
    assert model.bits == 6


def test_stop_string_ends_the_text_before_it(model: Model) -> None:
    options = {"max_tokens": 30, "temperature": 1.5, "seed": 4}
    whole = model("go", **options)["choices"][0]["text"]
    stop = whole[len(whole) // 2 :][:2]
    cut = model("go", stop=stop, **options)["choices"][0]
    assert cut == {"text": whole[: whole.index(stop)], "index": 0, "logprobs": None, "finish_reason": "stop"}


@pytest.mark.parametrize("pieces", [["abXY", "c"], ["abX", "Yc"], ["a", "b", "X", "Y", "c"]])
def test_stop_string_is_found_across_pieces(pieces: list[str]) -> None:
    stops, text = StopStrings(["XY", "XZ"]), ""
    for piece in pieces:
        new, stopped = stops.push(piece)
        text += new
        if stopped:
            break
    assert (text, stopped) == ("ab", True)


def test_beginning_of_a_stop_string_is_given_out_when_it_does_not_go_on() -> None:
    stops = StopStrings(["XY"])
    assert stops.push("aX") == ("a", False)
    assert stops.push("Xb") == ("XXb", False)
    assert stops.push("X") == ("", False)
    assert stops.flush() == "X"


# Text


def test_text_survives_the_round_trip_through_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode(TEXT.encode()) == tokenizer.encode(TEXT)
    assert tokenizer.encode("a", add_bos=False) == tokenizer.encode("a")[1:]


def test_streamed_characters_are_never_split(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(TEXT)]
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.flush() == ""


def test_incomplete_character_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode("é😀", add_bos=False)[:-1]]
    assert "".join(pieces) == "é"
    assert stream.flush() == "\ufffd"


def test_special_markers_in_text_are_text_unless_asked(tokenizer: Tokenizer) -> None:
    marker = "<|begin_of_text|>"
    assert len(tokenizer.encode(marker, add_bos=False)) == len(marker)
    assert tokenizer.encode(marker, add_bos=False, special=True) == [tokenizer.bos]
    assert tokenizer.decode([tokenizer.bos], special=True) == marker
    assert tokenizer.decode([tokenizer.bos]) == ""


def test_bytes_that_are_not_utf8_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="expected UTF-8, found byte 0xff at 2"):
        tokenizer.encode(b"ok\xff")


# Importing


def test_importing_the_runtime_does_not_import_the_calibration_side() -> None:
    code = (
        "import sys; from runtime import Model; import runtime.commands.cli, mobiquant.cli;"
        "print([name for name in ('torch', 'transformers', 'mobiquant.calibrate', 'gguf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_compiled_module_says_how_to_get_it() -> None:
    code = "import sys; sys.modules['runtime._native'] = None; from runtime import Model"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "ImportError: the compiled module runtime._native is missing" in done.stderr
    assert "run: pip install ." in done.stderr


def test_budget_of_keeps_int_and_float_apart() -> None:
    assert Budget.of(4) == Budget(4.0, routed=False)
    assert Budget.of(np.int64(4)) == Budget(4.0, routed=False)
    assert Budget.of(np.float32(4)) == Budget(4.0, routed=True)


def test_models_of_one_file_share_their_tokenizer_until_the_last_is_gone(path: Path) -> None:
    first, second = Model(path), Model(path, n_ctx=32)
    shared = weakref.ref(first.tokenizer)
    assert second.tokenizer is first.tokenizer
    first.close()
    assert second.tokenize("the same") and shared() is not None
    second.close()
    del first, second
    gc.collect()
    assert shared() is None
