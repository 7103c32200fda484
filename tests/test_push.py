"""push_to_hub: everything of a model in one commit a repository, or nothing. Through the unmodified client."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

import hf_bitnet as hb
from hf_bitnet.export import EXPORT_FORMATS, Source
from hf_bitnet.hub import SHIM
from hf_bitnet.publish.contents import form_of
from tests import corpus, gguf_models
from tests.checkpoints import loaded, logits
from tests.hub_metadata import metadata_errors
from tests.hub_server import LoopbackHub, Refused
from tests.tiny import tiny

REPO = "org/model"


def quantized(**fields: Any) -> Any:
    return hb.quantize_model(tiny("llama")[0], hb.BitNetQuantizationConfig(**fields))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As MeasuredRun leaves it, and an export beside: its files are of several kinds, one larger than a chunk."""
    out = tmp_path_factory.mktemp("run")
    model = quantized()
    model.save_pretrained(out / "train")
    corpus.tokenizer().save_pretrained(out / "train")
    (out / "train" / "training_args.bin").write_bytes(b"token")
    hb.export_model(
        model, out / "dense", format="dense", dtype="float32", progress=False, verify="codes", base_model="org/base"
    )
    (out / "dense" / "model.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 20_000)
    hb.pack_model(model).save_pretrained(out / "packed")
    (out / "results.json").write_text("{}")
    return out


def card_of(hub: LoopbackHub, repo_id: str = REPO) -> ModelCard:
    text = hub.files(repo_id)["README.md"].decode()
    assert not metadata_errors(text)
    return ModelCard(text)


def assert_files(hub: LoopbackHub, folder: Path, place: str = "", repo_id: str = REPO, least: int = 3) -> None:
    """Everything in the folder came back through the client, byte for byte; cards are made anew."""
    there = Path(snapshot_download(repo_id)) / place
    names = [path.name for path in folder.iterdir() if path.name not in ("README.md", "training_args.bin")]
    assert len(names) >= least
    for name in names:
        assert (there / name).read_bytes() == (folder / name).read_bytes(), name


# ---- all forms ----


def test_all_forms_in_one_repository(hub: LoopbackHub, run_folder: Path) -> None:
    report = hb.push_to_hub(run_folder, REPO, forms=("packed", "train", "dense"), base_model="org/base")
    assert hub.commits(REPO) == ["Upload packed, train, dense with hf_bitnet"]
    assert_files(hub, run_folder / "packed")
    assert_files(hub, run_folder / "train", "train")
    assert_files(hub, run_folder / "dense", "dense")
    assert report.url == f"{hub.url}/{REPO}/commit/{hub.repositories[REPO].branches['main'][-1].oid}"
    assert report.files.keys() | {".gitattributes"} == hub.files(REPO).keys()
    assert report.repos[0].left_out["train/training_args.bin"].startswith("a pickle")
    batch = tiny("llama")[1]
    model = quantized()
    expected, kind = logits(model, batch), type(model)
    assert torch.equal(logits(loaded(kind, Path(REPO), subfolder="train"), batch), expected)
    packed = loaded(kind, Path(REPO))
    assert torch.equal(logits(packed, batch), logits(kind.from_pretrained(run_folder / "packed"), batch))
    assert packed.config.quantization_config.form == "packed"
    card = card_of(hub)
    assert (card.data.base_model, card.data.base_model_relation) == ("org/base", "quantized")
    assert card.data.tags == ["hf_bitnet", "bitnet", "quantized", "ternary", "1.58-bit", "dense"]
    assert "| `train/` | train | float weights behind the codes, to train on | " in card.text
    assert f'`from_pretrained("{REPO}", subfolder="train")`' in card.text
    assert "## Export in `dense/`" in card.text and "| safetensors | quantized values | equal |" in card.text
    card.validate()


def holds(format: str, model: Any) -> bool:
    try:
        return not EXPORT_FORMATS.get(format)().refusals(Source(model, None, "x"))
    except ImportError:  # of a package that is not there
        return False


@pytest.mark.parametrize(
    "formats", [("gguf",), pytest.param(EXPORT_FORMATS.names(), marks=pytest.mark.slow, id="every format")]
)
def test_exports_come_back(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, formats: tuple[str, ...]) -> None:
    """Files of every format, byte for byte, beside the packed and the train form."""
    pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
    model = gguf_models.made("llama")
    exported = [name for name in formats if holds(name, model)]
    assert "gguf" in exported
    model.save_pretrained(tmp_path / "train")
    for name in exported:
        hb.export_model(tmp_path / "train", tmp_path / name, format=name, progress=False, verify="codes")
    hb.pack_model(model).save_pretrained(tmp_path / "packed")
    # a format may write what save_pretrained writes
    forms = ("packed", "train", *(name for name in exported if form_of(tmp_path / name) == name))
    hb.push_to_hub({form: tmp_path / form for form in forms}, REPO)
    assert len(hub.commits(REPO)) == 1
    for place, form in zip(("", *forms[1:]), forms, strict=True):
        assert_files(hub, tmp_path / form, place, least=2)
    read = gguf_models.tensors(Path(hf_hub_download(REPO, "gguf/model.gguf")))
    assert torch.equal(
        read["blk.1.ffn_down.weight"], gguf_models.tensors(tmp_path / "gguf" / "model.gguf")["blk.1.ffn_down.weight"]
    )
    card = card_of(hub)
    assert set(forms[2:]) <= set(card.data.tags) and "llama.cpp and what is built on it" in card.text
    text = ModelCard.load(tmp_path / "gguf" / "README.md").text
    assert "llama-cli -m model.gguf" in text and "from_pretrained" not in text


def test_each_form_in_a_repository_of_its_own(hub: LoopbackHub, run_folder: Path) -> None:
    report = hb.push_to_hub(run_folder, "org/model-{form}", forms=("packed", "dense"), private=True)
    assert set(hub.repositories) == {"org/model-packed", "org/model-dense"} and len(report.urls) == 2
    assert all(repository.private for repository in hub.repositories.values())
    assert_files(hub, run_folder / "packed", repo_id="org/model-packed")
    assert_files(hub, run_folder / "dense", repo_id="org/model-dense")
    assert "org/model-dense/model.gguf" in report.files
    card = card_of(hub, "org/model-dense")
    # the card that the export wrote
    assert card.text == ModelCard.load(run_folder / "dense" / "README.md").text and card.data.base_model == "org/base"
    assert "## Files" not in card.text
    assert card_of(hub, "org/model-packed").data.base_model is None


def test_a_run_pushes_its_packed_model(hub: LoopbackHub, run_folder: Path) -> None:
    hb.push_to_hub(run_folder, REPO)
    assert hub.files(REPO).keys() == {
        ".gitattributes",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert "# model\n" in card_of(hub).text  # written from config.json, as the folder has none


def test_forms_that_are_made(hub: LoopbackHub, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what compares logits starts a process; test_export.py has that
    monkeypatch.setattr("hf_bitnet.publish.forms.export_model", functools.partial(hb.export_model, verify="codes"))
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    hb.push_to_hub(run_folder / "train", REPO, forms=("packed", "dense"))
    packed, dense = (hub.files(REPO)[name] for name in ("model.safetensors", "dense/model.safetensors"))
    assert packed == (run_folder / "packed" / "model.safetensors").read_bytes() and len(dense) > len(packed)
    assert "tokenizer.json" in hub.files(REPO) and "dense/tokenizer.json" in hub.files(REPO)
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")} == before
    model = quantized()
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    hb.push_to_hub(model, "org/other", forms=("packed", "train"), tokenizer=corpus.tokenizer())
    files = hub.files("org/other")
    assert files["model.safetensors"] == packed and "train/tokenizer.json" in files
    assert files["train/model.safetensors"] == (run_folder / "train" / "model.safetensors").read_bytes()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)  # it was not packed itself
    hb.push_to_hub({"dense": run_folder / "dense"}, "org/third")
    assert "model.gguf" in hub.files("org/third")


def test_weights_of_an_earlier_push_go(hub: LoopbackHub, tmp_path: Path) -> None:
    model = hb.pack_model(quantized())
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "one")
    hb.push_to_hub(tmp_path / "shards", REPO, revision="v1")
    assert "model.safetensors.index.json" in hub.files(REPO, "v1") and "README.md" not in hub.files(REPO)
    report = hb.push_to_hub(tmp_path / "one", REPO, revision="v1")
    assert "model.safetensors.index.json" in report.repos[0].deleted
    assert [name for name in hub.files(REPO, "v1") if "safetensors" in name] == ["model.safetensors"]
    commits = len(hub.commits(REPO, "v1"))
    assert hb.push_to_hub(tmp_path / "one", REPO, revision="v1").url and len(hub.commits(REPO, "v1")) == commits


def test_a_card_of_the_repository_may_stay(hub: LoopbackHub, run_folder: Path) -> None:
    hb.push_to_hub(run_folder, REPO)
    ModelCard("# By hand\n").push_to_hub(REPO)
    hb.push_to_hub(run_folder, REPO, card=False, commit_message="again")
    assert card_of(hub).text == "# By hand\n"
    hb.push_to_hub(run_folder, REPO)
    assert "## Quantization" in card_of(hub).text


def test_dry_run_asks_nobody(hub: LoopbackHub, run_folder: Path) -> None:
    report = hb.push_to_hub(run_folder, REPO, forms=("packed", "train"), base_model="org/base", dry_run=True)
    assert hub.requests == [] and report.url is None and report.urls == []
    text = str(report)
    assert text.startswith("org/model: packed, train; 9 files") and text.endswith("not pushed (dry run)")
    assert "left out: train/training_args.bin (a pickle of the training arguments, which may hold a token)" in text
    assert report.files["model.safetensors"] == (run_folder / "packed" / "model.safetensors").stat().st_size


def test_export_report_names_no_path_of_this_machine(run_folder: Path) -> None:
    assert json.loads((run_folder / "dense" / "export.json").read_text())["path"] == "dense"


# ---- refused ----


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("optimizer.pt", r"'optimizer\.pt' \(state of a training run\)"),
        ("rng_state_0.pth", r"state of a training run"),
        ("trainer_state.json", r"state of a training run"),
        ("checkpoint-5/model.safetensors", r"'checkpoint-5' \(a checkpoint of a training run\)"),
        ("model.safetensors.tmp", r"\(half written\)"),
        ("pytorch_model.bin", r"a pickle, which runs code when it is opened"),
        ("sub/events.out.tfevents.1", r"'sub/events\.out\.tfevents\.1' \(a log of a training run\)"),
        ("X.BIN", r"'X\.BIN' \(a pickle, which runs code when it is opened\)"),
        ("y.pickle", r"'y\.pickle' \(a pickle"),
        ("sub/y.joblib", r"'sub/y\.joblib' \(a pickle"),
        ("Optimizer.pt", r"state of a training run"),
        (".env", r"'\.env' \(hidden\)\. Remove it, or push a folder that holds the model only"),
    ],
)
def test_files_that_are_not_for_others(run_folder: Path, tmp_path: Path, name: str, words: str) -> None:
    folder = shutil.copytree(run_folder / "packed", tmp_path / "model")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    with pytest.raises(ValueError, match=words):
        hb.push_to_hub(folder, REPO, dry_run=True)


