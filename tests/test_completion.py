"""What a completion says beside its text: likelihoods, bits, timings; and who may take part in it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny import TINY

from export.to_gguf import export_synthetic
from mobiquant.packing import unpack_plane, unpack_scale_offset
from runtime import Model
from runtime.sampling import log_softmax

TALK = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("completion") / "random.gguf"
    export_synthetic(TINY, target, "random")
    return target


@pytest.fixture
def model(path: Path) -> Iterator[Model]:
    with Model(path, seed=1) as opened:
        yield opened


def expected_logprobs(path: Path, tokens: list[int], bits: float = 8) -> list[float]:
    """Of tokens[1:], each given those before it, computed in one piece."""
    with Model(path) as fresh:
        fresh.bits = bits
        logprobs = log_softmax(fresh.eval(tokens, all_logits=True))
    return [float(row[token]) for row, token in zip(logprobs, tokens[1:], strict=False)]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_scores_the_prompt_and_the_answer(path: Path, model: Model, stream: bool) -> None:
    prompt = "score every one of these bytes, which are more than the sixty-four held at once"
    options = {"max_tokens": 5, "echo": True, "logprobs": 2, "avg_bits": 3.0, "temperature": 1.5}
    if stream:
        chunks = [chunk["choices"][0] for chunk in model.create_completion(prompt, stream=True, **options)]
        parts = [chunk["logprobs"] for chunk in chunks]
        logprobs = {key: [item for part in parts for item in part[key]] for key in parts[0]}
        text = "".join(chunk["text"] for chunk in chunks)
    else:
        choice = model.create_completion(prompt, **options)["choices"][0]
        logprobs, text = choice["logprobs"], choice["text"]
    tokens = [token for token, _ in model._sequence.history][: len(prompt) + 1]
    tokens += model.tokenize("".join(logprobs["tokens"][len(prompt) + 1 :]), add_bos=False)
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert text.startswith(prompt)
    scored = len(prompt)  # an answer of half characters has no text to find its tokens by
    np.testing.assert_allclose(
        logprobs["token_logprobs"][1 : scored + 1], expected_logprobs(path, tokens, 3.0)[:scored], rtol=1e-6
    )
    assert len(logprobs["tokens"]) == len(prompt) + 1 + 5
    assert logprobs["text_offset"][2:4] == [len("<|begin_of_text|>") + 1, len("<|begin_of_text|>") + 2]
    for best in logprobs["top_logprobs"][1:]:
        assert 1 <= len(best) <= 2  # two halves of characters may have one text


def test_no_tokens_with_echo_only_score(model: Model) -> None:
    result = model.create_completion("abc", max_tokens=0, echo=True, logprobs=0)
    assert result["usage"]["completion_tokens"] == 0
    assert result["choices"][0]["text"] == "abc"
    assert len(result["choices"][0]["logprobs"]["tokens"]) == 4


def test_the_drawn_token_s_likelihood_is_before_sampling(path: Path, model: Model) -> None:
    result = model.create_completion("abc", max_tokens=1, logprobs=1, temperature=0)
    tokens = model.tokenize("abc")
    with Model(path) as fresh:
        best = float(log_softmax(fresh.eval(tokens)).max())
    assert result["choices"][0]["logprobs"]["token_logprobs"] == [pytest.approx(best, rel=1e-9)]


def test_bits_of_every_token_agree_with_the_depths_and_the_counters(model: Model) -> None:
    model.eval(model.tokenize("ab"))
    before = model.stats
    result = model.create_completion("ab", max_tokens=20, avg_bits=3.5, temperature=1.0)
    depths = model.depths(model.position - 20, 20)
    np.testing.assert_allclose(result["bits"]["tokens"], model.average_bits(depths))
    assert result["bits"]["average"] == pytest.approx(np.mean(result["bits"]["tokens"]))
    # The prompt's first tokens were computed too: at 8 bits before, at 3.5 now.
    after = model.stats - before
    assert after.tokens == 3 + 19
    assert after.average_bits == pytest.approx(float(model.average_bits(model.depths(0, model.position)).mean()))


def test_timings_count_what_was_computed(model: Model) -> None:
    model.create_completion("one two three", max_tokens=2)
    timings = model.create_completion("one two three four", max_tokens=6)["timings"]
    assert (timings["prompt_n"], timings["predicted_n"]) == (len(" four"), 5)
    assert timings["prompt_ms"] > 0 and timings["predicted_per_second"] > 0


def test_logits_processor_decides(model: Model) -> None:
    seen: list[list[int]] = []
    wanted = model.tokenize("bcd", add_bos=False)

    def only(tokens: np.ndarray, logits: np.ndarray) -> np.ndarray:
        seen.append(tokens.tolist())
        allowed = np.full_like(logits, -np.inf)
        allowed[wanted[len(seen) - 1]] = 0
        return allowed

    result = model.create_completion("x", max_tokens=3, logits_processor=only)
    assert result["choices"][0]["text"] == "bcd"
    assert [len(tokens) for tokens in seen] == [2, 3, 4]


def test_chat_completion_is_the_completion_of_the_laid_out_conversation(model: Model) -> None:
    options = {"max_tokens": 30, "temperature": 1.2, "seed": 5}
    whole = model.create_chat_completion(TALK, **options)
    assert whole["object"] == "chat.completion"
    text = whole["choices"][0]["message"]["content"]
    plain = model.create_completion(model.chat.encode(TALK), stop=model.chat.stop, **options)
    assert (text, whole["usage"]) == (plain["choices"][0]["text"], plain["usage"])
    chunks = list(model.create_chat_completion(TALK, stream=True, **options))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert sum(len(chunk["bits"]["tokens"]) for chunk in chunks[1:-1]) <= whole["usage"]["completion_tokens"]
    assert chunks[-1]["usage"] == whole["usage"]


def test_chat_logprobs_have_the_api_s_form(model: Model) -> None:
    result = model.create_chat_completion(TALK, max_tokens=3, logprobs=True, top_logprobs=2)
    content = result["choices"][0]["logprobs"]["content"]
    assert len(content) == 3
    assert all(len(entry["top_logprobs"]) == 2 and entry["bytes"] for entry in content)


def test_cancelled_completion_ends_and_computes_no_more(path: Path) -> None:
    with Model(path, n_batch=8) as model:
        asked = iter([False, False, True])
        result = model.create_completion("x" * 60, max_tokens=5, cancelled=lambda: next(asked, True))
        assert result["usage"]["completion_tokens"] == 0
        assert model.position <= 24


def test_unknown_sampling_argument_is_named(model: Model) -> None:
    with pytest.raises(TypeError, match="found heat"):
        model.create_completion("x", heat=2)


def test_no_prompt_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="prompt: expected at least one token"):
        model.create_completion([])


# Embeddings


def test_embedding_does_not_depend_on_the_pieces(path: Path, model: Model) -> None:
    text = "hidden states of a text that needs several pieces"
    each = model.embed(text, pooling="none", normalize=False)
    assert each.shape == (len(text) + 1, TINY.embedding_length)
    with Model(path, n_batch=7) as pieces:
        np.testing.assert_array_equal(pieces.embed(text, pooling="none", normalize=False), each)
    np.testing.assert_array_equal(model.embed(text, pooling="last", normalize=False), each[-1])
    mean = model.embed(text)
    np.testing.assert_allclose(mean, each.mean(axis=0) / np.linalg.norm(each.mean(axis=0)), rtol=1e-5)
    with pytest.raises(ValueError, match="pooling: expected mean, last or none, found 'max'"):
        model.embed(text, pooling="max")


def test_logits_are_the_output_head_times_the_hidden_states(path: Path, model: Model) -> None:
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    rows, columns = TINY.vocab_size, TINY.embedding_length
    planes = [tensors[f"token_embd.slice{index}"].view(np.int8).reshape(-1, 1, 512) for index in (1, 2, 3, 4)]
    codes = sum(4 ** (3 - i) * unpack_plane(plane, rows, columns).astype(int) for i, plane in enumerate(planes))
    packed = tensors["token_embd.scale_offset"].view(np.float16).reshape(-1, 1, 2, 16)
    scales, offsets = (part.astype(np.float64) for part in unpack_scale_offset(packed, rows))
    head = scales / 64 * (codes + 0.5) - offsets
    tokens = model.tokenize("compare")
    hidden = model.embed(tokens, pooling="none", normalize=False)
    model.reset()
    model.output_bits = 8
    # The head rounds its input to int8, a share of 1/254 of the largest value.
    np.testing.assert_allclose(hidden @ head.T, model.eval(tokens, all_logits=True), atol=0.05)


# Threads


def test_forks_give_the_same_tokens_in_parallel_threads(path: Path) -> None:
    options = {"max_tokens": 25, "temperature": 1.1, "seed": 9, "avg_bits": 3.0}
    with Model(path) as model:
        expected = model.create_completion("in parallel", **options)["choices"][0]
        results: list[dict] = []

        def work() -> None:
            with model.fork(n_threads=1, empty=True) as own:
                results.append(own.create_completion("in parallel", **options)["choices"][0])

        workers = [threading.Thread(target=work) for _ in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert results == [expected] * 6
