"""The selector language: strings that name parameters, the same in Python, YAML and on the command line.

What lives here: reading an expression and resolving it on a model. What may not: any use of the names, as freezing.
How data passes through:

    "embeddings, layers[:8] - bias" -> terms with a sign -> each term's names on the layer map -> names in model order

| selector | what it names |
|---|---|
| `embeddings`, `pooler`, `head`, `other`, `adapters` | the segments of that kind |
| `norm`, `bias` | all normalisation parameters; all biases |
| `layers`, `layers[0]`, `layers[:8]`, `layers[-2:]` | layers by Python index or slice, in each stack |
| `encoder.layers[:4]`, `vision_model.embeddings` | the same, of a named stack |
| `base`, `all` | all but head and adapters; everything |
| `bert.encoder.layer.3`, `*.LayerNorm.*`, `re:.*query.*` | a module or parameter; a glob; a regular expression |
| `a, b` and `a - b` | union, difference; read from the left: `a, b - c` is `(a, b) - c` |

A selector names every tensor that the named part holds. A language-model head that is tied to the embeddings holds the
embedding matrix, and so do the embeddings: `head` and `embeddings` both name it, and `all - head` leaves it out.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from torch import nn

from .errors import SelectorError, nearest
from .layers import LayerMap, is_norm, layer_map

Selector = str | Iterable[str]


def select(model: nn.Module | LayerMap, selector: Selector) -> tuple[str, ...]:
    """Returns the parameters that a selector names.

    Args:
        model: A model, or its `layer_map`, which saves drawing it again.
        selector: An expression of the selector language, or several, whose union is meant.

    Returns:
        Names as in ``model.named_parameters()``, in that order, each tensor once.

    Raises:
        SelectorError: the expression can't be read, a term matches nothing (the error names the nearest matches), an
            index lies outside the stack, or the whole names nothing.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=12, vocab_size=9))
        >>> select(model, "layers[-1] - re:.*(attention|intermediate|LayerNorm).*")
        ('encoder.layer.1.output.dense.weight', 'encoder.layer.1.output.dense.bias')
    """
    layers = model if isinstance(model, LayerMap) else layer_map(model)
    expressions = [*selector] if isinstance(selector, Iterable) and not isinstance(selector, str) else [selector]
    names: set[str] = set()
    for expression in expressions:
        names |= _evaluate(layers, expression)
    if not names:
        raise SelectorError(f"{', '.join(expressions)!r} names no parameter. The model has: {layers.outline}.")
    return tuple(name for name in dict.fromkeys(layers.aliases.values()) if name in names)


# What a term is read over: an escape, an index or a character class, brackets that open and close, and the two signs.
_TOKEN = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|[({]|[)}]|,|(?<!\S)-(?!\S)")


def parse(expression: str) -> tuple[tuple[str, str], ...]:
    """Reads an expression into ``(sign, term)`` pairs, the sign being ``,`` or ``-``.

    A minus stands between spaces, and commas in brackets belong to their term, so that names with a minus and regular
    expressions need no quoting.

    Raises:
        SelectorError: a term is missing, at the start, at the end or between two signs.

    >>> parse("embeddings, layers[:8] - bias")
    ((',', 'embeddings'), (',', 'layers[:8]'), ('-', 'bias'))
    """
    if not isinstance(expression, str):
        raise SelectorError(f"A selector is a string, not {type(expression).__name__}: {expression!r}.")
    terms: list[tuple[str, str]] = []
    sign, start, depth = ",", 0, 0
    for token in _TOKEN.finditer(expression):
        text = token.group()
        depth = max(0, depth + (text in ("(", "{")) - (text in (")", "}")))
        if text in (",", "-") and depth == 0:
            terms.append((sign, expression[start : token.start()].strip()))
            sign, start = text, token.end()
    terms.append((sign, expression[start:].strip()))
    if not all(term for _, term in terms):
        raise SelectorError(f"{expression!r}: a term is missing. Write 'a, b' or 'a - b': 'embeddings, layers[:8]'.")
    return tuple(terms)


def _evaluate(layers: LayerMap, expression: str) -> set[str]:
    names: set[str] = set()
    for sign, term in parse(expression):
        found = _resolve(layers, term)
        names = names | found if sign == "," else names - found
    return names


def _resolve(layers: LayerMap, term: str) -> set[str]:
    """Returns what one term names: a property of parameters, a segment, a pattern, a module or a parameter."""
    if term == "bias":
        found = {layers.aliases[name] for name in layers.aliases if re.search(r"(^|[._])bias$", name)}
    elif term == "norm":
        found = _normalisation(layers)
    elif term.startswith("re:"):
        found = _matching(layers, _compile(term))
    elif term in layers.aliases:
        return {layers.aliases[term]}
    elif under := {own for name, own in layers.aliases.items() if name.startswith(term + ".")}:
        return under if term == "layers" and not layers.stacks else under | _held(layers, term)
    elif any(character in term for character in "*?"):
        found = _matching(layers, re.compile(fnmatch.translate(term)))
    else:
        found = _segments(layers, term)
    if not found:
        raise SelectorError(
            f"{term!r} matches no parameter of {type(layers.model).__name__}. It has names, to be matched as a whole, "
            f"such as {next(iter(layers.aliases))!r}, and segments: {layers.outline}."
        )
    return found


def _held(layers: LayerMap, term: str) -> set[str]:
    """Returns what the segments called `term` hold."""
    return {name for segment in layers.find(term) for name in layers.held_by(segment)}


def _segments(layers: LayerMap, term: str) -> set[str]:
    if found := _held(layers, term):
        return found
    stack, bracket, index = term.partition("[")
    if bracket and layers.find(stack):
        raise SelectorError(f"{term!r}: [{index} is an empty slice. The model has: {layers.outline}.")
    hint = " A minus stands between spaces." if "-" in term else ""
    words = [*layers.names, "bias", *layers.aliases, *(name.rpartition(".")[0] for name in layers.aliases)]
    raise SelectorError(
        f"{term!r} names no segment, module or parameter of {type(layers.model).__name__}."
        f"{nearest(term, words)}{hint} Its segments: {layers.outline}."
    )


def _matching(layers: LayerMap, pattern: re.Pattern[str]) -> set[str]:
    return {own for name, own in layers.aliases.items() if pattern.fullmatch(name)}


def _compile(term: str) -> re.Pattern[str]:
    try:
        return re.compile(term.removeprefix("re:"))
    except re.error as error:
        raise SelectorError(
            f"{term!r} is no regular expression: {error}. Mend it, or write a glob such as '*.query.*'."
        ) from None


def _normalisation(layers: LayerMap) -> set[str]:
    return {
        layers.aliases[f"{path}.{name}" if path else name]
        for path, module in layers.model.named_modules()
        if is_norm(module)
        for name, _ in module.named_parameters()
    }
