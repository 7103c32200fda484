"""cache_teacher_logits, and training on what it wrote: values, collators, shuffling, interruptions, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models
from torch import Tensor, nn

from hf_bitnet import cache_teacher_logits
from hf_bitnet.training.distillation import cache as cache_module
from hf_bitnet.training.distillation.cached import COLUMNS, CachedCollator, without_cached
from tests.qat import losses, make_trainer, quantized, weights
from tests.tiny import VOCABULARY, tiny

LENGTHS = (9, 5, 7, 9, 3, 8, 9, 6)


def _texts(number: int = 8, columns: tuple[str, ...] = ("input_ids",), seed: int = 0) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCABULARY, (LENGTHS[i % 8],), generator=generator).tolist() for i in range(number)]
    return datasets.Dataset.from_list([dict.fromkeys(columns, row) for row in rows])


def _teacher(**overrides: Any) -> nn.Module:
    return tiny("llama", seed=1, **overrides)[0]


def _tokenizer(side: str = "right") -> tf.PreTrainedTokenizerFast:
    words = {"<pad>": 0, **{f"w{index}": index for index in range(1, VOCABULARY)}}
    stock = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return tf.PreTrainedTokenizerFast(tokenizer_object=stock, pad_token="<pad>", mask_token="w1", padding_side=side)


def _arguments(**fields: Any) -> dict[str, Any]:
    # examples() of tests.qat are not used; nothing is dropped silently
    return {"teacher": "cached", "eval_dataset": None, **fields}


@pytest.mark.parametrize(("name", "temperature"), [("llama", 1.0), ("gpt2", 2.0), ("gemma3", 1.0)])
def test_values_are_the_teachers(name: str, temperature: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From hidden states in pieces; and from whole logits, where the model changes them after its head."""
    monkeypatch.setattr(cache_module, "_CHUNK", 4)
    teacher = tiny(name, seed=1, **({"final_logit_softcapping": 2.0} if name == "gemma3" else {}))[0]
    texts, k = _texts(), 6
    cached = cache_teacher_logits(teacher, texts, path=tmp_path / "c", k=k, temperature=temperature, progress=False)
    assert cached.column_names == ["input_ids", *COLUMNS]
    types = [cached.features[column].feature.dtype for column in COLUMNS]
    assert types == ["uint16", "float16", "float16"]
    for row in cached:
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            q = (teacher(input_ids=ids[None]).logits[0] / temperature).softmax(-1)
        top, best = q.topk(k)
        got_ids, got, rest = (np.asarray(row[column]) for column in COLUMNS)
        assert (got_ids.reshape(-1, k) == best.numpy()).all()
        torch.testing.assert_close(torch.tensor(got).float().exp().reshape(-1, k), top, rtol=5e-3, atol=1e-6)
        torch.testing.assert_close(torch.tensor(rest).float().exp(), 1 - top.sum(-1), rtol=5e-3, atol=1e-6)
    sizes = {"uint16": 2, "float16": 2}
    taken = sum(len(cached[0][column]) * sizes[type] for column, type in zip(COLUMNS, types, strict=True))
    assert taken == (4 * k + 2) * LENGTHS[0]


def _batch(side: str, collator: str, cached: datasets.Dataset, order: list[int]) -> dict[str, Tensor]:
    tokenizer = _tokenizer(side)
    stock = {
        "language modelling": tf.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        "padding": tf.DataCollatorWithPadding(tokenizer),
        "default": tf.default_data_collator,
        "flattening": tf.DataCollatorWithFlattening(),
    }[collator]
    keep = {"input_ids", *COLUMNS} if collator != "flattening" else {"input_ids", "labels", *COLUMNS}
    return dict(CachedCollator(stock)([{key: value for key, value in cached[i].items() if key in keep} for i in order]))


