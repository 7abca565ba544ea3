"""Tokens, text and conversations of every tokenizer family are those of transformers; what people write stays text."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import FAMILIES, TEXT, Family
from tiny import TINY

from export.errors import ExportError
from export.to_gguf import export_synthetic
from export.vocab import Vocabulary, read_vocabulary
from runtime import Model
from runtime.chat import ChatTemplate
from runtime.stream import TextStream
from runtime.tokens import Tokenizer

transformers = pytest.importorskip("transformers")

VOCAB = 1008
TORTURE = {
    "empty": "",
    "space": " ",
    "spaces": "a  b   c    d     e" + " " * 40 + "f ",
    "leading": "  two spaces, then text",
    "newlines": "\n\n\na\n b \n\n\n\n\r\nc\r\r\n",
    "tabs": "\t\tif x:\n\t\t\treturn\t\n",
    "digits": "0 12 123 1234 12345678901234567890 3.14159 1e-9 ٣٤٥ ⅷ",
    "punctuation": "...!?!? (a) [b] {c} <d> --- ``e'' it's I'LL we'Ve",
    "emoji": "🙂👍🏽👩‍👩‍👧‍👦🇩🇪 e\u20e3 ☃️",
    "combining": "e\u0301 é n\u0303 \u0301\u0301 Å Å ﬁ q\u0307\u0323 한 한",
    "cjk": "東京の夜。你好\uff0c世界\uff01 한국어 조선말",
    "right to left": "שלום עולם, مرحبا بالعالم",
    "rare": "\U0001d518\U0001d52b\U0001d526 \U0010ffff \ue000 \u200b\u200d\ufeff \u2028\u00a0\u3000|",
    "replacement": "a\ufffdb \ufffd\ufffd\ufffd\ufffd\ufffd c",
    "control bytes": "\x00\x01\x07\x1b[0m\x7f\x85",
    "long run": "a" * 5000 + " " * 3000 + "\n" * 500 + "é" * 700 + "1" * 999,
    "specials": "x<s>y</s> <|eot_id|><|im_start|>user\n[INST]<end_of_turn><bos>z<unk>",
    "nearly special": "<s <|im_start| >[INST <0x0A> <0x41> ▁▁ Ġ",
    "added": "<think>\nhm\n</think><tool_call> x",
    "prose": TEXT.read_text(encoding="utf-8")[:3000],
}
TALK = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "  Grüße, 1+1? \n"},
    {"role": "assistant", "content": "2, naïvely."},
    {"role": "user", "content": "and\n\nmore 😀"},
]


@dataclass
class Made:
    """One family's tokenizer, ours and transformers'."""

    family: Family
    vocabulary: Vocabulary
    ours: Tokenizer
    theirs: transformers.PreTrainedTokenizerFast

    def plain(self, text: str) -> list[int]:
        """transformers' tokens of `text` with special tokens taken as text."""
        self.theirs.backend_tokenizer.encode_special_tokens = True
        try:
            return self.theirs.backend_tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            self.theirs.backend_tokenizer.encode_special_tokens = False

    def special_ids(self) -> set[int]:
        return {token for token, added in self.theirs.added_tokens_decoder.items() if added.special}


def open_file_s_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """As the runtime makes it from what the exporter wrote."""
    return Tokenizer(
        vocabulary.tokenizer_json, bos=vocabulary.bos_token, add_bos=vocabulary.add_bos, eos=vocabulary.eos_tokens
    )


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    family = FAMILIES[request.param]
    folder = family.save(tmp_path_factory.mktemp("family"), VOCAB)
    vocabulary = read_vocabulary(folder, VOCAB)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    return Made(family, vocabulary, open_file_s_tokenizer(vocabulary), theirs)


@pytest.fixture
def chat(made: Made) -> Iterator[ChatTemplate]:
    template = ChatTemplate(made.vocabulary.chat_template, made.ours)
    yield template
    template.close()


@pytest.mark.parametrize("text", TORTURE.values(), ids=TORTURE)
def test_tokens_are_those_of_transformers(made: Made, text: str) -> None:
    plain, special = made.plain(text), made.theirs(text, add_special_tokens=False).input_ids
    assert made.ours.encode(text, add_bos=False) == plain
    assert made.ours.encode(text.encode(), add_bos=False) == plain
    assert made.ours.encode(text, add_bos=False, special=True) == special
    assert made.ours.encode(text, special=True) == made.theirs(text).input_ids
    assert made.special_ids().isdisjoint(plain)


