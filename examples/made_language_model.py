"""A causal language model that is trained here, since none comes without a hub, and rows of tokens to train it on."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Trainer,
    TrainingArguments,
)

SIZES = {
    **{"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "tie_word_embeddings": True},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024},
}
WORDS, STEPS = 1000, 400


def bpe_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Returns a tokenizer like Qwen's and Llama's, with the pieces that are frequent in the texts."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<|end|>", pad_token="<|pad|>")


def blocks(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Returns the texts one behind the other, cut into rows of equal length."""
    ids = [own for text in texts for own in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    starts = range(0, len(ids) - length + 1, length)
    return Dataset.from_dict({"input_ids": [ids[at : at + length] for at in starts]})


def small_language_model(texts: Sequence[str], folder: Path, length: int, seed: int) -> str:
    """Returns the folder of a Qwen3 of half a million parameters, trained on the texts if it is not there yet."""
    if (folder / "config.json").is_file():
        return str(folder)
    tokenizer = bpe_tokenizer(texts)
    config = Qwen3Config(vocab_size=len(tokenizer), **SIZES, eos_token_id=tokenizer.eos_token_id)
    rows = blocks(texts, tokenizer, length)
    rows = rows.add_column("labels", rows[:]["input_ids"])
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        per_device_train_batch_size=16,
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        seed=seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(AutoModelForCausalLM.from_config(config), arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def perplexity(model: torch.nn.Module, rows: Dataset) -> float:
    """Returns the perplexity of rows of equal length."""
    batches = torch.tensor(rows[:]["input_ids"]).to(model.device).split(16)
    losses = [len(ids) * model.eval()(input_ids=ids, labels=ids).loss.item() for ids in batches]
    return math.exp(sum(losses) / len(rows))
