"""The tokenizer of qlm-tiny: one token per character, and one per word of a question's frame."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Final

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlm_batch.models.prompts import (
    ANSWER_MARK,
    QUESTION_MARK,
    TOKEN_PATTERN,
    joint_tokens,
    template_tokens,
)

PAD: Final = "<|pad|>"
END: Final = "<|end|>"
UNKNOWN: Final = "<|unknown|>"
MAX_POSITIONS: Final = 2048

CHAT_TEMPLATE: Final = (
    "{%- set question = messages | selectattr('role', 'equalto', 'user') | list | last -%}"
    f"{{{{- {QUESTION_MARK!r} + (question['content'] | trim) -}}}}"
    f"{{%- if add_generation_prompt -%}}{{{{- {ANSWER_MARK!r} -}}}}{{%- endif -%}}"
)


def vocabulary() -> dict[str, int]:
    """Every token's text and id, in a fixed order that starts with the special tokens."""
    characters = [c for c in string.printable if c.isprintable()] + ["\n", "\t"]
    tokens = [PAD, END, UNKNOWN, *joint_tokens(), *characters, *template_tokens()]
    return {token: index for index, token in enumerate(tokens)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template, which asks the last user message and no other."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN_PATTERN), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer's files, with the chat template inside tokenizer_config.json."""
    build_tokenizer().save_pretrained(folder, save_jinja_files=False)
    settings = folder / "tokenizer_config.json"
    fields = json.loads(settings.read_text(encoding="utf-8"))
    fields.pop("backend", None)
    # transformers 5 writes a class that transformers 4 does not know; both know this one.
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
