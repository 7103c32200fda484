"""The tokenizer of a GGUF file makes the tokens of the one that was written, and of llama.cpp; what is not known is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

import hf_bitnet as hb
from hf_bitnet.gguf_file import GGUFFile
from hf_bitnet.gguf_pre_tokenizers import PRE_TOKENIZERS, known_names, named
from hf_bitnet.importing.gguf_tokenizer import ends
from hf_bitnet.publish.importing import holds_gguf
from hf_bitnet.publish.opening import model_class, tokenizer_at
from hf_bitnet.surgery import quantized_layers
from tests import gguf_models
from tests.checkpoints import logits
from tests.command_line import Captured, run
from tests.tiny import tiny
from tests.tokenizers_made import SPECIAL, TEXTS, over_bytes, unigram, with_fallback

gguf = pytest.importorskip("gguf", reason="pip install 'hf_bitnet[gguf]'")

from hf_bitnet.export.gguf.tokenizer import add_tokenizer  # noqa: E402
from tests.gguf_vocabulary import write_vocabulary  # noqa: E402
from tests.test_export_gguf_tokenizer import _GEMMA, _LLAMA2, pre_tokenizer_of  # noqa: E402

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
MADE: dict[str, Any] = {
    "prepended space": lambda: with_fallback(_LLAMA2),
    "no space": lambda: with_fallback(_GEMMA),
} | {
    f"{names.merging}, {names.whole}": lambda steps=steps, names=names: over_bytes(
        pre_tokenizer_of(steps), whole=names.merging is None
    )
    for steps, names in PRE_TOKENIZERS.items()
}


def file_of(path: Path, tokens: list[str], **pairs: Any) -> Path:
    """A file with these keys below `tokenizer.ggml.`; None leaves one out."""
    writer = gguf.GGUFWriter(path, "llama")
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [1] * len(tokens),
        "merges": ["a b"] if "ab" in tokens else [],
    } | pairs
    for name, value in fields.items():
        if isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{name}", value)
        elif isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.ggml.{name}", value)
        elif value is not None:
            writer.add_string(name if "." in name else f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", MADE)
def test_same_tokens(name: str, tmp_path: Path) -> None:
    """As the tokenizer that was written, and as its own copy in a folder; tokens give the text back."""
    original = MADE[name]()
    write_vocabulary(original, tmp_path / "v.gguf", len(original) + 5)
    found = hb.import_tokenizer(tmp_path / "v.gguf")
    found.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(found) == len(original)
    for text in TEXTS:
        tokens = original.encode(text)
        assert found.encode(text) == saved.encode(text) == tokens, text
        assert found.encode(text, add_special_tokens=False) == original.encode(text, add_special_tokens=False), text
        # the first space of a prefix is no part of the text
        assert found.decode(tokens).removeprefix("<s>").lstrip(" ") == original.decode(tokens).removeprefix("<s>").lstrip(" ")
    assert (found.bos_token_id, found.eos_token_id) == (1, 2) and found.decode([1, 2], skip_special_tokens=True) == ""


@pytest.mark.parametrize("name", MADE)
def test_same_tokens_as_llama_cpp(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")
    from tests.llama_cpp_vocabulary import LlamaVocabulary

    original = MADE[name]()
    notes = write_vocabulary(original, tmp_path / "v.gguf", len(original) + 5)
    if notes:
        pytest.skip("llama.cpp differs from the tokenizer itself, which the file's notes say")
    found, llama = hb.import_tokenizer(tmp_path / "v.gguf"), LlamaVocabulary(tmp_path / "v.gguf")
    for text in TEXTS:
        assert found.encode(text) == llama.encode(text), text
    llama.close()


def test_every_name_that_is_known() -> None:
    """Further names stand for one of the table; a name for whole words merges none."""
    assert {name for pre in PRE_TOKENIZERS.values() for name in (pre.merging, pre.whole) if name} < set(known_names())
    for name in known_names():
        assert named(name) is not None, name
    llama, falcon = named("llama-bpe"), named("falcon3")
    assert llama and falcon and llama.whole and falcon.whole and llama.begins and falcon.begins
    assert named("llama") is None and named("default") is None


def test_what_is_put_around_a_text(tmp_path: Path) -> None:
    tokens = ["<b>", "<e>", "a", "b", "ab"]
    ids = {"bos_token_id": 0, "eos_token_id": 1, "token_type": [3, 3, 1, 1, 1]}

    def encoded(**pairs: Any) -> list[int]:
        return hb.import_tokenizer(file_of(tmp_path / "v.gguf", tokens, **{**ids, **pairs})).encode("ab")

    assert encoded() == [4] and encoded(add_bos_token=True) == [0, 4] and encoded(add_eos_token=True) == [4, 1]
    # under this name a text begins with the token, unless the file says that it does not
    assert encoded(pre="llama-bpe") == [0, 4] and encoded(pre="llama-bpe", add_bos_token=False) == [4]
    assert encoded(pre="llama-bpe", bos_token_id=None) == [4]
    found = hb.import_tokenizer(tmp_path / "v.gguf")
    assert found.bos_token is None and found.eos_token == "<e>"


def test_templates_and_lengths(tmp_path: Path) -> None:
    tokens = ["a", "b"]
    path = file_of(tmp_path / "v.gguf", tokens, **{"tokenizer.chat_template": TEMPLATE})
    found = hb.import_tokenizer(path)
    assert found.chat_template == TEMPLATE
    assert found.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"
    pairs = {"tokenizer.chat_template": "x", "tokenizer.chat_template.tools": "y"}
    lists = {"tokenizer.ggml.tokens": tokens, "tokenizer.chat_templates": ["tools"]}
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    for name, value in {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", **pairs}.items():
        writer.add_string(name, value)
    for name, values in lists.items():
        writer.add_array(name, values)
    writer.add_context_length(77)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = hb.import_tokenizer(tmp_path / "w.gguf")
    assert found.chat_template == {"default": "x", "tools": "y"} and found.model_max_length == 77


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ({"model": None}, "holds no tokenizer; take the tokenizer of the model that it was made from"),
        ({"model": "no_vocab"}, "holds no tokenizer"),
        ({"model": "bert"}, "a tokenizer of the kind 'bert', read are 'gpt2', 'llama'"),
        ({"pre": None}, "cuts texts by the pre-tokenizer None, known are gpt-2, smollm"),
        ({"pre": "default"}, "the pre-tokenizer 'default'"),
        ({"tokens": ["a", "a"]}, "two tokens with the same text"),
        ({"token_type": [1]}, "holds 2 tokens and 1 types of them"),
        ({"tokens": "a"}, r"tokenizer\.ggml\.tokens is 'a', which is no list"),
        ({"merges": ["a c"]}, "merges 'a c', which makes no token"),
        ({"merges": ["ab"]}, "merges 'ab', which"),
        ({"eos_token_id": 2}, "names the token 2 as eos, of 2"),
        ({"model": "llama"}, "holds 2 tokens and 0 scores of them"),
    ],
)
def test_refused(pairs: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = file_of(tmp_path / "v.gguf", **{"tokens": ["a", "b"], **pairs})
    with pytest.raises(ValueError, match=reason):
        hb.import_tokenizer(path)


def test_unigram_is_refused(tmp_path: Path) -> None:
    write_vocabulary(unigram(pre_tokenizers.Metaspace("▁", "never")), tmp_path / "v.gguf", 600)
    with pytest.raises(ValueError, match=r"kind 't5', read are 'gpt2', 'llama'; .*import_tokenizer\(\.\.\., base="):
        hb.import_tokenizer(tmp_path / "v.gguf")
    over_bytes().save_pretrained(tmp_path / "base")
    assert hb.import_tokenizer(tmp_path / "v.gguf", base=str(tmp_path / "base")).encode("</s>") == [1, 2]
    with pytest.raises(TypeError, match="takes no dtype; its options are revision"):
        hb.import_tokenizer(tmp_path / "v.gguf", dtype="auto")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_folder_without_a_tokenizer(name: str, tmp_path: Path) -> None:
    """For most kinds of models transformers makes up an empty one."""
    tiny(name)[0].save_pretrained(tmp_path / "model")
    for read in (hb.import_tokenizer, tokenizer_at):
        with pytest.raises(ValueError, match=r"model' holds no tokenizer that transformers reads \(.*\); put it there: Auto"):
            read(tmp_path / "model")


def test_a_tokenizer_that_needs_no_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "perceiver"}')
    assert len(hb.import_tokenizer(tmp_path)) == 262


# ---- from the command line ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A packed model with its tokenizer, and its GGUF export."""
    folder, tokenizer = tmp_path_factory.mktemp("chat"), over_bytes()
    fields = {"weight": "ternary", "form": "packed"}
    model = gguf_models.made("llama", fields, vocab_size=len(tokenizer) + 3, eos_token_id=[2, 5], pad_token_id=None)
    model.save_pretrained(folder / "packed")
    tokenizer.save_pretrained(folder / "packed")
    hb.export_model(folder / "packed", folder / "gguf", format="gguf", verify=False, progress=False)
    return folder / "packed", folder / "gguf" / "model.gguf"


