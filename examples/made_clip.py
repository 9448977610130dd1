"""A small CLIP that needs no download, with a tokenizer of whole words: random weights, to be pretrained."""

from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "projection_dim": 64}


def small_clip(texts: Iterable[str], size: int) -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    """Returns a CLIP for images of `size` x `size`, and a tokenizer that knows the words of `texts`."""
    ids = {word: at for at, word in enumerate(dict.fromkeys([*SPECIAL.values(), *" ".join(texts).split()]))}
    made = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(name, ids[name]) for name in ("[BOS]", "[EOS]")]
    made.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ends)
    inputs = ["input_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **SPECIAL)

    named = {f"{name}_id": ids[word] for name, word in SPECIAL.items() if name != "unk_token"}
    text = {**TOWER, **named, "num_hidden_layers": 2, "vocab_size": len(ids), "max_position_embeddings": 16}
    vision = {**TOWER, "num_hidden_layers": 4, "image_size": size, "patch_size": size // 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)), tokenizer