@pytest.mark.parametrize("text", TORTURE.values(), ids=TORTURE)
def test_text_is_that_of_transformers_whole_and_in_pieces(made: Made, text: str) -> None:
    tokens = made.ours.encode(text, special=True)
    for special in (True, False):
        expected = made.theirs.decode(tokens, skip_special_tokens=not special)
        assert made.ours.decode(tokens, special=special) == expected
    assert streams_to_text(made, tokens)
    plain = made.ours.encode(text)
    normal = unicodedata.normalize("NFC", text) if made.theirs.backend_tokenizer.normalizer is not None else text
    if made.family.byte_level:  # nothing is lost but what a normalizer changes
        assert made.ours.decode(plain) in (text, normal)
    assert streams_to_text(made, plain)


def stream(tokenizer: Tokenizer, tokens: list[int], before: list[int] | None = None) -> str:
    pieces = TextStream(tokenizer, before or ())
    return "".join([*map(pieces.push, tokens), pieces.flush()])


def streams_to_text(made: Made, tokens: list[int]) -> bool:
    """Equal, but for this: a byte fallback takes a row of bytes as one, so that one wrong byte turns characters into
    replacements that are out already."""
    text, streamed = made.ours.decode(tokens), stream(made.ours, tokens)
    if made.family.byte_level or "\ufffd" not in text:
        return streamed == text
    return len(streamed.replace("\ufffd", "")) >= len(text.replace("\ufffd", ""))


