"""Packed token embeddings and output heads: exact rows, tied weights stored and held once, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

from hf_bitnet import (
    BitNetQuantizationConfig,
    coverage,
    dequantize_model,
    kernels,
    optimize_for_generation,
    pack_model,
    quantize_model,
    set_strength,
    unpack_model,
)
from hf_bitnet.modules import BitEmbedding, BitLinear, EmbeddingSpec, PackedBitLinear, PackedEmbedding
from hf_bitnet.quantizers import WEIGHT_SCHEMES, make_weight_quantizer
from hf_bitnet.relaxations import RELAXATIONS
from hf_bitnet.ste import ESTIMATORS
from hf_bitnet.surgery import full_precision_copy, quantized_tables
from tests.checkpoints import logits, read_config, reloaded
from tests.tiny import tiny

IDENTITY = ESTIMATORS.get("identity")
# family -> the name of a table, the name of the head that is tied to it
TIED = {
    "qwen3": ("model.embed_tokens", "lm_head"),
    "gemma3": ("model.embed_tokens", "lm_head"),
    "gpt2": ("transformer.wte", "lm_head"),
    "t5": ("shared", "lm_head"),
    "whisper": ("model.decoder.embed_tokens", "proj_out"),
}


def config(**fields: Any) -> BitNetQuantizationConfig:
    return BitNetQuantizationConfig(**{"embeddings": "int8", **fields})


def table(scheme: str, group_size: int | None = None, dtype: torch.dtype = torch.float32, **fields: Any) -> BitEmbedding:
    """Rows of very different sizes; one of them is all zero, as a padding row is."""
    torch.manual_seed(0)
    plain = nn.Embedding(11, 24, padding_idx=2)
    plain.weight.data.mul_(torch.logspace(-2, 1, 11).unsqueeze(-1))
    plain.weight.data[2] = 0
    granularity = "channel" if group_size is None else "group"
    quantizer = make_weight_quantizer(scheme, None, granularity, group_size)
    return BitEmbedding.from_float(plain.to(dtype), EmbeddingSpec(quantizer, IDENTITY, **fields))


# ---- the modules ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES.names())
def test_rows_are_those_of_the_dequantized_table(scheme: str, group_size: int | None, dtype: torch.dtype) -> None:
    trained = table(scheme, group_size, dtype)
    packed = PackedEmbedding.from_trained(trained)
    whole = trained.quantizer.quantize(trained.weight).dequantize(dtype)
    for ids in (
        torch.tensor([[3, 0, 3], [10, 2, 7]]),
        torch.tensor(4),
        torch.tensor([5], dtype=torch.int32),
        torch.zeros(0, 2).long(),
    ):
        for module in (trained, packed):
            rows = module(ids)
            assert rows.dtype == dtype and rows.shape == (*ids.shape, 24)
            assert torch.equal(rows, whole[ids.long()])
    assert torch.equal(packed.quantized_weight().dequantize(dtype), whole)
    assert packed.weight.dtype == torch.uint8 and packed.weight.numel() == 11 * 24 * packed.bits // 8


@pytest.mark.filterwarnings(
    "ignore:.*jit.trace.*is deprecated:DeprecationWarning",
    "ignore::torch.jit.TracerWarning",  # how many groups of scales there are is part of the trace
)
@torch.no_grad()
def test_traced_tables_take_other_lengths() -> None:
    packed = PackedEmbedding.from_trained(table("int8")).eval()
    traced = torch.jit.trace(packed, (torch.arange(6),), check_trace=False)
    assert torch.equal(traced(torch.arange(9)), packed(torch.arange(9)))


def test_the_gradient_reaches_the_float_rows() -> None:
    trained = table("int4")
    ids, weights = torch.tensor([3, 3, 2, 5]), torch.randn(4, 24)
    (trained(ids) * weights).sum().backward()
    expected = torch.zeros(11, 24).index_add_(0, ids, weights)
    expected[2] = 0  # the padding row
    torch.testing.assert_close(trained.weight.grad, expected)


@pytest.mark.parametrize("relaxation", RELAXATIONS.names())
def test_strength_mixes_rows_and_is_exact_at_both_ends(relaxation: str) -> None:
    trained, ids = table("int4", relaxation=RELAXATIONS.get(relaxation)), torch.arange(11)
    quantized = trained(ids)
    trained.relaxed = True
    for strength, expected in ((0.0, trained.weight), (1.0, quantized)):
        trained.strength.fill_(strength)
        assert torch.equal(trained(ids), expected)
    trained.strength.fill_(0.5)
    assert not torch.equal(trained(ids), trained.weight) and not torch.equal(trained(ids), quantized)


def test_dtype_follows_the_model_and_scales_stay_float32() -> None:
    packed = PackedEmbedding.from_trained(table("int8"))
    exact = packed.weight_scale.clone()
    half = packed.to(torch.bfloat16)
    assert half(torch.tensor([1])).dtype == torch.bfloat16
    assert half.weight_scale.dtype == torch.float32 and torch.equal(half.weight_scale, exact)
    assert packed.float()(torch.tensor([1])).dtype == torch.float32


@pytest.mark.parametrize("kind", [BitEmbedding, PackedEmbedding])
def test_wrong_ids(kind: type) -> None:
    layer = table("int8") if kind is BitEmbedding else PackedEmbedding.from_trained(table("int8"))
    with pytest.raises(TypeError, match=r"takes token ids \(int64 or int32\), got torch.float32"):
        layer(torch.zeros(2))
    with pytest.raises(IndexError):
        layer(torch.tensor([11]))


def test_a_lookup_unpacks_only_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = PackedEmbedding.from_trained(table("int4"))
    seen: list[tuple[int, ...]] = []
    unpack = kernels.unpack
    monkeypatch.setattr(kernels, "unpack", lambda rows, *rest: (seen.append(tuple(rows.shape)), unpack(rows, *rest))[1])
    packed(torch.tensor([[3, 4, 3]]))
    assert seen == [(3, 12)]


def test_packed_lookup_compiles_without_a_break() -> None:
    packed = PackedEmbedding.from_trained(table("int4", 8))
    ids = torch.tensor([[1, 2], [3, 10]])
    compiled = torch.compile(packed, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids), packed(ids))


# ---- models ----


def head_of(model: Any) -> Any:
    return model.get_output_embeddings()


@pytest.mark.parametrize("family", TIED)
def test_tied_models_keep_one_set_of_bytes(family: str, tmp_path: Path) -> None:
    """train == pack == reload; the bytes and scales are in memory and in the file once."""
    model, batch = tiny(family, tie_word_embeddings=True)
    name, head = TIED[family]
    assert head_of(model).weight is model.get_submodule(name).weight
    quantize_model(model, config(embeddings="int4"))
    assert isinstance(head_of(model), BitLinear) and isinstance(model.get_submodule(name), BitEmbedding)
    assert head_of(model).weight is model.get_submodule(name).weight
    expected = logits(model, batch)
    pack_model(model)
    assert torch.equal(logits(model, batch), expected)
    again = reloaded(model, tmp_path)
    assert torch.equal(logits(again, batch), expected)
    stored = load_file(tmp_path / "model.safetensors")
    for each in (model, again):
        packed, tied = each.get_submodule(name), each.get_submodule(head)
        assert isinstance(packed, PackedEmbedding) and isinstance(tied, PackedBitLinear)
        assert tied.weight is packed.weight and tied.weight_scale is packed.weight_scale
        assert packed.weight.dtype == torch.uint8 and packed.weight.shape == (96, 24)
    vocabulary_sized = [key for key, value in stored.items() if value.shape[:1] == (96,)]
    assert sorted(vocabulary_sized) == [f"{name}.weight", f"{name}.weight_scale"]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_tied_head_equals_an_untied_one_with_the_same_codes(scheme: str) -> None:
    tied, batch = tiny("qwen3")
    untied, _ = tiny("qwen3", tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict())
    quantize_model(tied, config(embeddings=scheme, form="packed"))
    quantize_model(untied, config(embeddings=scheme, output_head=scheme, form="packed"))
    assert head_of(untied).weight is not untied.model.embed_tokens.weight
    assert torch.equal(logits(tied, batch), logits(untied, batch))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_untied(family: str, tmp_path: Path) -> None:
    model, batch = tiny(family)
    head = "int8" if family == "llama" else None
    quantize_model(model, config(embeddings={"weight": "int4", "group_size": 16}, output_head=head))
    expected = logits(model, batch)
    pack_model(model)
    again = reloaded(model, tmp_path)
    assert torch.equal(logits(again, batch), expected)
    ((_, packed),) = quantized_tables(again)
    assert packed.weight_scale.shape == (96, 3) and packed.bits == 4
    if family == "llama":
        assert head_of(again).bits == 8 and head_of(again).weight_scale.shape == (96, 1)
    assert read_config(tmp_path)["hf_bitnet"]["embeddings"] == {"weight": "int4", "group_size": 16}


@pytest.mark.parametrize("form", ["train", "packed"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3"])
def test_quantized_while_loading(family: str, form: str, tmp_path: Path) -> None:
    model, batch = tiny(family, tie_word_embeddings=family != "llama")
    model.save_pretrained(tmp_path)
    both = config(output_head="int8", form=form)
    mine, info = type(model).from_pretrained(tmp_path, quantization_config=both, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(mine, batch), logits(quantize_model(model, both), batch))
    assert (head_of(mine).weight is mine.model.embed_tokens.weight) == (family != "llama")


def test_bfloat16_models_say_so(tmp_path: Path) -> None:
    model, batch = tiny("qwen3")
    model.bfloat16().save_pretrained(tmp_path / "float")
    packed = type(model).from_pretrained(tmp_path / "float", quantization_config=config(form="packed"), dtype=torch.bfloat16)
    again = reloaded(packed, tmp_path / "packed", dtype=torch.bfloat16)
    for each in (packed, again):
        assert each.dtype == torch.bfloat16 and logits(each, batch).dtype == torch.bfloat16
        assert each.model.embed_tokens.weight_scale.dtype == torch.float32
    assert torch.equal(logits(packed, batch), logits(again, batch))
    assert logits(reloaded(packed, tmp_path / "again", dtype=torch.float32), batch).dtype == torch.float32


@pytest.mark.parametrize("family", [*TIED, "llama", "bert"])
def test_there_and_back(family: str) -> None:
    """Unpacked, the codes are the same and still tied; dequantized, the tables are those of the model again."""
    model, batch = tiny(family)
    kinds = [type(m) for m in model.modules() if isinstance(m, nn.Embedding)]
    was_tied = head_of(model) is not None and any(
        m.weight is head_of(model).weight for m in model.modules() if isinstance(m, nn.Embedding)
    )
    quantize_model(model, config(embeddings="int4", form="packed"))
    codes = {name: each.quantized_weight() for name, each in quantized_tables(model)}
    unpack_model(model)
    for name, each in quantized_tables(model):
        assert isinstance(each, BitEmbedding) and torch.equal(each.quantized_weight().codes, codes[name].codes)
    pack_model(model)
    assert all(torch.equal(each.quantized_weight().codes, codes[name].codes) for name, each in quantized_tables(model))
    values = {name: each.quantized_weight().dequantize() for name, each in quantized_tables(model)}
    dequantize_model(model)
    assert [type(m) for m in model.modules() if isinstance(m, nn.Embedding)] == kinds
    for name, value in values.items():
        assert torch.equal(model.get_submodule(name).weight, value)
        assert was_tied == (head_of(model) is not None and head_of(model).weight is model.get_submodule(name).weight)
    assert torch.isfinite(logits(model, batch)).all() and not quantized_tables(model)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_the_full_precision_twin_is_the_model_before(family: str) -> None:
    model, batch = tiny(family)
    expected = logits(model, batch)
    quantize_model(model, config(embeddings="int4"))
    assert not torch.equal(logits(model, batch), expected)
    twin = full_precision_copy(model)
    assert torch.equal(logits(twin, batch), expected)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    set_strength(model, 0.0)
    assert torch.equal(logits(model, batch), expected)


def test_a_step_trains_the_tied_weight_through_both_uses() -> None:
    model, batch = tiny("qwen3", labels=True)
    quantize_model(model, config(embeddings="int4"))
    model(**batch).loss.backward()
    weight = model.model.embed_tokens.weight
    used = torch.zeros(96, dtype=torch.bool)
    used[batch["input_ids"]] = True
    assert weight is model.lm_head.weight
    assert weight.grad[used].abs().sum() > 0 and weight.grad[~used].abs().sum() > 0  # lookups, and logits of all words


def test_generation(tmp_path: Path) -> None:
    model, batch = tiny("qwen3")
    quantize_model(model, config(form="packed"))
    expected = model.generate(batch["input_ids"], max_new_tokens=5, do_sample=False)
    again = optimize_for_generation(reloaded(model, tmp_path))
    assert torch.equal(again.generate(batch["input_ids"], max_new_tokens=5, do_sample=False), expected)


def test_unpacked_with_learned_scales(tmp_path: Path) -> None:
    """Linear layers keep their stored scales as parameters; those of a tied pair stay computed."""
    model, batch = tiny("qwen3")
    quantize_model(model, config(form="packed"))
    expected = model.lm_head.quantized_weight()
    unpack_model(model, weight_scale="learned")
    assert model.lm_head.weight_scale is None and model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].mlp.up_proj.weight_scale is not None
    assert torch.equal(model.lm_head.quantized_weight().codes, expected.codes)
    assert torch.equal(logits(reloaded(model, tmp_path), batch), logits(model, batch))


def test_a_packed_pair_loads_as_views_of_its_file(tmp_path: Path) -> None:
    model, _ = tiny("qwen3")
    quantize_model(model, config(form="packed")).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with (tmp_path / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    offsets = {name: where["data_offsets"][0] for name, where in header.items() if name != "__metadata__"}
    starts = {
        again.get_parameter(name).data_ptr() - offset
        for name, offset in offsets.items()
        if name in dict(again.named_parameters())
    }
    assert len(starts) == 1  # each tensor lies where the file has it: one mapping, nothing was copied or laid out anew
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()


def test_copies_stay_tied() -> None:
    model, batch = tiny("qwen3")
    quantize_model(model, config(form="packed"))
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight and torch.equal(logits(twin, batch), logits(model, batch))
    twin.tie_weights()
    assert twin.lm_head.weight is twin.model.embed_tokens.weight and torch.equal(logits(twin, batch), logits(model, batch))


def test_the_base_model_of_a_checkpoint(tmp_path: Path) -> None:
    model, batch = tiny("llama")
    quantize_model(model, config(output_head="int4", form="packed")).save_pretrained(tmp_path)
    base = tf.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(base(**batch).last_hidden_state, model.model(**batch).last_hidden_state)


def test_coverage_counts_the_table_once() -> None:
    model, _ = tiny("qwen3")
    before = coverage(model)
    quantize_model(model, config(embeddings="int4", form="packed", min_coverage=1.0))
    found = coverage(model)
    row = next(row for row in found.rows if row.name == "model.embed_tokens.weight")
    assert (row.status, row.bits, row.weights, row.bytes_packed) == ("quantized", 4, 96 * 48, 96 * 24 + 96 * 4)
    assert row.reason == "embedding and tied head: int4, absmax per channel"
    assert found.fraction == 1.0 and before.fraction == 0.0
    assert sum(row.weights for row in found.rows) == sum(row.weights for row in before.rows)
    assert found.bytes_packed == sum(p.numel() * p.element_size() for p in model.parameters())


def test_nothing_changes_without_the_fields(tmp_path: Path) -> None:
    model, _ = tiny("qwen3")
    quantize_model(model, BitNetQuantizationConfig(form="packed")).save_pretrained(tmp_path)
    assert type(model.model.embed_tokens) is nn.Embedding and type(model.lm_head) is nn.Linear
    assert load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.float32


def _bart() -> tuple[Any, dict[str, torch.Tensor]]:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 80))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = tf.BartForConditionalGeneration(tf.BartConfig(vocab_size=96, d_model=48, pad_token_id=0, **sizes, **heads)).eval()
    ids = torch.randint(3, 90, (2, 7))
    return model, {"input_ids": ids, "decoder_input_ids": ids}


@pytest.mark.parametrize("form", ["train", "packed", "while it is loaded"])
@pytest.mark.parametrize("resized", [False, True], ids=["as made", "resized"])
@pytest.mark.parametrize("make", [lambda: tiny("t5"), _bart], ids=["t5", "bart"])
@torch.no_grad()
def test_one_table_in_three_places(make: Any, resized: bool, form: str, tmp_path: Path) -> None:
    """Encoder, decoder and head share it; resizing makes it one module by three names."""
    model, batch = make()
    if resized:
        model.resize_token_embeddings(104)
    config = BitNetQuantizationConfig(form="train" if form == "train" else "packed", embeddings="int8")
    if form == "while it is loaded":
        model.save_pretrained(tmp_path / "float")
        loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
        quantize_model(model, config)
    else:
        quantize_model(model, config).save_pretrained(tmp_path / "once")
        loaded = type(model).from_pretrained(tmp_path / "once")
    loaded.save_pretrained(tmp_path / "again")
    expected = model(**batch).logits
    for found in (loaded, type(model).from_pretrained(tmp_path / "again")):
        assert found.eval()(**batch).logits.equal(expected)
