"""`hf-bitnet chat`: a causal language model that answers, or continues, token by token.

Ctrl-C ends the answer, a second one what is being computed. Keys and values stay from one answer to the next, so that only what
is new is read; not those of layers that forget (sliding windows, states), which cannot go back to where the two texts part.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from ..publish.opening import tokenizer_at
from .common import device_of, quietly
from .generation import Printer, open_causal, positions_of
from .options import UsageError

_HINT = "Ctrl-C ends an answer, /reset forgets the conversation, /exit or Ctrl-D ends."


@quietly
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.json and arguments.prompt is None:
        raise UsageError("--json is for one answer; add --prompt TEXT")
    device = device_of(arguments.device)
    tokenizer = tokenizer_at(arguments.model)
    templated = bool(getattr(tokenizer, "chat_template", None)) and not arguments.raw
    if arguments.system is not None and not templated:
        raise UsageError(
            "--system needs a chat template, and "
            + ("--raw leaves it out" if arguments.raw else f"the tokenizer of {arguments.model!r} has none")
        )
    model = open_causal(arguments, arguments.model, device)
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    talk = _Talk(model, tokenizer, templated, _settings(arguments, model, tokenizer), arguments.system)
    out = None if arguments.json else sys.stdout
    if arguments.prompt is None:
        _converse(talk, out)
        return {}
    answer = talk.answer(arguments.prompt, out)
    print(answer.summary(), file=sys.stderr)
    if answer.stopped == "interrupted":
        raise KeyboardInterrupt
    return {"model": arguments.model, "device": str(device), "prompt": arguments.prompt, **answer.to_dict()}


def _settings(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Of `generate`; what was not asked for stays as the model's generation config says."""
    # beams cannot be streamed
    settings: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "num_beams": 1, "num_return_sequences": 1}
    if arguments.temperature == 0:
        settings["do_sample"] = False
    elif arguments.temperature is not None or arguments.top_p is not None:
        given = {"temperature": arguments.temperature, "top_p": arguments.top_p}
        settings |= {"do_sample": True, **{name: value for name, value in given.items() if value is not None}}
    if model.generation_config.eos_token_id is None:
        settings["eos_token_id"] = tokenizer.eos_token_id
    if model.generation_config.pad_token_id is None:
        settings["pad_token_id"] = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return settings


@dataclass(frozen=True)
class _Answer:
    """Text, its tokens and times in seconds; `stopped` is "end", "length" or "interrupted".

    prompt_tokens: of the whole conversation. read_tokens: those of them that were not known from the answer before.
    """

    text: str
    prompt_tokens: int
    read_tokens: int
    tokens: int
    first_token_seconds: float
    tokens_per_second: float
    stopped: str

    def to_dict(self) -> dict[str, Any]:
        numbers = {name: value for name, value in vars(self).items() if name != "text"}
        return {"answer": self.text, **numbers}

    def summary(self) -> str:
        how = {"end": "", "length": ", cut at the limit", "interrupted": ", interrupted"}[self.stopped]
        return (
            f"[{self.tokens} tokens{how}; {self.tokens_per_second:.1f} tokens/s, the first after "
            f"{self.first_token_seconds:.2f} s of reading {self.read_tokens}]"
        )