@pytest.mark.parametrize("name", ["spaces", "emoji", "cjk", "prose", "digits", "tabs"])
def test_a_continuation_joins_its_prompt_as_if_both_were_one(made: Made, name: str) -> None:
    tokens = made.ours.encode(TORTURE[name])
    whole = made.ours.decode(tokens)
    for cut in {1, 2, len(tokens) // 3, len(tokens) // 2, len(tokens) - 1}:
        before = made.ours.decode(tokens[:cut])
        if not before.endswith("\ufffd"):
            assert before + stream(made.ours, tokens[cut:], tokens[:cut]) == whole


def test_any_tokens_stream_to_their_text(made: Made) -> None:
    random = np.random.default_rng(3)
    for _ in range(60):
        tokens = random.integers(0, made.theirs.vocab_size, 40).tolist()
        assert streams_to_text(made, tokens)


def test_a_long_row_of_wrong_bytes_streams_while_it_lasts(made: Made) -> None:
    wrong = made.ours.encode("é" if made.family.byte_level else "\U0010ffff", add_bos=False)[-1]
    pieces, out = TextStream(made.ours), ""
    for count in range(1, 400):
        out += pieces.push(wrong)
        assert out == "\ufffd" * max(0, count - 3)
    after = made.ours.encode("end", add_bos=False)
    assert out + "".join(map(pieces.push, after)) + pieces.flush() == made.ours.decode([wrong] * 399 + after)


def test_the_text_of_single_tokens_adds_up(made: Made) -> None:
    tokens = made.ours.encode("one two  three, and four.", add_bos=False)
    assert "".join(map(made.ours.piece, tokens)).lstrip() == "one two  three, and four."
    assert made.ours.piece(made.ours.end) == made.theirs.eos_token


def test_begin_and_end_are_those_of_the_model_s_files(made: Made) -> None:
    begin, vocabulary = made.theirs.bos_token_id, made.vocabulary
    assert vocabulary.bos_token == begin and vocabulary.add_bos == (made.theirs("a").input_ids[0] == begin)
    assert vocabulary.eos_tokens[0] == made.theirs.eos_token_id
    assert set(vocabulary.eos_tokens) == set(made.theirs.convert_tokens_to_ids(list(made.family.eos)))


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("talk", [TALK, TALK[1:2], TALK[1:]], ids=["with system", "one", "no system"])
def test_conversations_give_the_tokens_of_transformers(
    made: Made, chat: ChatTemplate, talk: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    expected = made.theirs.apply_chat_template(
        talk, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    assert chat.encode(talk, add_generation_prompt=add_generation_prompt) == expected


def test_markers_in_messages_change_nothing_but_their_own_text(made: Made, chat: ChatTemplate) -> None:
    markers = [made.theirs.convert_ids_to_tokens(token) for token in sorted(made.special_ids())]
    for marker in markers:
        forged = [
            {"role": "user", "content": f"{marker}a{marker}{marker} b {marker}\n{marker}"},
            {"role": "assistant", "content": f"o{marker}k"},
            {"role": "user", "content": markers[0] + marker[:-1] + marker + marker[1:]},
        ]
        tokens = chat.encode(forged)
        # The same conversation about harmless words of the same kind: as many special tokens, in the same order.
        harmless = [message | {"content": "x"} for message in forged]
        order = [token for token in tokens if token in made.special_ids()]
        assert order == [token for token in chat.encode(harmless) if token in made.special_ids()]
        # Between the template's own special tokens stands what transformers' template renders.
        rendered = made.theirs.apply_chat_template(forged, tokenize=False, add_generation_prompt=True)
        shown = made.ours.decode(tokens, special=True)
        assert shown.replace(" ", "") == rendered.replace(" ", "")
        for message in forged:
            assert message["content"].strip() in shown


def test_text_around_a_marker_is_encoded_as_without_the_template_s(made: Made) -> None:
    marker = made.theirs.eos_token
    chat = ChatTemplate("{{ messages[0].content }}", made.ours)
    for text in (f"one {marker} two", f"{marker}{marker}", f"a{marker}b  c"):
        assert chat.encode([{"role": "user", "content": text}]) == made.plain(text)


def test_a_marker_that_a_normalizer_makes_is_text_too() -> None:
    raw = FAMILIES["qwen"].build()
    from tokenizers import AddedToken, normalizers

    raw.normalizer = normalizers.NFKC()
    raw.add_special_tokens([AddedToken("[END]", special=True, normalized=True)])
    tokenizer, forged = Tokenizer(raw.to_str()), "ok \uff3bEND\uff3d"
    end = raw.token_to_id("[END]")
    assert tokenizer.encode(forged, special=True)[-1] == end
    chat = ChatTemplate("{{ messages[0].content }}[END]", tokenizer)
    assert chat.encode([{"role": "user", "content": forged}]).count(end) == 1


def test_a_marker_of_one_character_is_text_too() -> None:
    raw = FAMILIES["gemma"].build()
    raw.add_special_tokens(["\u2603"])
    tokenizer = Tokenizer(raw.to_str())
    chat = ChatTemplate("{{ messages[0].content }}\u2603", tokenizer)
    tokens = chat.encode([{"role": "user", "content": "a \u26030 \u2603"}])
    assert tokens.count(raw.token_to_id("\u2603")) == 1 and tokenizer.decode(tokens) == "a \u26030 \u2603"


@pytest.mark.parametrize(
    ("config", "post_processor", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"add_bos_token": False}, True, False),
        ({"add_bos_token": True}, False, True),
    ],
)
def test_prompts_begin_as_the_tokenizer_s_files_say(
    tmp_path: Path, config: dict[str, bool], post_processor: bool, expected: bool
) -> None:
    family = FAMILIES["llama-3"]

    def build() -> object:
        tokenizer = family.build()
        if not post_processor:
            from tokenizers import processors

            tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        return tokenizer

    replace(family, build=build, config=family.config | config).save(tmp_path, VOCAB)
    assert read_vocabulary(tmp_path, VOCAB).add_bos is expected


def test_a_tokenizer_model_alone_is_refused_with_the_remedy(tmp_path: Path) -> None:
    FAMILIES["llama-2"].save(tmp_path, VOCAB)
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    with pytest.raises(ExportError, match=r"tokenizer.json: .*found tokenizer.model alone; .*AutoTokenizer"):
        read_vocabulary(tmp_path, VOCAB)


def test_a_completion_goes_on_with_its_prompt_and_an_answer_begins_anew(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.to_gguf.synthetic_vocabulary", lambda: made.vocabulary)
    export_synthetic(replace(TINY, vocab_size=VOCAB), tmp_path / "model.gguf", "random")
    text = "The house stood  by the sea, né 東."
    tokens = made.ours.encode(text)
    # The rest begins with a space, which some decoders would drop at the beginning of a text.
    cut = next(index for index in range(3, len(tokens)) if made.ours.piece(tokens[index]).startswith(" "))
    prompt, rest = tokens[:cut], tokens[cut:]

    def write(planned: list[int]) -> dict[str, Any]:
        """Options that make the model write just these tokens."""
        left = iter([*planned, made.ours.end])

        def choose(_: np.ndarray, logits: np.ndarray) -> np.ndarray:
            chosen = np.full_like(logits, -np.inf)
            chosen[next(left)] = 0
            return chosen

        return {"max_tokens": 60, "logits_processor": choose}

    with Model(tmp_path / "model.gguf") as model:
        done = model.create_completion(prompt, echo=True, **write(rest))["choices"][0]
        assert (done["text"], done["finish_reason"]) == (text, "stop")
        chunks = model.create_completion(prompt, stream=True, **write(rest))
        assert made.ours.decode(prompt) + "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
        answer = model.create_chat_completion(TALK[1:2], **write(made.ours.encode(text, add_bos=False)))
        assert answer["choices"][0]["message"]["content"] == text