def test_the_file_says_how_inputs_are_quantized(folders: tuple[Path, Path], tmp_path: Path) -> None:
    packed, file = folders
    original, imported = hb.open_model(packed), hb.open_model(file)
    assert {layer.activation for _, layer in quantized_layers(imported)} == {
        layer.activation for _, layer in quantized_layers(original)
    }
    assert imported.config.quantization_config.activation == "int8"
    assert imported.generation_config.eos_token_id == [2, 5]  # the first is </s>, known by its text as well
    batch = tiny("llama")[1]
    # scales have half precision in the file
    assert (logits(imported, batch) - logits(original, batch)).abs().max() < 0.05 * logits(original, batch).abs().max()
    assert hb.import_model(file, activation="none").config.quantization_config.activation == "none"
    data = file.read_bytes()
    place = data.index(b"hf_bitnet.activation") + len(b"hf_bitnet.activation") + 4 + 8
    (tmp_path / "bad.gguf").write_bytes(data[:place] + b"intX" + data[place + 4 :])
    with pytest.raises(ValueError, match=r"hf_bitnet\.activation='intX', legal: int8, .*activation='int8'"):
        hb.import_model(tmp_path / "bad.gguf")
    assert hb.import_model(tmp_path / "bad.gguf", activation="int8").config.quantization_config.activation == "int8"


