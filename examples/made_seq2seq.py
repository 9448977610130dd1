"""A small T5 or BART with random weights, a tokenizer for it, and texts to copy, by which it learns to write."""

import random
from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerFast

SIZES = {
    "t5": {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
    "bart": {
        **{"d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0, "max_position_embeddings": 64},
        **{"encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    },
}
RATES = {"t5": 2e-3, "bart": 1e-3}  # at which each learns to copy
ENDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}


def small_seq2seq(architecture: str, texts: Sequence[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Returns a model that has learnt nothing, and a tokenizer with the words of the texts."""
    tokenizer = word_tokenizer(texts)
    config = AutoConfig.for_model(architecture, vocab_size=len(tokenizer), **SIZES[architecture], **ENDS)
    return AutoModelForSeq2SeqLM.from_config(config), tokenizer


def word_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with a token for each word of the texts, and one at the end of a text."""
    words = sorted({word for text in texts for word in text.split()})
    tokens = Tokenizer(
        models.WordLevel({own: at for at, own in enumerate(["<pad>", "</s>", "<unk>", *words])}, "<unk>")
    )
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokens, **names)


def copies(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """Returns two to four words of the texts each, in any order."""
    words, draw = sorted({word for text in texts for word in text.split()}), random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(2, 4))) for _ in range(count)]