@dataclass
class _Talk:
    """A model and what was said so far.

    templated: by the chat template; else each text is continued by itself. known: of what was read and written last.
    """

    model: Any
    tokenizer: Any
    templated: bool
    settings: dict[str, Any]
    system: str | None
    messages: list[dict[str, str]] = field(default_factory=list)
    known: _Known = field(default_factory=lambda: _Known())

    def answer(self, text: str, out: Any) -> _Answer:
        """Streams to `out`. Raises ValueError when the text does not fit the model's positions, or its template."""
        if not self.templated:
            self.messages.clear()
        self.messages.append({"role": "user", "content": text})
        try:
            inputs, room = self._inputs(text)
            printer, stop = Printer(self.tokenizer, out), _Stop()
            settings = {**self.settings, "max_new_tokens": room}
            before, cache = self.known.start_of(inputs["input_ids"][0])
            settings |= {"streamer": printer, "stopping_criteria": StoppingCriteriaList([stop])}
            settings |= {} if cache is None else {"past_key_values": cache}  # not every model has such a thing
            with _interrupting(stop):
                output = self.model.generate(**inputs, **settings, return_dict_in_generate=True)
            self.known.keep(output)
        except BaseException:
            self.messages.pop()
            raise
        answer = self._measured(printer, stop, int(inputs["input_ids"].shape[1]), before, room)
        self.messages.append({"role": "assistant", "content": answer.text})
        return answer

    def _inputs(self, text: str) -> tuple[dict[str, Any], int]:
        """What the model reads, and the room for new tokens; where that is short, the oldest questions are forgotten."""
        most, wanted = positions_of(self.model), self.settings["max_new_tokens"]
        while True:
            inputs = self._encoded(text)
            tokens = inputs["input_ids"].shape[1]
            # an answer may be shorter than what is wanted at most: half of the positions are room enough
            if most is None or tokens + min(wanted, most // 2) <= most or len(self.messages) < 3:
                break
            del self.messages[:2]
            print("[the conversation is too long; its oldest question is forgotten]", file=sys.stderr)
        if most is not None and tokens >= most:
            raise ValueError(
                f"the prompt has {tokens} tokens, {type(self.model).__name__} has positions for {most}; shorten it"
            )
        return inputs, wanted if most is None else min(wanted, most - tokens)

    def _encoded(self, text: str) -> dict[str, Any]:
        if not self.templated:
            inputs = self.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        else:
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            try:
                inputs = self.tokenizer.apply_chat_template(
                    [*system, *self.messages], add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            except Exception as error:  # a template is a program, and says by any exception what it does not take
                raise ValueError(f"the chat template does not take this conversation: {error}; try --raw") from error
        if inputs["input_ids"].shape[1] == 0:
            raise ValueError("the prompt has no token; give some text")
        return {name: value.to(self.model.device) for name, value in inputs.items() if name != "token_type_ids"}

    def _measured(self, printer: Printer, stop: _Stop, prompt_tokens: int, before: int, room: int) -> _Answer:
        ended = self.settings.get("eos_token_id", self.model.generation_config.eos_token_id)
        ends = ended if isinstance(ended, list) else [ended]
        over = bool(printer.ids) and printer.ids[-1] in ends
        clock = printer.clock
        stopped = "end" if over else "interrupted" if stop.asked else "length"
        text = self.tokenizer.decode(printer.ids, skip_special_tokens=True)
        return _Answer(
            text, prompt_tokens, prompt_tokens - before, clock.tokens, round(clock.first, 4), round(clock.rate, 3), stopped
        )


class _Known:
    """Keys and values of a text, for the next one that begins like it."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._cache: DynamicCache | None = None

    def start_of(self, ids: Tensor) -> tuple[int, DynamicCache | None]:
        """Of token ids (length,): how many of the first are known, never all, and what is known of them. Forgets the rest."""
        cache, self._cache = self._cache, None  # what is interrupted on the way is not kept
        pairs = zip(self._ids, ids.tolist()[:-1], strict=False)
        count = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._ids), len(ids) - 1))
        if cache is None or not count:
            return 0, None
        cache.crop(count - len(self._ids))
        return count, cache

    def keep(self, output: Any) -> None:
        """What `generate` returned."""
        cache = getattr(output, "past_key_values", None)
        if type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers):
            self._cache = cache
            self._ids = output.sequences[0, : int(cache.get_seq_length())].tolist()  # the last one was written, not read


class _Stop(StoppingCriteria):
    """Ends an answer after the token that is being computed."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.asked, device=input_ids.device, dtype=torch.bool)  # type: ignore[return-value]


@contextlib.contextmanager
def _interrupting(stop: _Stop) -> Iterator[None]:
    """Inside, the first Ctrl-C asks `stop`, the next raises KeyboardInterrupt. Signals are the main thread's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _converse(talk: _Talk, out: Any) -> None:
    """Reads questions until the end of the input."""
    seen = sys.stdin.isatty()
    if seen:
        with contextlib.suppress(ImportError):  # line editing, where the system has it
            import readline  # noqa: F401
        print(_HINT if talk.templated else f"Each text is continued by itself. {_HINT}", file=sys.stderr)
    while True:
        try:
            text = input("> " if seen else "").strip()
            if text == "/exit":
                return
            if text == "/reset":
                talk.messages.clear()
            elif text:
                print(talk.answer(text, out).summary(), file=sys.stderr)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not seen:
                raise
            print("\n(/exit or Ctrl-D ends)", file=sys.stderr)
        except ValueError as error:
            if not seen:
                raise
            print(f"[{error}]", file=sys.stderr)