def test_links_that_lead_elsewhere(run_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run_folder / "packed", tmp_path / "model")
    (tmp_path / "secret.txt").write_text("x")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match=r"'notes\.txt' \(a link to a file elsewhere\)"):
        hb.push_to_hub(folder, REPO, dry_run=True)


def test_links_to_folders_inside_are_not_followed(run_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run_folder / "packed", tmp_path / "model")
    (folder / "sub").mkdir()
    (folder / "sub" / "again").symlink_to("..")
    with pytest.raises(ValueError, match=r"'sub/again' \(a link to a folder\)\. Remove it"):
        hb.push_to_hub(folder, REPO, dry_run=True)


def edited_report(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps(values | changes))


def test_exports_that_are_not_what_was_checked(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(run_folder / "dense", folder)
    edited_report(folder, checks=[{"reader": "llama.cpp", "what": "logits", "passed": False, "detail": "relative error 1"}])
    with pytest.raises(ValueError, match=r"did not pass its parity checks \(llama\.cpp, logits: relative error 1\)"):
        hb.push_to_hub(folder, REPO, dry_run=True)
    edited_report(folder, checks=[], files={"config.json": 3})
    with pytest.raises(ValueError, match=r"config\.json has [\d,]+ bytes, by export\.json it has 3; export it again"):
        hb.push_to_hub(folder, REPO, dry_run=True)
    edited_report(folder, files={"merges.txt": 3})
    with pytest.raises(ValueError, match=r"merges\.txt is not there"):
        hb.push_to_hub(folder, REPO, dry_run=True)
    edited_report(folder, checks=3)
    with pytest.raises(ValueError, match=r"export\.json was not written by export_model"):
        hb.push_to_hub(folder, REPO, dry_run=True)
    (folder / "export.json").write_text("{")
    with pytest.raises(ValueError, match=r"export\.json is damaged"):
        hb.push_to_hub(folder, REPO, dry_run=True)


def test_models_that_are_not_whole(run_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run_folder / "packed", tmp_path / "model")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete"):
        hb.push_to_hub(folder, REPO, dry_run=True)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model: neither config\.json and model\.safetensors, nor"):
        hb.push_to_hub(folder, REPO, dry_run=True)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model-1.safetensors"}}))
    with pytest.raises(ValueError, match=r"lacks \.\./model-1\.safetensors, which model\.safetensors\.index\.json names"):
        hb.push_to_hub(folder, REPO, dry_run=True)
    index.write_text(json.dumps({"weight_map": ["a"]}))
    with pytest.raises(ValueError, match=r"has no weight_map"):
        hb.push_to_hub(folder, REPO, dry_run=True)
    (folder / "model.gguf").write_bytes(b"GGML")
    with pytest.raises(ValueError, match=r"model\.gguf is no GGUF file"):
        hb.push_to_hub(folder, REPO, dry_run=True)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds no JSON object"):
        hb.push_to_hub(folder, REPO, dry_run=True)


def test_what_is_no_model_of_ours(run_folder: Path, tmp_path: Path) -> None:
    tiny("llama")[0].save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"holds no model of hf_bitnet; push a folder that save_pretrained"):
        hb.push_to_hub(tmp_path / "plain", REPO)
    with pytest.raises(ValueError, match=r"there is no folder"):
        hb.push_to_hub(tmp_path / "nowhere", REPO)
    with pytest.raises(ValueError, match=r"not quantized; call quantize_model"):
        hb.push_to_hub(tiny("llama")[0], REPO)
    with pytest.raises(TypeError, match=r"takes a model, a folder or \{form: folder\}, got int"):
        hb.push_to_hub(3, REPO)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown form 'pack'; legal: train, packed, "):
        hb.push_to_hub(run_folder, REPO, forms=("pack",))
    with pytest.raises(ValueError, match=r"forms='packed'; give each form once"):
        hb.push_to_hub(run_folder, REPO, forms="packed")
    with pytest.raises(ValueError, match=r"holds no model in form 'packed'"):
        hb.push_to_hub({"packed": run_folder / "train"}, REPO)
    with pytest.raises(ValueError, match=r"form 'train' is not there, and cannot be made of 'packed'"):
        hb.push_to_hub(run_folder / "packed", REPO, forms=("train",))
    with pytest.raises(ValueError, match=r"'train' cannot be made of a packed model"):
        hb.push_to_hub(hb.pack_model(quantized()), REPO, forms=("train",))
    with pytest.raises(ValueError, match="Repo id must"):
        hb.push_to_hub(run_folder, "a/b/c")
    for name in ("one", "two"):
        shutil.copytree(run_folder / "packed", tmp_path / "both" / name)
    with pytest.raises(ValueError, match=r"'one' and 'two' in .* are both in form 'packed'; push one of them"):
        hb.push_to_hub(tmp_path / "both", REPO)


