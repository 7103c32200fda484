"""What looks like a small mistake on the command line, and costs a model, an hour, or more."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch

import hf_bitnet as hb
from hf_bitnet.publish.opening import tokenizer_at
from tests.command_line import Captured, run, save_base, save_quantized


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_quantized(tmp_path_factory.mktemp("packed"))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    "words",
    [
        ("chat", "{evil}", "--raw"),
        ("info", "{evil}"),
        ("quantize", "{evil}", "{out}"),
        ("eval", "{evil}", "--text", "{text}"),
        ("export", "{evil}", "{out}", "--format", "dense"),
        ("train", "{evil}", "{out}", "--train-file", "{text}", "--validation-file", "{text}"),
    ],
)
def test_piped_text_is_no_consent_to_run_code(
    words: tuple[str, ...], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil, ran = tmp_path / "evil", tmp_path / "ran"
    evil.mkdir()
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import PreTrainedConfig\n"
    (evil / "evil.py").write_text(code + "class C(PreTrainedConfig):\n    model_type = 'evil'\n")
    maps = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}}
    (evil / "config.json").write_text(json.dumps({"model_type": "evil", **maps}))
    (evil / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.C", None]}}))
    (tmp_path / "text.txt").write_text("some words " * 50)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\nyes\n" * 8))
    given = {"evil": evil, "out": tmp_path / "out", "text": tmp_path / "text.txt"}
    code, _, err = run(capsys, *(word.format(**given) for word in words))
    assert code == 1 and err and not ran.exists()


def test_a_model_is_not_quantized_onto_itself(base: Path, tmp_path: Path, capsys: Captured) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base / name, model)
    before = contents(model)
    for out in (model, model / "packed", tmp_path):
        code, _, err = run(capsys, "quantize", model, out, "--force")
        assert code == 1 and ("overlap; choose another folder" in err or "so it is not replaced" in err)
    assert contents(model) == before and not (model / "packed").exists()


def test_other_tokens_are_noticed_before_anything_is_measured(base: Path, tmp_path: Path, capsys: Captured) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    first, last = list(words)[5], list(words)[-1]
    words[first], words[last] = words[last], words[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, printed, err = run(capsys, "eval", base, "--text", base / "valid.txt", "--length", 16, "--against", other)
    assert (code, printed) == (1, "") and "has another tokenizer than" in err


def test_beams_of_the_settings_are_left_out(packed: Path, tmp_path: Path, capsys: Captured) -> None:
    model = tmp_path / "model"
    shutil.copytree(packed, model)
    (model / "generation_config.json").write_text(json.dumps({"num_beams": 2, "num_return_sequences": 2}))
    assert run(capsys, "chat", model, "--prompt", "ba", "--max-new-tokens", 3)[0] == 0
    assert run(capsys, "bench", model, "--prompt-tokens", 4, "--new-tokens", 3, "--repeats", 1)[0] == 0


def test_texts_without_a_template_are_no_conversation(packed: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("ba\n" * 4))
    code, _, err = run(capsys, "chat", packed, "--max-new-tokens", 60)
    assert code == 0 and "forgotten" not in err


def test_fields_with_an_option_of_their_own_are_not_set_twice(base: Path, tmp_path: Path, capsys: Captured) -> None:
    text = base / "valid.txt"
    files = ("--train-file", text, "--validation-file", text)
    for name in ("output_dir", "resume_from_checkpoint"):
        code, _, err = run(capsys, "train", base, tmp_path / "out", *files, "--set", f"{name}=7")
        assert code == 2 and f"{name} has a place of its own on this command line" in err
    assert not any(tmp_path.iterdir())


def test_a_device_that_is_not_there(packed: Path, capsys: Captured) -> None:
    code, _, err = run(capsys, "bench", packed, "--device", "cuda:77")
    assert code == 2 and "--device cuda:77 cannot be used here" in err and "for example cpu" in err


def test_verify_is_what_it_says(packed: Path, tmp_path: Path) -> None:
    for verify in (1, 0, "logits", None):
        with pytest.raises(ValueError, match="legal: True"):
            hb.export_model(packed, tmp_path / "out", format="dense", verify=verify)  # type: ignore[arg-type]


def test_a_folder_that_is_not_there_and_a_hub_that_cannot_be_reached(
    packed: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(capsys, "eval", "not-there", "--text", packed)
    assert code == 1 and "cannot load 'not-there': there is no such folder here, and of the Hub: " in err

    # huggingface_hub lets the errors of its client through, whose name depends on its release
    unreachable = type("ConnectError", (Exception,), {"__module__": "httpx2"})("[Errno -2] Name or service not known")

    unreachable.__notes__ = ["me/one was pushed: http://one"]  # as add_note of Python 3.11 keeps it

    def push(*_: object, **__: object) -> None:
        raise unreachable

    monkeypatch.setattr("hf_bitnet.cli.push.push_to_hub", push)
    code, _, err = run(capsys, "push", packed, "me/model")
    assert code == 1 and "the Hub cannot be reached ([Errno -2] Name or service not known me/one was pushed" in err
    assert "); check the network" in err


def test_a_run_s_folder_and_an_adapter_are_no_models(packed: Path, tmp_path: Path, capsys: Captured) -> None:
    shutil.copytree(packed, tmp_path / "out" / "packed")
    shutil.copytree(packed, tmp_path / "out" / "checkpoint-3")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    for words in (
        ("chat", "{}", "--prompt", "ba"),
        ("eval", "{}", "--text", packed),
        ("bench", "{}"),
        ("info", "{}"),
        ("export", "{}", tmp_path / "e", "--format", "dense"),
    ):
        code, _, err = run(capsys, *(tmp_path / "out" if word == "{}" else word for word in words))
        folders = f"{tmp_path / 'out' / 'packed'}, {tmp_path / 'out' / 'checkpoint-3'}"
        assert code == 1 and f"is the folder of a run; give one of the models in it: {folders}" in err, words
        code, _, err = run(capsys, *(adapter if word == "{}" else word for word in words))
        assert code == 1 and "holds an adapter of peft for 'org/base' and no model; load that model" in err, words
    assert not (tmp_path / "e").exists()


def test_a_folder_of_models_names_them(packed: Path, tmp_path: Path, capsys: Captured) -> None:
    for name in ("full", "ternary", "onnx"):
        shutil.copytree(packed, tmp_path / "models" / name)
    (tmp_path / "models" / "onnx" / "export.json").write_text('{"format": "onnx"}')
    (tmp_path / "models" / "onnx" / "model.safetensors").unlink()
    for words in (("chat", tmp_path / "models", "--prompt", "ba"), ("info", tmp_path / "models")):
        code, _, err = run(capsys, *words)
        folders = f"{tmp_path / 'models' / 'full'}, {tmp_path / 'models' / 'ternary'}"
        assert code == 1 and f"holds no model, but folders of models; give one of them: {folders}\n" in f"{err}\n", words
    code, _, err = run(capsys, "chat", tmp_path / "models" / "onnx", "--prompt", "ba")
    assert code == 1 and "is an export in the format 'onnx', which this library does not read; load the packed" in err
    # but a tokenizer may lie there for itself
    shutil.copy(packed / "tokenizer.json", tmp_path / "models")
    assert tokenizer_at(tmp_path / "models")("ba").input_ids == tokenizer_at(packed)("ba").input_ids


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--seed", "-1"], 2, "argument --seed: must be 0 to 4294967295, got -1"),
        (["--epochs", "0"], 2, "argument --epochs: must be a number above 0, got 0"),
        (["--learning-rate", "nan"], 2, "argument --learning-rate: must be a number above 0, got nan"),
        (["--drawn-share", "1.5"], 2, "argument --drawn-share: must be 0 to 1, got 1.5"),
        (["--resume"], 1, "holds no complete checkpoint; leave --resume out to begin a run there"),
        (["--group-size", "48", "--granularity", "group"], 1, "48"),
        (["--min-coverage", "0.99", "--keep", "q_proj"], 1, "of the linear weights would be quantized, min_coverage asks for"),
        (["--teacher", "no/such"], 1, "teacher='no/such' is no model that can be loaded"),
        (["--teacher", "selff"], 1, "did you mean 'self'?"),
    ],
)
def test_train_says_it_before_anything_is_measured(
    words: list[str], code: int, said: str, base: Path, tmp_path: Path, capsys: Captured
) -> None:
    files = ("--train-file", base / "train.txt", "--validation-file", base / "valid.txt", "--length", 16)
    found, printed, err = run(capsys, "train", base, tmp_path / "out", *files, *words)
    assert found == code and said in err, err
    assert "measuring" not in printed and not (tmp_path / "out").exists()


def test_resume_where_nothing_is_whole(base: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    files = ("--train-file", base / "train.txt", "--validation-file", base / "valid.txt", "--length", 16)
    code, _, err = run(capsys, "train", base, tmp_path, *files, "--resume")
    assert code == 1 and "holds no complete checkpoint; replace what is there (--force)" in err


def test_train_of_a_quantized_model(packed: Path, base: Path, tmp_path: Path, capsys: Captured) -> None:
    files = ("--train-file", base / "train.txt", "--validation-file", base / "valid.txt", "--length", 16)
    code, printed, err = run(capsys, "train", packed, tmp_path / "out", *files)
    assert code == 1 and "the model is quantized already" in err and "measuring" not in printed


def test_bf16_needs_no_word_about_the_processor(base: Path, tmp_path: Path, capsys: Captured) -> None:
    files = ("--train-file", base / "train.txt", "--validation-file", base / "valid.txt", "--length", 16)
    code, _, err = run(capsys, "train", base, tmp_path / "out", *files, "--bf16", "--max-train-tokens", 256)
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["training"]["mixed_precision"] == "bf16"


def test_out_of_an_export_is_a_folder(packed: Path, tmp_path: Path, capsys: Captured) -> None:
    code, _, err = run(capsys, "export", packed, tmp_path / "m.gguf", "--format", "gguf")
    assert code == 2 and "OUT is a folder, and" in err and "for example m" in err and not any(tmp_path.iterdir())


def test_perplexity_of_a_broken_model_is_no_success(base: Path, tmp_path: Path, capsys: Captured) -> None:
    broken = tmp_path / "broken"
    model = hb.open_model(base)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    model.save_pretrained(broken)
    tokenizer_at(base).save_pretrained(broken)
    (tmp_path / "text.txt").write_text("some words " * 50)
    words = ("--text", tmp_path / "text.txt", "--length", 8)
    code, _, err = run(capsys, "eval", broken, *words)
    assert code == 1 and f"the perplexity of {broken} is nan" in err
    code, out, err = run(capsys, "eval", base, *words, "--against", broken, "--json")  # what was measured is not lost
    assert code == 1 and f"the perplexity of {broken} is nan" in err and json.loads(out)["perplexity"] > 0
