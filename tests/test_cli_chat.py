"""`hf-bitnet chat` and `bench`: what is written is what generate writes; Ctrl-C; conversations; figures that fit together."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_bitnet as hb
from hf_bitnet.cli import chat
from tests import chats, corpus
from tests.command_line import Captured, run, save_base, save_quantized
from tests.tiny import tiny


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_quantized(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def templated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("templated")
    model = tiny("llama", vocab_size=len(chats.WORDS))[0]
    hb.quantize_model(model, hb.BitNetQuantizationConfig(form="packed")).save_pretrained(folder)
    chats.tokenizer().save_pretrained(folder)
    return folder


def continued(path: Path, tokenizer: Any, text: str, **options: Any) -> str:
    """What plain generate writes."""
    model = hb.optimize_for_generation(hb.open_model(path))
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def stdin(monkeypatch: pytest.MonkeyPatch, text: str, terminal: bool = False) -> None:
    stream = io.StringIO(text)
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stdin", stream)


def test_one_answer(packed: Path, capsys: Captured) -> None:
    expected = continued(packed, corpus.tokenizer(), "ba be bi", max_new_tokens=12, do_sample=False)
    words = ["chat", packed, "--prompt", "ba be bi", "--max-new-tokens", 12, "--temperature", 0]
    code, printed, err = run(capsys, *words)
    assert (code, printed) == (0, f"{expected}\n")
    assert err.startswith("[12 tokens, cut at the limit; ") and "of reading 3]" in err
    code, printed, _ = run(capsys, *words, "--json")
    result = json.loads(printed)
    assert code == 0 and result["answer"] == expected and result["stopped"] == "length"
    assert (result["prompt_tokens"], result["tokens"], result["device"]) == (3, 12, "cpu")
    assert result["tokens_per_second"] > 0 and result["first_token_seconds"] > 0


def test_sampling(packed: Path, capsys: Captured) -> None:
    def answer(*words: Any) -> str:
        return json.loads(run(capsys, "chat", packed, "--prompt", "ba", "--max-new-tokens", 20, "--json", *words)[1])["answer"]

    torch.manual_seed(5)
    expected = continued(packed, corpus.tokenizer(), "ba", max_new_tokens=20, do_sample=True, temperature=1.5, top_p=0.9)
    assert answer("--temperature", 1.5, "--top-p", 0.9, "--seed", 5) == expected
    assert answer("--temperature", 1.5, "--seed", 6) != expected
    # without any of them it is as the model's generation config says
    assert answer() == continued(packed, corpus.tokenizer(), "ba", max_new_tokens=20)


def test_any_causal_model(tmp_path: Path, capsys: Captured) -> None:
    save_base(tmp_path / "base")
    save_quantized(tmp_path / "train", "train")
    for path in (tmp_path / "base", tmp_path / "train"):
        expected = continued(path, corpus.tokenizer(), "ba be", max_new_tokens=5)
        assert run(capsys, "chat", path, "--prompt", "ba be", "--max-new-tokens", 5)[:2] == (0, f"{expected}\n")
    tiny("t5")[0].save_pretrained(tmp_path / "t5")
    corpus.tokenizer().save_pretrained(tmp_path / "t5")
    code, _, err = run(capsys, "chat", tmp_path / "t5", "--prompt", "ba")
    assert code == 1 and "holds a T5ForConditionalGeneration, which is no causal language model and continues no text" in err


def test_the_end_of_a_text(packed: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hb.open_model(packed)
    inputs = corpus.tokenizer()("ba", return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=12)[0, 1:].tolist()
    number = next(i for i, token in enumerate(ids) if token != ids[0])
    # from now on that token is the end
    model.generation_config.eos_token_id = ids[number]
    monkeypatch.setattr("hf_bitnet.cli.generation.open_checkpoint", lambda *unused: model)
    code, _, err = run(capsys, "chat", packed, "--prompt", "ba", "--max-new-tokens", 12)
    assert code == 0 and err.startswith(f"[{number + 1} tokens; ")


def test_the_room_there_is(packed: Path, capsys: Captured) -> None:
    result = json.loads(run(capsys, "chat", packed, "--prompt", "ba " * 60, "--max-new-tokens", 50, "--json")[1])
    assert (result["prompt_tokens"], result["tokens"]) == (60, 4)


def interrupted_after(monkeypatch: pytest.MonkeyPatch, path: Path, tokens: int, times: int = 1) -> None:
    """The model in `path` gets Ctrl-C while it computes a token."""
    model = hb.open_model(path)
    seen = []

    def count(*unused: Any) -> None:
        seen.append(1)
        if len(seen) == tokens:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    model.register_forward_pre_hook(count)
    monkeypatch.setattr("hf_bitnet.cli.generation.open_checkpoint", lambda *unused: model)


def test_interrupt_ends_the_answer(packed: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    expected = continued(packed, corpus.tokenizer(), "ba be", max_new_tokens=4)
    interrupted_after(monkeypatch, packed, 4)
    code, printed, err = run(capsys, "chat", packed, "--prompt", "ba be")
    assert (code, printed) == (1, f"{expected}\n")
    assert err.startswith("[4 tokens, interrupted; ") and err.endswith("hf-bitnet chat: error: interrupted\n")
    # in a conversation the program goes on
    interrupted_after(monkeypatch, packed, 4)
    stdin(monkeypatch, "ba be\nba\n")
    code, printed, err = run(capsys, "chat", packed, "--max-new-tokens", 6)
    other = continued(packed, corpus.tokenizer(), "ba", max_new_tokens=6)
    assert (code, printed) == (0, f"{expected}\n{other}\n") and "4 tokens, interrupted" in err
    assert signal.getsignal(signal.SIGINT) == before


def test_second_interrupt_ends_what_is_computed(packed: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_after(monkeypatch, packed, 2, times=2)
    code, _, err = run(capsys, "chat", packed, "--prompt", "ba be")
    assert (code, err) == (1, "hf-bitnet chat: error: interrupted\n")
    interrupted_after(monkeypatch, packed, 2, times=2)
    stdin(monkeypatch, "ba be\nba\n", terminal=True)
    code, printed, err = run(capsys, "chat", packed, "--max-new-tokens", 6)
    assert code == 0 and "(/exit or Ctrl-D ends)" in err
    assert continued(packed, corpus.tokenizer(), "ba", max_new_tokens=6) in printed


def test_conversation_by_the_template(templated: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chats.tokenizer()

    def answer(*messages: tuple[str, str]) -> str:
        chat = [{"role": role, "content": text} for role, text in messages]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return continued(templated, tokenizer, text, max_new_tokens=4)

    system = ("system", "j")
    first = answer(system, ("user", "a b"))
    second = answer(system, ("user", "a b"), ("assistant", first), ("user", "c"))
    stdin(monkeypatch, "a b\n\nc\n/reset\na b\n/exit\nd\n")
    code, printed, err = run(capsys, "chat", templated, "--max-new-tokens", 4, "--system", "j")
    assert (code, printed) == (0, f"{first}\n{second}\n{first}\n")
    assert err.count("tokens/s") == 3 and "Ctrl-C" not in err
    # --raw continues the words themselves
    code, printed, _ = run(capsys, "chat", templated, "--raw", "--prompt", "a b", "--max-new-tokens", 4)
    assert printed == continued(templated, tokenizer, "a b", max_new_tokens=4) + "\n" != f"{answer(('user', 'a b'))}\n"
    code, _, err = run(capsys, "chat", templated, "--raw", "--system", "j", "--prompt", "a")
    assert code == 2 and "--system needs a chat template, and --raw leaves it out" in err


def lengths(capsys: Captured, monkeypatch: pytest.MonkeyPatch, path: Path, questions: str) -> tuple[str, list[int]]:
    """What is printed, and how many tokens each answer read."""
    stdin(monkeypatch, questions)
    code, printed, err = run(capsys, "chat", path, "--max-new-tokens", 4)
    assert code == 0
    return printed, [int(line.split("reading ")[1].rstrip("]")) for line in err.splitlines() if "reading" in line]


def test_only_what_is_new_is_read(templated: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = "a b c\nd e\nf\n/reset\na b c\n"
    printed, read = lengths(capsys, monkeypatch, templated, questions)
    monkeypatch.setattr(chat._Known, "start_of", lambda known, ids: (0, None))
    whole, everything = lengths(capsys, monkeypatch, templated, questions)
    assert printed == whole and everything[0] == everything[3] < everything[1] < everything[2]
    assert read[0] == everything[0] and read[1] < everything[1] and read[2] < everything[2]
    assert read[3] == 1  # of a text that is known only the last token is read again


def test_layers_that_forget_read_everything(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mistral", vocab_size=len(chats.WORDS), sliding_window=4)[0]
    model.save_pretrained(tmp_path)
    chats.tokenizer().save_pretrained(tmp_path)
    _, (first, second) = lengths(capsys, monkeypatch, tmp_path, "a b c\nd e\n")
    assert second > first


def test_long_conversations_forget_their_beginning(templated: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, "a b c\n" * 5)
    code, printed, err = run(capsys, "chat", templated, "--max-new-tokens", 20)
    assert code == 0 and printed.count("\n") == 5
    assert err.count("its oldest question is forgotten") == 3


def test_a_template_that_refuses(templated: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    hb.open_model(templated).save_pretrained(tmp_path)
    tokenizer = chats.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system here') if messages[0]['role'] == 'system' else 'a' }}"
    tokenizer.save_pretrained(tmp_path)
    code, _, err = run(capsys, "chat", tmp_path, "--system", "j", "--prompt", "a")
    assert code == 1 and "the chat template does not take this conversation: no system here; try --raw" in err
    assert run(capsys, "chat", tmp_path, "--prompt", "a", "--max-new-tokens", 2)[0] == 0


def test_what_a_terminal_is_told(packed: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, "ba " * 70 + "\nba\n", terminal=True)
    code, printed, err = run(capsys, "chat", packed, "--max-new-tokens", 3)
    assert code == 0 and printed.startswith("> ")
    assert "Each text is continued by itself. Ctrl-C ends an answer" in err
    # what does not fit is told, and the conversation goes on
    assert "[the prompt has 70 tokens, LlamaForCausalLM has positions for 64; shorten it]" in err and "[3 tokens" in err


def test_answers_in_another_thread_need_no_signals(packed: Path) -> None:
    import threading

    def hold() -> None:
        with chat._interrupting(chat._Stop()):
            held.append(signal.getsignal(signal.SIGINT))

    held: list[Any] = []
    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert held == [signal.getsignal(signal.SIGINT)]


# ---- bench ----


def test_bench(packed: Path, tmp_path: Path, capsys: Captured) -> None:
    save_base(tmp_path)
    threads = torch.get_num_threads()
    words = ["bench", packed, "--against", tmp_path, "--prompt-tokens", 10, "--new-tokens", 4, "--repeats", 2, "--threads", 1]
    code, printed, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert "a prompt of 10 tokens, 4 new ones, medians of 2; cpu, 1 threads" in printed
    assert "CPU kernels: " in printed and "times as fast" in printed and "memory at its peak" in printed
    result = json.loads(run(capsys, *words, "--json")[1])
    assert torch.get_num_threads() == threads
    assert [each["model"] for each in result["models"]] == [str(packed), str(tmp_path)]
    assert result["kernels"] in hb.kernels.explain("cpu") and result["peak_memory_bytes"] > 1e8
    for path, each in zip((packed, tmp_path), result["models"], strict=True):
        rounds = each["rounds"]["new_tokens_per_second"]
        assert len(rounds) == 2 and each["new_tokens_per_second"] == pytest.approx(sum(rounds) / 2, abs=0.02)
        stored = (path / "model.safetensors").stat().st_size
        assert 0.8 * stored < each["weight_bytes"] < 1.2 * stored


def test_bench_counts_tokens(packed: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes one second a call: prompt, then tokens."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("hf_bitnet.cli.generation.time.perf_counter", lambda: float(next(ticks)))
    words = ["bench", packed, "--prompt-tokens", 10, "--new-tokens", 4, "--repeats", 1, "--json"]
    (found,) = json.loads(run(capsys, *words)[1])["models"]
    assert (found["prompt_tokens_per_second"], found["new_tokens_per_second"]) == (10, 1)