# ---- interrupted ----


def test_a_push_that_fails_anywhere_changes_nothing(hub: LoopbackHub, run_folder: Path) -> None:
    hb.push_to_hub(run_folder / "packed", REPO)
    before, asked = hub.files(REPO), []
    while True:
        start = len(hub.requests)

        def refuse(number: int, method: str, path: str, last: int = start + len(asked)) -> None:
            if number > last:
                raise Refused(403, "Forbidden", "not now")

        hub.before = refuse
        try:
            hb.push_to_hub(run_folder, REPO, forms=("train", "packed"))
            break
        except (HfHubHTTPError, RuntimeError):  # the client wraps what happens while it uploads
            assert hub.files(REPO) == before
            asked.append(hub.requests[start + len(asked)])
            hub.forget_uploads()
    assert ("POST", f"/api/models/{REPO}/commit/main") == asked[-1] and len(asked) >= 8
    assert "train/model.safetensors" not in hub.files(REPO) and "packed/model.safetensors" in hub.files(REPO)


# ---- remote code ----


def test_remote_code(hub: LoopbackHub, run_folder: Path) -> None:
    hb.push_to_hub(run_folder, REPO, remote_code=True)
    config = json.loads(hub.files(REPO)["config.json"])
    stem = SHIM.removesuffix(".py")
    assert config["auto_map"] == {"AutoModel": f"{stem}.LlamaModel", "AutoModelForCausalLM": f"{stem}.LlamaForCausalLM"}
    original = json.loads((run_folder / "packed" / "config.json").read_text())
    assert {key: value for key, value in config.items() if key != "auto_map"} == original
    names: dict[str, Any] = {}
    exec(compile(hub.files(REPO)[SHIM], SHIM, "exec"), names)
    assert issubclass(names["LlamaForCausalLM"], type(quantized()))
    loaded(type(quantized()), Path(REPO))  # nobody is obliged to run it
    with pytest.raises(ValueError, match=r"remote_code=True: no Auto class of transformers loads"):
        hb.push_to_hub({"dense": nothing_but_gguf(run_folder)}, REPO, remote_code=True)


def nothing_but_gguf(run_folder: Path) -> Path:
    folder = run_folder.parent / "gguf-only"
    folder.mkdir(exist_ok=True)
    shutil.copy(run_folder / "dense" / "model.gguf", folder)
    shutil.copy(run_folder / "dense" / "export.json", folder)
    shutil.copy(run_folder / "dense" / "README.md", folder)
    edited_report(folder, files={})
    return folder
