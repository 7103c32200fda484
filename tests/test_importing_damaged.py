"""What `import_model` refuses: options, paths, damaged folders, other methods. Nothing of a checkpoint is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_bitnet import (
    BitNetQuantizationConfig,
    import_model,
    quantize_model,
)
from hf_bitnet.surgery import quantized_layers
from tests.checkpoints import edit_config, edit_tensors, loaded
from tests.foreign import (
    assert_values,
    onto_grid,
)
from tests.tiny import tiny


def test_options(tmp_path: Path) -> None:
    model, _ = tiny("llama")
    onto_grid(model, [-1, 0, 1])
    model.save_pretrained(tmp_path)
    for options, error, words in (
        ({"form": "float"}, ValueError, "form='float'; legal: 'packed', 'train'"),
        ({"outside": "round"}, ValueError, "outside='round'; legal: 'refuse', 'wider', 'clip'"),
        ({"dtype": "half4"}, ValueError, "dtype='half4' is no dtype of torch"),
        ({"activation": "int3"}, ValueError, "unknown activation scheme 'int3'"),
        ({"trust_remote_code": True}, TypeError, "takes no trust_remote_code"),
        ({"quantization_config": {}}, TypeError, "takes no quantization_config"),
        ({"file": "model.gguf"}, ValueError, "holds no file 'model.gguf'; it has: no GGUF file"),
        ({"file": "../x"}, ValueError, "holds no file"),
        ({"base": str(tmp_path / "nothing")}, ValueError, "cannot make a model of the config"),
    ):
        with pytest.raises(error, match=words):
            import_model(tmp_path, **options)
    assert import_model(tmp_path, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("path", ["./nothing", "/no/such/folder", "~/no/such", "nothing.gguf", "a/b/c"])
def test_nothing_there(path: str) -> None:
    with pytest.raises(ValueError, match=f"there is no folder or file '{path}'"):
        import_model(path)


def test_a_name_that_the_hub_does_not_give() -> None:
    with pytest.raises(OSError, match="there is no folder 'someone/nothing', and the Hub does not give it"):
        import_model("someone/nothing")
    no_file = "there is no file 'someone/nothing/model.gguf', and the Hub does not give it"
    with pytest.raises(OSError, match=no_file):
        import_model("someone/nothing", file="model.gguf")
    with pytest.raises(OSError, match=no_file):
        import_model("someone/nothing/model.gguf")
    with pytest.raises(ValueError, match=r"names a GGUF file already, and file='other\.gguf' another one"):
        import_model("someone/nothing/model.gguf", file="other.gguf")


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    model, _ = tiny("llama")
    onto_grid(model, [-1, 0, 1])
    model.save_pretrained(tmp_path / "there")
    asked: dict[str, Any] = {}

    def fetched(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path / "there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    import_model("someone/model", revision="v1", token="t")
    assert asked == {"name": "someone/model", "revision": "v1", "token": "t", "allow_patterns": ["*.json", "*.safetensors"]}


def written(folder: Path, *, settings: Any = None) -> Path:
    model, _ = tiny("llama")
    onto_grid(model, [-1, 0, 1])
    model.save_pretrained(folder)
    if settings is not None:
        edit_config(folder, lambda config: config.update(quantization_config=settings))
    return folder


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")


def _index_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))


def _index_of_what(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": ["a"]}))


def _twice(folder: Path) -> None:
    for number in "12":
        (folder / f"{number}.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
    )
    (folder / "model.safetensors").unlink()


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def _deep_config(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def _unknown_model(folder: Path) -> None:
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_config(folder, lambda config: config.update(model_type="mobilellm", auto_map=code))
    (folder / "evil.py").write_text(f"open({str(folder / 'run')!r}, 'w')")


def _no_model(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(model_type="vit", architectures=["Trainer"]))


def _missing(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))


def _missing_layer(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def _extra(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}))


def _shape(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}))


def _layer_shape(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.ones(5, 5)}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_pickled, r"holds pickled weights \(pytorch_model.bin\).*nothing is unpickled"),
        (_truncated, "model.safetensors is damaged or incomplete"),
        (_huge_header, "model.safetensors is damaged or incomplete"),
        (_index_outside, "names the file '../other.safetensors', which is not in that folder"),
        (_index_of_what, "has no weight_map of file names"),
        (_twice, "two files hold the tensor"),
        (_no_config, "holds no config.json; give the folder of a checkpoint, or base="),
        (_broken_config, "config.json cannot be read"),
        (_list_config, "config.json should hold a JSON object"),
        (_deep_config, "config.json cannot be read"),
        (_unknown_model, "transformers cannot make a model of the config.*Code of a checkpoint is not run.*base="),
        (_missing, "lacks model.norm.weight"),
        (_missing_layer, "lacks model.layers.1.mlp.up_proj.weight"),
        (_extra, "has no place in the model for model.layers.7.mlp.up_proj.weight"),
        (_shape, r"model.norm.weight has shape \(5,\), the model needs \(48,\)"),
        (_layer_shape, r"model.layers.0.mlp.up_proj.weight has shape \(5, 5\), the model needs \(80, 48\)"),
    ],
)
def test_damaged(damage: Any, words: str, tmp_path: Path) -> None:
    damage(written(tmp_path))
    with pytest.raises(ValueError, match=words):
        import_model(tmp_path)
    assert not (tmp_path / "run").exists()


def test_base_describes_what_transformers_does_not_know(tmp_path: Path) -> None:
    _unknown_model(written(tmp_path / "one"))
    written(tmp_path / "base")
    assert dict(quantized_layers(import_model(tmp_path / "one", base=str(tmp_path / "base"))))
    assert not (tmp_path / "one" / "run").exists()
    _no_config(tmp_path / "one")
    assert dict(quantized_layers(import_model(tmp_path / "one", base=str(tmp_path / "base"))))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "whatever"])
def test_other_methods(method: str, tmp_path: Path) -> None:
    written(tmp_path, settings={"quant_method": method, "bits": 4})
    with pytest.raises(ValueError, match=f"is quantized by the method '{method}'; read are 'bitnet', 'torchao', GGUF"):
        import_model(tmp_path)


def test_settings_that_are_no_settings(tmp_path: Path) -> None:
    written(tmp_path, settings=[4])
    with pytest.raises(ValueError, match=r"is quantized by the method '\[4\]'"):
        import_model(tmp_path)


@pytest.mark.parametrize("form", ["packed", "train"])
def test_our_own(form: str, tmp_path: Path) -> None:
    quantize_model(tiny("llama")[0], BitNetQuantizationConfig(form=form)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a checkpoint of this library already"):
        import_model(tmp_path)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config.json"):
        import_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        ValueError, match=r"holds neither model.safetensors nor model.safetensors.index.json nor one .gguf file"
    ):
        import_model(tmp_path)


def _architectures(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(architectures={"a": 1}))


def test_architectures_that_are_no_list_are_passed_over(tmp_path: Path) -> None:
    _architectures(written(tmp_path))
    assert type(import_model(tmp_path)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_dtypes_that_nothing_is_computed_in(dtype: str, tmp_path: Path) -> None:
    edit_config(written(tmp_path), lambda config: config.update(dtype=dtype))
    with pytest.raises(ValueError, match=rf"in torch.{dtype}, in which nothing is computed; legal: torch.float32.*dtype='bfl"):
        import_model(tmp_path)
    assert import_model(tmp_path, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("text", ["[]", "{", "\udcff"])
def test_broken_settings_of_generation(text: str, tmp_path: Path) -> None:
    """Seen before the weights are read."""
    (written(tmp_path) / "generation_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    _truncated(tmp_path)
    with pytest.raises(ValueError, match=r"generation_config.json cannot be read .*download it again, or remove it"):
        import_model(tmp_path)


def test_of_one_file_and_an_index_the_file_counts(tmp_path: Path) -> None:
    """As for transformers; the other is of another day."""
    for scale in (1.0, 2.0):
        model, _ = tiny("llama")
        onto_grid(model, [-1, 0, 1], scale=scale)
        model.save_pretrained(tmp_path / str(scale), max_shard_size="50KB" if scale == 1 else "1GB")
    (tmp_path / "2.0" / "model.safetensors").rename(tmp_path / "1.0" / "model.safetensors")
    assert (tmp_path / "1.0" / "model.safetensors.index.json").is_file()
    theirs: Any = loaded(type(model), tmp_path / "1.0")
    assert_values(import_model(tmp_path / "1.0"), theirs)
    assert_values(import_model(tmp_path / "1.0"), model)


@pytest.mark.parametrize("family", ["llama", "gemma3", "t5", "gpt2"])
def test_more_layers_than_tensors(family: str, tmp_path: Path) -> None:
    tiny(family)[0].save_pretrained(tmp_path)
    key = {"t5": "num_decoder_layers", "gpt2": "n_layer"}.get(family, "num_hidden_layers")
    edit_config(tmp_path, lambda config: (config.pop("layer_types", None), config.update({key: 10**9})))
    with pytest.raises(ValueError, match=rf"config.json says {key}=1000000000, but only \d+ tensors are stored.*base="):
        import_model(tmp_path)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_that_a_checkpoint_names_are_not_fetched(key: str, tmp_path: Path) -> None:
    family = "mixtral" if key.startswith("experts") else "llama"
    model, _ = tiny(family)
    onto_grid(model, [-1, 0, 1])
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config.update({key: "someone/kernel"}))
    imported = import_model(tmp_path)
    assert imported.config._attn_implementation in ("sdpa", "eager")
    assert "someone" not in str(imported.config._experts_implementation)
    assert import_model(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"