@pytest.mark.parametrize(
    ("collator", "side", "order"),
    [
        ("language modelling", "right", [1, 0, 2]),
        ("language modelling", "left", [4, 3, 1]),
        ("padding", "left", [5, 6]),
        ("default", "right", [0, 3, 6]),
        ("flattening", "right", [2, 1]),
    ],
)
def test_rows_lie_beside_their_tokens(collator: str, side: str, order: list[int], tmp_path: Path) -> None:
    cached = cache_teacher_logits(_teacher(), _texts(columns=("input_ids", "labels")), path=tmp_path / "c", k=4, progress=False)
    batch, found = without_cached(_batch(side, collator, cached, order))
    if collator == "default":  # takes tensors too
        again, same = without_cached(_batch(side, collator, cached.with_format("torch"), order))
        assert same is not None and found is not None
        assert torch.equal(again["input_ids"], batch["input_ids"])
        assert torch.equal(same.ids, found.ids) and torch.equal(same.log_probs, found.log_probs)
    assert found is not None and not set(COLUMNS) & set(batch)
    flat = batch["input_ids"].reshape(-1)
    places = (found.ids.flatten(0, 1)[:, 0] + found.ids.flatten(0, 1)[:, 1] > 0).nonzero().squeeze(1)
    wanted_ids = np.concatenate([np.asarray(cached[i]["teacher_ids"]).reshape(-1, 4) for i in order])
    wanted_tokens = np.concatenate([cached[i]["input_ids"] for i in order])
    assert flat[places].tolist() == wanted_tokens.tolist()
    assert found.ids.flatten(0, 1)[places].tolist() == wanted_ids.tolist()
    rest = np.concatenate([np.asarray(cached[i]["teacher_rest"]) for i in order]).astype(np.float32)
    assert found.log_probs.flatten(0, 1)[places, -1].tolist() == rest.tolist()


@pytest.mark.parametrize("divergence", ["forward", "jsd"])
def test_all_tokens_cached_train_as_the_teacher_itself(divergence: str, tmp_path: Path) -> None:
    """k is the vocabulary: only the rounding to float16 is between the two. Shuffled, padded, accumulated."""
    teacher, texts = _teacher(), _texts(16)
    cached = cache_teacher_logits(teacher, texts, path=tmp_path / "c", k=VOCABULARY, progress=False)
    found = []
    for data, taught in ((cached, "cached"), (texts, teacher)):
        model = quantized()
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        fields = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "per_device_train_batch_size": 2, "max_steps": 2}
        trainer = make_trainer(
            tmp_path,
            model,
            teacher=taught,
            train_dataset=data,
            data_collator=tf.DataCollatorForLanguageModeling(_tokenizer(), mlm=False),
            gradient_accumulation_steps=2,
            distillation={"alpha": 1.0, "divergence": divergence},
            **fields,
        )
        trainer.train()
        assert trainer._distiller is not None
        assert (trainer._distiller.teacher is None) is (taught == "cached")
        found.append((nn.utils.parameters_to_vector(model.parameters()).detach() - before, losses(trainer)))
    (mine, logs), (theirs, other) = found
    assert (mine - theirs).norm() < 1e-2 * theirs.norm()
    assert [log["distill/kl"] for log in logs] == pytest.approx([log["distill/kl"] for log in other], rel=1e-3)


def test_padding_on_either_side_gives_the_same_loss(tmp_path: Path) -> None:
    """On the left, the last padding token predicts the first token; of that the teacher said nothing, so it does not count."""
    cached = cache_teacher_logits(_teacher(), _texts(), path=tmp_path / "c", k=8, progress=False)
    found = []
    for side in ("left", "right"):
        model = quantized()
        trainer = make_trainer(tmp_path, model, **_arguments(train_dataset=cached))
        model.train()
        batch = _batch(side, "language modelling", cached, [0, 4, 2])
        found.append(trainer.compute_loss(model, batch, num_items_in_batch=16))
    torch.testing.assert_close(*found)


