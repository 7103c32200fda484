"""A tokenizer whose tokens are words, and chats made of them, for the trainers that read text."""

from __future__ import annotations

import transformers as tf
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["[pad]", "[bos]", "[eos]", "<user>", "<assistant>", "<end>", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + ' [eos] ' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + ' <end> ' }}{% endif %}{% endfor %}"
)


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """Words are tokens; the template marks what assistants say."""
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[pad]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    names = {"pad_token": "[pad]", "bos_token": "[bos]", "eos_token": "[eos]"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **names)


def chats(number: int = 16) -> Dataset:
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": "a b c"},
                    {"role": "assistant", "content": "d e f g"[: 1 + 2 * (index % 4)]},
                ]
            }
            for index in range(number)
        ]
    )
