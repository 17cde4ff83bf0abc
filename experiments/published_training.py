"""Routers trained as published on a folder of labels, and the questions that the labels were made from."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from drllm.checkpoints import join_routers
from drllm.labels import LabelSet
from drllm.questions.prompts import Prompt
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import load_questions
from drllm.training.trainer import RouterTrainingConfig, train_routers
from train_models.paths import Path as BlockPath


def train_published(config: RouterTrainingConfig) -> PreTrainedModel:
    """The routed model after train.py's training, which is not repeated where its checkpoint exists."""
    train_routers(config)
    return join_routers(config.checkpoint / "routers", config.model_id)


def response_format_of(labels: LabelSet | None) -> ResponseFormat:
    """That of the labels, so that all methods answer as the labels were made; without labels the default."""
    if labels is None:
        return ResponseFormat()
    return ResponseFormat.of_manifest(labels.manifest).without_defaults(bool(labels.manifest["chat_template"]))


def labelled_prompts(labels: LabelSet, data_dir: Path, tokenizer) -> tuple[list[Prompt], list[BlockPath]]:
    """The questions of `labels`, read from `data_dir`, and their labels."""
    chat = bool(labels.manifest["chat_template"])
    paths = {(row["set"], row["question_id"]): tuple(row["optimal_layer_config"]) for row in labels.rows}
    questions = [
        question
        for name in sorted({set_name for set_name, _ in paths})
        for question in load_questions(name, "train", data_dir)
        if (name, question.id) in paths
    ]
    response_format = response_format_of(labels)
    prompts = [Prompt.of(question, tokenizer, chat, response_format) for question in questions]
    return prompts, [paths[question.set, question.id] for question in questions]