def test_evaluation_and_resume_with_cached_columns(tmp_path: Path) -> None:
    cached = cache_teacher_logits(_teacher(), _texts(), path=tmp_path / "c", k=4, progress=False)
    collator = tf.DataCollatorForLanguageModeling(_tokenizer(), mlm=False)
    run = {"train_dataset": cached, "eval_dataset": cached, "data_collator": collator, "teacher": "cached", "max_steps": 4}
    run |= {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    whole = make_trainer(tmp_path / "out", quantized(), **run)
    whole.train()
    assert whole.evaluate()["eval_loss"] > 0
    other = cache_teacher_logits(_teacher(), _texts(), path=tmp_path / "d", k=5, progress=False)
    with pytest.raises(ValueError, match="trained with another teacher"):
        make_trainer(tmp_path / "out", quantized(), **{**run, "train_dataset": other}).train(resume_from_checkpoint=True)
    resumed = make_trainer(tmp_path / "out", quantized(), **run)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert losses(resumed)[-1] == losses(whole)[-1]
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed.model).values(), weights(whole.model).values(), strict=True))


# ---- writing ----


def test_interrupted_calls_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 3)
    texts, teacher = _texts(8), _teacher()
    done: list[int] = []
    stock = cache_module._columns

    def columns(teacher: nn.Module, rows: Any, *others: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(rows))
        return stock(teacher, rows, *others)

    monkeypatch.setattr(cache_module, "_columns", columns)
    fields = {"path": tmp_path / "c", "k": 4, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        cache_teacher_logits(teacher, texts, **fields)
    assert not (tmp_path / "c").exists()
    with pytest.raises(ValueError, match=r"the beginning of logits made with k=4 \(now k=5\); choose another path"):
        cache_teacher_logits(teacher, texts, **{**fields, "k": 5})
    monkeypatch.setattr(cache_module, "_columns", lambda *args: done.append(-1) or stock(*args))
    continued = cache_teacher_logits(teacher, texts, **fields)
    assert done == [3, 3, -1]  # the last shard only
    monkeypatch.setattr(cache_module, "_columns", None)  # a completed call only loads
    again = cache_teacher_logits(teacher, texts, **fields)
    monkeypatch.setattr(cache_module, "_columns", stock)
    whole = cache_teacher_logits(teacher, texts, path=tmp_path / "whole", k=4, progress=False, batch_size=3)
    for one, two, three in zip(continued, again, whole, strict=True):
        for column in COLUMNS:
            assert (np.asarray(one[column]) == np.asarray(two[column])).all()
            np.testing.assert_allclose(np.asarray(one[column], float), np.asarray(three[column], float), rtol=2e-3, atol=1e-3)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_another_path_or_another_teacher(tmp_path: Path) -> None:
    texts = _texts(2)
    cache_teacher_logits(_teacher(), texts, path=tmp_path / "c", k=4, progress=False)
    with pytest.raises(ValueError, match="holds logits made with another teacher; choose another path, or delete it"):
        cache_teacher_logits(tiny("llama", seed=2)[0], texts, path=tmp_path / "c", k=4, progress=False)
    with pytest.raises(ValueError, match="logits made with another data set"):
        cache_teacher_logits(_teacher(), _texts(2, seed=1), path=tmp_path / "c", k=4, progress=False)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="exists and is no data set"):
        cache_teacher_logits(_teacher(), texts, path=tmp_path / "other", k=4, progress=False)


def test_the_model_and_random_state_are_left_alone(tmp_path: Path) -> None:
    teacher = _teacher().train()
    state = torch.get_rng_state()
    cache_teacher_logits(teacher, _texts(2), path=tmp_path / "c", k=4, progress=False)
    assert teacher.training and torch.equal(torch.get_rng_state(), state)


# ---- what is refused ----


