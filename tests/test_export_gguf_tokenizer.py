"""Tokenizers in GGUF: what is stored, what is refused, and that llama.cpp makes the same tokens of the same texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig

from tests import corpus
from tests.tokenizers_made import SPECIAL, fast, over_bytes, unigram, with_fallback

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'hf_bitnet[gguf]'")

from hf_bitnet.export.gguf import tokenizer_vocabulary as vocabulary  # noqa: E402
from hf_bitnet.export.gguf.tokenizer import read_tokenizer  # noqa: E402
from hf_bitnet.export.gguf.tokenizer_merges import joined, merged, ranks_of, scores_of  # noqa: E402
from hf_bitnet.gguf_pre_tokenizers import PRE_TOKENIZERS  # noqa: E402

_LLAMA2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
_GEMMA = normalizers.Replace(" ", "▁")
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"


def read(tokenizer: Any, rows: int = 2000, **config: Any) -> Any:
    fields = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | config
    return read_tokenizer(tokenizer, LlamaConfig(vocab_size=rows, **fields))


def split(*regexes: str, behavior: str = "isolated", invert: bool = False) -> Any:
    steps = [pre_tokenizers.Split(Regex(regex), behavior, invert) for regex in regexes]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def pre_tokenizer_of(steps: tuple[str, ...]) -> Any:
    """A pre-tokenizer with the steps of a row of the table."""
    made: list[Any] = []
    for step in steps:
        if step == "bytes":
            made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        elif step == "Punctuation(contiguous)":
            made.append(pre_tokenizers.Punctuation("contiguous"))
        elif step in (r"\p{N}", r"\p{N}+"):
            made.append(pre_tokenizers.Digits(individual_digits=step == r"\p{N}"))
        else:
            made.append(pre_tokenizers.Split(Regex(step), "isolated"))
    return pre_tokenizers.Sequence(made)


def test_over_bytes(tmp_path: Path) -> None:
    """What the file holds of BPE over bytes."""
    from tests.gguf_vocabulary import stored, write_vocabulary

    tokenizer = over_bytes()
    count = len(tokenizer)
    assert write_vocabulary(tokenizer, tmp_path / "v.gguf", count + 3) == []
    found = stored(tmp_path / "v.gguf")
    assert found["model"] == "gpt2" and found["pre"] == "gpt-2" and "scores" not in found
    assert found["tokens"][: count - 1] == tokenizer.convert_ids_to_tokens(list(range(count - 1)))
    assert found["tokens"][-4:] == ["<tool>", *(f"[PAD{count + at}]" for at in range(3))]
    kinds = gguf.TokenType
    assert found["token_type"][:4] == [kinds.CONTROL] * 3 + [kinds.NORMAL]
    assert found["token_type"][-4:] == [kinds.USER_DEFINED] + [kinds.UNUSED] * 3
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert found["merges"] == [f"{left} {right}" for left, right in merges]
    assert (found["bos_token_id"], found["eos_token_id"]) == (1, 2)
    assert (found["add_bos_token"], found["add_eos_token"], found["add_space_prefix"]) == (True, False, False)


def test_types_are_those_of_gguf() -> None:
    for name in ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE"):
        assert getattr(vocabulary, name) == getattr(gguf.TokenType, name)


@pytest.mark.parametrize("steps", PRE_TOKENIZERS, ids=lambda steps: str(PRE_TOKENIZERS[steps].merging))
def test_names_of_pre_tokenizers(steps: tuple[str, ...]) -> None:
    """By steps alone, for both ways to treat words that are in the vocabulary."""
    names = PRE_TOKENIZERS[steps]
    for whole, name in ((False, names.merging), (True, names.whole)):
        assert read(over_bytes(pre_tokenizer_of(steps), whole=whole)).pre == (name or names.merging or names.whole)


def test_other_spellings_of_pre_tokenizers() -> None:
    assert read(over_bytes(split(_LLAMA3))).pre == read(over_bytes(split(_CL100K))).pre == "smaug-bpe"
    assert read(over_bytes(split(_LLAMA3, behavior="removed", invert=True))).pre == "smaug-bpe"
    literal = _LLAMA3.replace(r"\r", "\r").replace(r"\n", "\n")
    assert read(over_bytes(split(literal), whole=True)).pre == "llama-bpe"
    assert read(over_bytes(pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)]))).pre == "gpt-2"


def test_whole_words_need_a_name_or_merges() -> None:
    """GPT-2's regex has no name for `ignore_merges`, and needs none where merges make every token."""
    tokenizer = over_bytes(whole=True)
    assert read(tokenizer).pre == "gpt-2"
    model = {**tokenizer.get_vocab(), "quickly": 1000}
    for token in ("<tool>", "[PAD]"):
        model.pop(token, None)
    made = Tokenizer(models.BPE(vocab=model, merges=[], ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(ValueError, match="ignore_merges=True together with the pre-tokenizer of gpt-2"):
        read(fast(made))


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (lambda: corpus.tokenizer(), "a WordLevel model, for which llama.cpp has nothing equal"),
        (lambda: over_bytes(split(r"\w+")), r"\['\\\\w\+', 'bytes'\], for .*; known pre-tokenizers are those of gpt-2, smollm"),
        (lambda: over_bytes(pre_tokenizers.ByteLevel(add_prefix_space=True)), r"ByteLevel\(add_prefix_space=True\)"),
        (lambda: over_bytes(pre_tokenizers.Whitespace()), r"the pre-tokenizer \['Whitespace'\]"),
        (lambda: over_bytes(normalizer=normalizers.Lowercase()), "the normalizer Lowercase"),
        (lambda: with_fallback(None), "spaces that are not written as ▁"),
        (lambda: with_fallback(_GEMMA, pre_tokenizers.Digits()), "the step Digits"),
        (lambda: with_fallback(normalizers.Sequence([normalizers.Strip(), _GEMMA])), "the step Strip"),
        (lambda: with_fallback(None, pre_tokenizers.Metaspace()), r"Metaspace\(split=True\) and tokens with a space inside"),
        (lambda: unigram(pre_tokenizers.Whitespace()), "the step Whitespace"),
        (
            lambda: unigram(
                pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="never")])
            ),
            "words without a space in front",
        ),
        (object, "object has no tokenizer.json inside; pass a fast tokenizer"),
    ],
    ids=range(12),
)
def test_refused(tokenizer: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read(tokenizer())


def test_settings_of_models_that_are_refused() -> None:
    tokenizer = over_bytes()
    for name, value in (("dropout", 0.1), ("end_of_word_suffix", "</w>")):
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        spec["model"][name] = value
        with pytest.raises(ValueError, match=f"a model with {name}={value!r}"):
            read(fast(Tokenizer.from_str(json.dumps(spec))))
    few = Tokenizer(models.BPE(vocab={"a": 0, "<0x41>": 1}, merges=[], byte_fallback=True))
    few.normalizer = _GEMMA
    with pytest.raises(ValueError, match="byte fallback without a token for every byte"):
        read(fast(few))
    spec = json.loads(unigram(pre_tokenizers.Metaspace()).backend_tokenizer.to_str())
    spec["model"]["byte_fallback"] = True
    with pytest.raises(ValueError, match="unk_id=0 and byte_fallback=True"):
        read(fast(Tokenizer.from_str(json.dumps(spec))))


def test_rows_of_the_embedding() -> None:
    tokenizer = over_bytes()
    with pytest.raises(
        ValueError, match=r"token 70\d \('<tool>'\) has no row in the embedding, which has 700; call model.resize"
    ):
        read(tokenizer, rows=700)
    tokenizer.add_tokens(["[PAD1999]"])
    assert read(tokenizer).vocabulary.tokens[-1] == "[PAD1999]_"  # texts of tokens must differ in llama.cpp
    spec = json.loads(unigram(pre_tokenizers.Metaspace()).backend_tokenizer.to_str())
    spec["model"]["vocab"][9] = spec["model"]["vocab"][8]
    with pytest.raises(ValueError, match="two tokens have the text"):
        read(fast(Tokenizer.from_str(json.dumps(spec)), unk_token="<unk>"))


def test_merges_and_scores() -> None:
    """The two rules on small lists; lists that scores cannot stand for are found."""
    ranks = ranks_of([("a", "b"), ("b", "c"), ["ab", "c"]])
    scores, problem = scores_of(["a", "b", "c", "ab", "bc", "abc"], ranks, ())
    assert problem is None and merged("abcbc", ranks) == joined("abcbc", scores) == ["abc", "bc"]
    assert (scores["ab"], scores["bc"], scores["abc"]) == (0, -1, -2) and scores["a"] == -1e9
    assert ranks_of(["a b", "b c", "ab c"]) == ranks
    ranks = ranks_of([("b", "c"), ("a", "b"), ("ab", "c")])  # bc comes first, and abc is never made
    _, problem = scores_of(["a", "b", "c", "ab", "bc", "abc"], ranks, ())
    assert problem is not None and "['a', 'bc'] of 'abc', llama.cpp would make ['abc']" in problem
    assert scores_of(["a", "b", "c", "ab", "bc", "abc"], ranks, ["abc"])[1] is None


def test_merges_that_scores_cannot_stand_for() -> None:
    spec = json.loads(with_fallback(_GEMMA).backend_tokenizer.to_str())
    vocabulary = spec["model"]["vocab"]
    left, right = next(
        (x, y) for x in "abcdeot" for y in "xqzkjw" if x in vocabulary and y in vocabulary and x + y not in vocabulary
    )
    vocabulary[left + right] = max(vocabulary.values()) + 2  # a token that no merge makes
    with pytest.raises(
        ValueError, match=f"merges that llama.cpp's scores cannot stand for: its merges make .* of '{left}{right}'"
    ):
        read(fast(Tokenizer.from_str(json.dumps(spec))))


def test_with_fallback() -> None:
    """Types, scores and flags of BPE with byte fallback, for each way to put a space in front."""
    found = read(with_fallback(_LLAMA2))
    assert (found.model, found.pre, found.merges, found.notes) == ("llama", "default", None, [])
    assert found.vocabulary.tokens[3:5] == ["<0x00>", "<0x01>"] and found.vocabulary.types[3:259] == [vocabulary.BYTE] * 256
    assert found.vocabulary.types[:3] == [vocabulary.UNKNOWN, vocabulary.CONTROL, vocabulary.CONTROL]
    assert found.flags == {"add_space_prefix": True} and max(found.scores) == 0 and len(found.scores) == 2000
    assert read(with_fallback(_GEMMA)).flags == {"add_space_prefix": False}
    # transformers' GemmaTokenizer cuts at spaces that its normalizer has replaced
    assert read(with_fallback(_GEMMA, pre_tokenizers.Split(" ", "merged_with_previous"))).notes == []
    notes = read(with_fallback(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False))).notes
    assert len(notes) == 2 and "begins with a space gets one more" in notes[0] and "follows a special token inside" in notes[1]


