"""Small tokenizers built like those of well-known model families: their normalizers, splits, decoders, special tokens.

Each is trained on the bundled text and laid out as the family's tokenizer.json is; templates have the constructs of the
family's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = Path(__file__).parent.parent / "mobiquant" / "demo" / "heldout.txt"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@dataclass(frozen=True)
class Family:
    """build: the tokenizer; config: what tokenizer_config.json says; eos: texts of all end tokens; template: for chat;
    byte_level: its tokens are bytes, not characters."""

    build: Callable[[], Tokenizer]
    config: dict[str, Any]
    eos: tuple[str, ...]
    template: str
    byte_level: bool

    def save(self, folder: Path, vocab_size: int = 1000) -> Path:
        """A folder with the tokenizer's files and a configuration that names its special tokens."""
        tokenizer = self.build()
        tokenizer.save(str(folder / "tokenizer.json"))
        config = self.config | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": self.template}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        ids = [tokenizer.token_to_id(text) for text in self.eos]
        bos = tokenizer.token_to_id(self.config["bos_token"] or self.eos[-1])
        model = {"model_type": "llama", "vocab_size": vocab_size, "bos_token_id": bos, "eos_token_id": ids}
        (folder / "config.json").write_text(json.dumps(model))
        return folder


def _lines() -> Iterator[str]:
    yield from TEXT.read_text(encoding="utf-8").splitlines()[:300]
    yield from ["Grüße, naïve café — 東京の夜、你好世界。 🙂 1234567 {\n\t'x': [1, 2]\n}"] * 5


def _special(*names: str) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


def _byte_level(digits: str, normalizer: Any, special: list[str], begin: str | None, **model: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**model))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS % digits), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_lines(), trainer)
    tokenizer.add_special_tokens(_special(*special))
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)]
    if begin is not None:
        steps.append(_begin_with(tokenizer, begin))
    tokenizer.post_processor = processors.Sequence(steps)
    return tokenizer


def _begin_with(tokenizer: Tokenizer, begin: str) -> Any:
    ids = [(begin, tokenizer.token_to_id(begin))]
    return processors.TemplateProcessing(single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=ids)


def llama3() -> Tokenizer:
    """Byte-level, digits by three, begin-of-text by the post-processor."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return _byte_level("{1,3}", None, special, "<|begin_of_text|>", ignore_merges=True)


def qwen() -> Tokenizer:
    """Byte-level after NFC, single digits, no begin-of-text, added tokens that are not special."""
    tokenizer = _byte_level("", normalizers.NFC(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None)
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ("<tool_call>", "<think>", "</think>")])
    return tokenizer


def _sentence_pieces(
    outer: list[str], special: list[str], normalizer: Any, splitter: Any, decoder: Any, **added: Any
) -> Tokenizer:
    """Characters with byte fallback. outer: the first tokens of the vocabulary, which become special."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=outer + _BYTES, limit_alphabet=120, show_progress=False
    )
    trained.train_from_iterator(_lines(), trainer)
    model = json.loads(trained.to_str())
    # The trainer makes added tokens of the bytes, which belong to the vocabulary alone.
    model |= {"added_tokens": [], "pre_tokenizer": None}
    tokenizer = Tokenizer.from_str(json.dumps(model))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(_special(*outer, *special))
    tokenizer.post_processor = _begin_with(tokenizer, added["begin"])
    return tokenizer


def _decoder(strip: bool) -> Any:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(content=" ", left=1, right=0)] if strip else steps)


def llama2() -> Tokenizer:
    """A space before every piece of text, by the normalizer, which the decoder takes from the beginning again."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _sentence_pieces(["<unk>", "<s>", "</s>"], [], spaces, None, _decoder(True), begin="<s>")


def mistral() -> Tokenizer:
    """The space before the first piece of text alone, and the instruction's markers as special tokens."""
    splitter = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    special = ["[INST]", "[/INST]"]
    return _sentence_pieces(["<unk>", "<s>", "</s>"], special, None, splitter, _decoder(True), begin="<s>")


def gemma() -> Tokenizer:
    """No space added; rows of newlines and tabs are tokens."""
    splitter = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    outer = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer = _sentence_pieces(
        outer,
        ["<start_of_turn>", "<end_of_turn>"],
        normalizers.Replace(" ", "▁"),
        splitter,
        _decoder(False),
        begin="<bos>",
    )
    rows = ["\n\n", "\n\n\n", "\t\t", "▁▁", "▁▁▁▁"]
    tokenizer.add_tokens([AddedToken(row, normalized=False) for row in rows])
    return tokenizer


_LLAMA3_TEMPLATE = """{{- bos_token }}
{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

_QWEN_TEMPLATE = """{%- if tools %}{{- '<|im_start|>system\\n' }}{{- tools | tojson }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

_LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

_MISTRAL_TEMPLATE = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}"""

_GEMMA_TEMPLATE = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{% set first = messages[0]['content'] + '\\n\\n' %}{% set rest = messages[1:] %}\
{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}\
{% for message in rest %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}\
{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

FAMILIES = {
    "llama-3": Family(
        llama3,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "clean_up_tokenization_spaces": False},
        ("<|end_of_text|>", "<|eot_id|>"),
        _LLAMA3_TEMPLATE,
        byte_level=True,
    ),
    "qwen": Family(
        qwen,
        {"bos_token": None, "eos_token": "<|im_end|>", "add_bos_token": False},
        ("<|im_end|>", "<|endoftext|>"),
        _QWEN_TEMPLATE,
        byte_level=True,
    ),
    "llama-2": Family(
        llama2,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True},
        ("</s>",),
        _LLAMA2_TEMPLATE,
        byte_level=False,
    ),
    "mistral": Family(
        mistral,
        {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "unk_token": "<unk>"},
        ("</s>",),
        _MISTRAL_TEMPLATE,
        byte_level=False,
    ),
    "gemma": Family(
        gemma,
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
        ("<eos>", "<end_of_turn>"),
        _GEMMA_TEMPLATE,
        byte_level=False,
    ),
}
