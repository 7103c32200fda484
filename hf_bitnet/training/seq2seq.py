"""Seq2SeqTrainer for quantized models: evaluation by generated text. Own."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from .arguments import QATArguments
from .trainer import QATMixin


@dataclass
class QATSeq2SeqArguments(Seq2SeqTrainingArguments, QATArguments):
    """Everything of transformers' Seq2SeqTrainingArguments (`predict_with_generate`, ...) and of QATArguments."""


class QATSeq2SeqTrainer(QATMixin, Seq2SeqTrainer):
    """QATTrainer that is a transformers' Seq2SeqTrainer; with `predict_with_generate` the quantized model generates."""

    arguments_class = QATSeq2SeqArguments