def test_mixed_activations_are_not_said(tmp_path: Path) -> None:
    fields = {"weight": "ternary", "overrides": {"down_proj": {"activation": "int4"}}}
    hb.export_model(gguf_models.made("llama", fields), tmp_path / "out", format="gguf", verify=False, progress=False)
    assert hb.import_model(tmp_path / "out").config.quantization_config.activation == "none"


def test_commands_take_the_file(folders: tuple[Path, Path], tmp_path: Path, capsys: Captured) -> None:
    """chat, eval, bench and export, of the file and of its folder."""
    packed, file = folders
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    for path in (file, file.parent):
        code, printed, _ = run(
            capsys, "chat", path, "--prompt", "The quick", "--max-new-tokens", 8, "--temperature", 0, "--json"
        )
        assert code == 0 and json.loads(printed)["tokens"] > 0
        words = ["--text", tmp_path / "text.txt", "--length", 16, "--json"]
        code, printed, _ = run(capsys, "eval", path, *words)
        expected = json.loads(run(capsys, "eval", packed, *words)[1])
        assert code == 0 and json.loads(printed)["tokens"] == expected["tokens"]
        assert json.loads(printed)["perplexity"] == pytest.approx(expected["perplexity"], rel=0.02)
    code, printed, _ = run(capsys, "bench", file, "--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1, "--json")
    assert code == 0 and json.loads(printed)["models"][0]["model"] == str(file)
    code, _, err = run(capsys, "export", file, tmp_path / "again", "--format", "hf_bitnet", "--verify", "codes")
    assert code == 0, err
    assert AutoTokenizer.from_pretrained(tmp_path / "again").encode("The</s>") == over_bytes().encode("The</s>")
    assert hb.open_model(tmp_path / "again").config.quantization_config.activation == "int8"


def test_activation_of_a_file(folders: tuple[Path, Path], capsys: Captured) -> None:
    packed, file = folders
    words = ["--prompt", "The", "--max-new-tokens", 2]
    assert run(capsys, "chat", file, *words, "--activation", "none")[0] == 0
    code, _, err = run(capsys, "chat", packed, *words, "--activation", "int8")
    assert code == 2 and "is for GGUF files" in err
    code, _, err = run(capsys, "chat", file, *words, "--activation", "int9")
    assert code == 1 and "unknown activation scheme 'int9'" in err


@pytest.mark.parametrize("command", [["quantize"], ["train", "--train-file", "x", "--validation-file", "x"]])
def test_what_needs_float_weights(command: list[str], folders: tuple[Path, Path], tmp_path: Path, capsys: Captured) -> None:
    for path in (folders[1], folders[1].parent):
        code, _, err = run(capsys, command[0], path, tmp_path / "out", *command[1:])
        assert code == 1 and "is a GGUF file or holds one, whose weights are quantized already" in err, err
        assert not (tmp_path / "out").exists()


def test_special_tokens_are_cut_out(folders: tuple[Path, Path]) -> None:
    found = hb.import_tokenizer(folders[1].parent)
    assert found.convert_ids_to_tokens(found.encode("a</s><tool>b"))[2:4] == ["</s>", "<tool>"]
    assert set(SPECIAL) <= set(found.all_special_tokens) | {"<unk>"} and "<tool>" not in found.all_special_tokens


# ---- as llama.cpp has it ----


def test_tokens_that_end_a_text(tmp_path: Path) -> None:
    """Those that the file names, and those that llama.cpp knows by their texts; none that there is not."""
    tokens = ["a", "<|eot_id|>", "<|im_end|>", "b", "</s>"]
    path = file_of(tmp_path / "v.gguf", tokens, eos_token_id=3, eot_token_id=1, eom_token_id=9)
    assert ends(GGUFFile(path)) == [3, 1, 2, 4]
    assert ends(GGUFFile(file_of(path, ["a", "b"], eos_token_id=2**32 - 1))) == []


def test_ends_of_the_base_stay(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model = hb.open_model(folders[0])
    model.generation_config.eos_token_id = [7, 2]
    model.config.eos_token_id = [7, 2]
    model.save_pretrained(tmp_path / "base")
    imported = hb.import_model(folders[1], base=str(tmp_path / "base"))
    assert imported.generation_config.eos_token_id[:2] == [7, 2] and 5 in imported.generation_config.eos_token_id


def test_phi_3_takes_spaces_into_its_special_tokens(tmp_path: Path) -> None:
    original = with_fallback(_LLAMA2)
    for name, stripped in (("Phi-3 mini", True), ("Ada", False)):
        writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
        writer.add_name(name)
        add_tokenizer(writer, original, tiny("llama", vocab_size=len(original))[0].config)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found = hb.import_tokenizer(tmp_path / "v.gguf")
        assert (found.encode("</s> \nb") == found.encode("</s>b")) == stripped
        assert found.encode("<s> b") != found.encode("<s>b")  # of the exceptions


def test_equal_scores_say_no_order(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "bc"]
    options = {"model": "llama", "token_type": [2, 3, 3, 1, 1, 1, 1, 1], "add_space_prefix": False}
    first = [0.0, 0.0, 0.0, -1.0, -1.0, -1.0]
    for last, expected in (([-2.0, -3.0], ["<s>", "ab", "c"]), ([-3.0, -2.0], ["<s>", "a", "bc"])):
        found = hb.import_tokenizer(file_of(tmp_path / "v.gguf", tokens, **options, scores=[*first, *last]))
        assert found.convert_ids_to_tokens(found.encode("abc")) == expected
    path = file_of(tmp_path / "v.gguf", tokens, **options, scores=[*first, -2.0, -2.0])
    with pytest.raises(ValueError, match="gives several tokens the same score, so that it says no order of merges"):
        hb.import_tokenizer(path)


def test_special_tokens_behind_the_last_word(tmp_path: Path) -> None:
    """Unused rows stay as far as one of them is special; defaults that do not fit are none."""
    tokens, types = ["a", "b", "[PAD2]", "[PAD3]", "[PAD4]"], [1, 1, 5, 5, 5]
    found = hb.import_tokenizer(file_of(tmp_path / "v.gguf", tokens, token_type=types, padding_token_id=3))
    assert (found.pad_token, found.pad_token_id, len(found)) == ("[PAD3]", 3, 4)
    path = file_of(tmp_path / "v.gguf", ["<unk>", "a"], model="llama", scores=[0.0, -1.0], token_type=[2, 1])
    found = hb.import_tokenizer(path)
    assert (found.unk_token, found.bos_token, found.eos_token) == ("<unk>", "a", None)  # llama.cpp's own bos is 1


# ---- which path is which ----


def test_what_holds_gguf(folders: tuple[Path, Path], tmp_path: Path) -> None:
    packed, file = folders
    renamed = tmp_path / "model.bin"
    shutil.copy(file, renamed)
    assert holds_gguf(file) and holds_gguf(renamed) and holds_gguf(file.parent)
    assert not holds_gguf(packed) and not holds_gguf(packed / "model.safetensors") and not holds_gguf(tmp_path)
    both = tmp_path / "both"
    shutil.copytree(packed, both / "packed")
    shutil.copy(file, both)
    # the folder inside is asked for
    assert hb.open_model(both, subfolder="packed").name_or_path != str(both / file.name)
    assert hb.open_model(both).name_or_path == str(both / file.name)
    shutil.copy(packed / "config.json", both)  # as in many repositories
    assert hb.open_model(both).name_or_path == str(both / file.name)
    shutil.copy(packed / "model.safetensors", both)
    assert hb.open_model(both).name_or_path == str(both)
    with pytest.raises((OSError, ValueError)) as caught:
        model_class(packed / "model.safetensors")
    assert "GGUF" not in str(caught.value)


def test_activation_beside_another_model(folders: tuple[Path, Path], tmp_path: Path, capsys: Captured) -> None:
    packed, file = folders
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    words = ["--activation", "none", "--json"]
    code, printed, err = run(capsys, "eval", file, "--against", packed, "--text", tmp_path / "text.txt", "--length", 16, *words)
    assert code == 0 and json.loads(printed)["perplexity_ratio"] > 0, err
    sizes = ["--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1]
    assert run(capsys, "bench", packed, "--against", file, *sizes, *words)[0] == 0
    code, _, err = run(capsys, "bench", packed, *sizes, *words)
    assert code == 2 and "is for GGUF files" in err