def test_tokens_of_spaces_are_merged() -> None:
    """Gemma adds its tokens of several spaces to those that are cut out first; as such llama.cpp would print them as ▁."""
    tokenizer = with_fallback(_GEMMA)
    spaces = next(token for token in tokenizer.get_vocab() if len(token) > 1 and set(token) == {"▁"})
    tokenizer.add_tokens([AddedToken(spaces, normalized=False)])
    number = tokenizer.convert_tokens_to_ids(spaces)
    assert read(tokenizer).vocabulary.types[number] == vocabulary.NORMAL


def test_unigram() -> None:
    found = read(unigram(pre_tokenizers.Metaspace()))
    assert found.model == "t5" and found.flags == {"add_space_prefix": True, "remove_extra_whitespaces": False}
    assert found.special.ids["unk"] == 0 and (found.special.add_bos, found.special.add_eos) == (False, True)
    assert found.vocabulary.types[0] == vocabulary.UNKNOWN and found.scores[5] < 0
    found = read(
        unigram(pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]), rounded=False)
    )
    assert found.flags == {"add_space_prefix": True, "remove_extra_whitespaces": True}
    assert len(found.notes) == 2 and "takes tabs and line breaks" in found.notes[0] and "rounded to float32" in found.notes[1]


def test_tokens_around_a_text() -> None:
    """As the post-processor puts them, whatever a call before left in the tokenizer."""

    def around(single: str, **names: str) -> Any:
        tokenizer = over_bytes()
        special = [(name, number) for number, name in enumerate(SPECIAL)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
        tokenizer.pad_token = "<unk>"
        tokenizer("a", padding="max_length", max_length=9)
        return read(tokenizer).special

    assert (around("$A").add_bos, around("$A").add_eos) == (False, False)
    assert (around("<s> $A </s>").add_bos, around("<s> $A </s>").add_eos) == (True, True)
    assert around("<unk> $A").ids["bos"] == 0
    with pytest.raises(ValueError, match=r"puts \['<s>', '<s>'\] before and \[\] after every text; llama.cpp can put one"):
        around("<s> <s> $A")
    with pytest.raises(ValueError, match=r"puts \[\] before and \['<unk>'\] after every text"):
        around("$A <unk>")


def test_ends_of_a_text() -> None:
    tokenizer = over_bytes()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|eom_id|>", "<|stop|>"]})
    turn, message, stop = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|eom_id|>", "<|stop|>"])
    found = read(tokenizer).special
    assert found.ids == {"bos": 1, "eos": 2, "eot": turn, "eom": message} and found.notes == []
    found = read(tokenizer, eos_token_id=[2, message, stop, turn], pad_token_id=0).special
    assert found.ids["eot"] == stop and "may not end a text at ['<|eot_id|>']" in found.notes[0]
    tokenizer.eos_token = None
    assert read(tokenizer, eos_token_id=stop).special.ids["eos"] == stop
    assert "names an end-of-text token" in read(tokenizer).notes[0]


def test_chat_templates(tmp_path: Path) -> None:
    from tests.gguf_vocabulary import stored, write_vocabulary

    tokenizer = over_bytes()
    tokenizer.chat_template = "{{ messages }}"
    write_vocabulary(tokenizer, tmp_path / "v.gguf", 2000)
    assert stored(tmp_path / "v.gguf")["tokenizer.chat_template"] == "{{ messages }}"
    tokenizer.chat_template = {"default": "one", "tool_use": "two"}
    write_vocabulary(tokenizer, tmp_path / "v.gguf", 2000)
    found = stored(tmp_path / "v.gguf")
    assert (found["tokenizer.chat_template"], found["tokenizer.chat_template.tool_use"]) == ("one", "two")


def test_notes() -> None:
    """What llama.cpp does otherwise is said, and only then."""
    tokenizer = over_bytes(normalizer=normalizers.NFC())
    tokenizer.add_tokens([AddedToken("<l>", lstrip=True), AddedToken("<w>", single_word=True), "xyz", "zab"])
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    notes = read(tokenizer).notes
    for at, part in enumerate(
        ("form NFC", "beside '<l>'", "'<w>' only as a whole word", "leftmost of 'xyz', which", "['Fuse']")
    ):
        assert part in notes[at]
    assert len(notes) == 5
    tokenizer = with_fallback(_LLAMA2)
    tokenizer.add_tokens(["<n>"])
    assert "looks for '<n>' after its normalizer" in read(tokenizer).notes[0]
    tokenizer = over_bytes()
    tokenizer.add_tokens(["<|im_end|>"])
    assert "takes '<|im_end|>' for special by name" in read(tokenizer).notes[0]
    few = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "</s>": 2}, merges=[]))
    few.pre_tokenizer, few.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    assert read(fast(few, eos_token="</s>")).notes == [
        "241 of the bytes of UTF-8 have no token: texts that contain them may give other tokens"
    ]


def test_note_only_where_the_vocabulary_is_concerned() -> None:
    """Falcon's digits are looked for among the characters that stand for bytes: harmless if no token has one of them inside."""
    steps = next(steps for steps, names in PRE_TOKENIZERS.items() if names.merging == "falcon")
    assert "written as one of ²³¹¼½¾, at other places" in read(over_bytes(pre_tokenizer_of(steps))).notes[0]
    assert PRE_TOKENIZERS[steps].note("falcon", ["a", "²", "ab"]) == []
    tekken = next(names for names in PRE_TOKENIZERS.values() if names.whole == "tekken")
    assert "other than A to Z" in tekken.note("tekken", ["a"])[0]