def test_data_sets_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with pytest.raises(TypeError, match=r"takes a datasets.Dataset, got list.*Dataset.from_list"):
        cache_teacher_logits(_teacher(), [{"input_ids": [1]}], path=path)
    with pytest.raises(ValueError, match=r"columns text and no input_ids; tokenize it first"):
        cache_teacher_logits(_teacher(), datasets.Dataset.from_dict({"text": ["a"]}), path=path)
    with pytest.raises(ValueError, match="the data set is empty"):
        cache_teacher_logits(_teacher(), datasets.Dataset.from_dict({"input_ids": []}), path=path)
    with pytest.raises(ValueError, match="k=200, but the teacher tells only 96 tokens apart"):
        cache_teacher_logits(_teacher(), _texts(2), path=path, k=200)
    with pytest.raises(ValueError, match=r"makes logits of shape \(1, 3\).*teacher=model"):
        cache_teacher_logits(tiny("bert")[0], _texts(2), path=path, k=2)
    cached = cache_teacher_logits(_teacher(), _texts(2), path=path, k=2, progress=False)
    with pytest.raises(ValueError, match="has teacher columns already"):
        cache_teacher_logits(_teacher(), cached, path=tmp_path / "d")


def test_training_that_does_not_fit(tmp_path: Path) -> None:
    cached = cache_teacher_logits(_teacher(), _texts(), path=tmp_path / "c", k=4, progress=False)
    with pytest.raises(ValueError, match=r"has the columns input_ids; make it with.*cache_teacher_logits"):
        make_trainer(tmp_path, quantized(), **_arguments(train_dataset=_texts()))
    with pytest.raises(ValueError, match="holds outputs only, and the distillation wants hidden"):
        make_trainer(tmp_path, quantized(), **_arguments(train_dataset=cached, distillation={"hidden": {}}))
    with pytest.raises(ValueError, match="said of the text as it is, not with token_noise; leave token_noise out"):
        make_trainer(tmp_path, quantized(), **_arguments(train_dataset=cached, distillation={"token_noise": {}}))
    with pytest.raises(
        ValueError, match=r"at temperature 1, the distillation wants 2; write distillation=\{'temperature': 1\}"
    ):
        make_trainer(tmp_path, quantized(), **_arguments(train_dataset=cached.shuffle(), distillation={"temperature": 2.0}))
    with pytest.raises(ValueError, match=r"tells 96 tokens apart, the student 128.*resize_token_embeddings\(96\)"):
        make_trainer(tmp_path, quantized(model={"vocab_size": 128}), **_arguments(train_dataset=cached))
    masked = tf.DataCollatorForLanguageModeling(
        _tokenizer(), mlm=True, mlm_probability=0.9, mask_replace_prob=0, random_replace_prob=1
    )
    batch = [dict(cached[0])]
    with pytest.raises(ValueError, match="masks, cuts or joins tokens"):
        CachedCollator(masked)(batch)
    with pytest.raises(ValueError, match="an example has 4 tokens, but teacher columns for 9: its tokens were changed after"):
        CachedCollator(tf.default_data_collator)([{**cached[0], "input_ids": cached[0]["input_ids"][:4]}])
    model = quantized()
    trainer = make_trainer(tmp_path, model, **_arguments(train_dataset=[{"input_ids": torch.ones(3)}]))
    model.train()
    with pytest.raises(ValueError, match=r"teacher='cached', but the batch has no teacher_ids"):
        trainer.compute_loss(model, tiny("llama", labels=True)[1])


def test_what_the_columns_say_about_themselves(tmp_path: Path) -> None:
    cached = cache_teacher_logits(_teacher(), _texts(), path=tmp_path / "c", k=4, progress=False)
    for derived in (cached, cached.shuffle(seed=1), cached.select([1, 2]), cached.train_test_split(0.5)["train"]):
        line = derived.info.description.splitlines()[-1]
        assert json.loads(line.partition(": ")[2])["k"] == 4
