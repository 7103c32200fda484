"""Ids of special tokens, the tokens that are put around a text, and the chat template. Own.

What is put around a text is asked of the tokenizer's post-processor, by encoding a text, not of its settings. llama.cpp ends a
text at three ids of the file (eos, eot, eom) and at some texts that it knows by name, such as <|im_end|>.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from gguf import GGUFWriter  # pyright: ignore[reportMissingImports]

_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|end_of_text|>", "<|endoftext|>")
_END_OF_MESSAGE = "<|eom_id|>"
# texts that llama.cpp takes for special tokens whatever their type in the file; most of them end a text
_NAMES = """
<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT>
_<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[
<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>
<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>
<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>
<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>
"""
TAKEN_BY_NAME = frozenset(_NAMES.split())


@dataclass(frozen=True)
class SpecialTokens:
    """Attributes:
    ids: by llama.cpp's short names (bos, eos, eot, eom, unk, sep, pad, mask). add_bos, add_eos: put around every text.
    template: of chats; several by name. notes: what llama.cpp does otherwise.
    """

    ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    template: str | dict[str, str] | None
    notes: list[str]

    def write(self, writer: GGUFWriter) -> None:
        for name, number in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if isinstance(self.template, dict):
            writer.add_chat_template([{"name": name, "template": text} for name, text in self.template.items()])
        elif self.template:
            writer.add_chat_template(self.template)


def special_tokens(tokenizer: Any, config: PreTrainedConfig, unknown: int | None) -> SpecialTokens:
    """What the tokenizer and, where it is silent, the config say.

    Args:
        unknown: id of the token for what has no token.

    Raises:
        ValueError: the post-processor puts more around a text than one token before and the end-of-text token after it.
    """
    settings, notes = config.get_text_config(), []
    stops = _as_list(getattr(settings, "eos_token_id", None))
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "sep", "pad", "mask")} | {
        "unk": unknown
    }
    ids["bos"] = getattr(settings, "bos_token_id", None) if ids["bos"] is None else ids["bos"]
    ids["eos"] = stops[0] if ids["eos"] is None and stops else ids["eos"]
    before, after = _around(tokenizer)
    if before:
        ids["bos"] = before[0]
    if after and ids["eos"] is None:
        ids["eos"] = after[0]
    if len(before) > 1 or after not in ([], [ids["eos"]]):
        raise ValueError(
            f"GGUF: the tokenizer puts {_texts(tokenizer, before)} before and {_texts(tokenizer, after)} after every text; "
            f"llama.cpp can put one token before it and the end-of-text token ({ids['eos']}) after it. Set "
            "tokenizer.backend_tokenizer.post_processor so, or write tokenizer=None"
        )
    if ids["eos"] is None:
        notes.append("neither tokenizer nor config names an end-of-text token, and llama.cpp takes one by its number")
    ids |= _ends(tokenizer, [stop for stop in stops if stop != ids["eos"]], notes)
    found = {name: number for name, number in ids.items() if number is not None and 0 <= number < settings.vocab_size}
    return SpecialTokens(found, bool(before), bool(after), getattr(tokenizer, "chat_template", None), notes)


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that are put before and after a text."""
    plain, full = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    start = next(at for at in range(len(full) + 1) if full[at : at + len(plain)] == plain)
    return full[:start], full[start + len(plain) :]


def _ends(tokenizer: Any, others: list[int], notes: list[str]) -> dict[str, int | None]:
    """End of turn and of message: among the config's other ends of a text, else by the names that models use."""
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    message = special.get(_END_OF_MESSAGE)
    others = [number for number in others if number != message]
    turn = others[0] if others else next((special[text] for text in _END_OF_TURN if text in special), None)
    if len(others) > 1:
        notes.append(f"llama.cpp may not end a text at {_texts(tokenizer, others[1:])}: its files have room for three ends")
    return {"eot": turn, "eom": message}


def _texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(ids))
