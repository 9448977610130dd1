"""Tags, questions and telegrams that a rule makes from texts, so that examples need nothing from a hub.

A rule is easier to learn than what people mark: figures on these tell that a script learns, not how good a model is.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

KINDS = {"NAME": "Who or what is named?", "NUMBER": "How many or how much?", "TIME": "When is it?"}
TAGS = ("O", *(f"{begins}-{kind}" for kind in KINDS for begins in "BI"))
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_WORD = re.compile(r"\d[\d.,]*\d|\d|\w+(?:['-]\w+)*|[^\w\s]")
_TIME = re.compile(
    r"(Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day|January|February|March|April|June|July|August"
    r"|(Septem|Octo|Novem|Decem)ber|(19|20)\d\d"
)
_AMOUNT = re.compile("%|million|billion|bn|percent")
_SMALL_WORD = re.compile(
    "an?|and|are|as|at|be|been|but|by|for|from|had|has|have|he|her|his|in|is|its?|of|on|or|she|that|the|their|they|this"
    "|to|was|were|which|who|will|with|would"
)


def tagged(texts: Sequence[str]) -> list[dict[str, list[str]]]:
    """Returns the words of each sentence with their tags: names, numbers and times in the IOB2 scheme."""
    return [
        {"tokens": [word for word, *_ in words], "tags": [tag for *_, tag in words]} for _, words in _sentences(texts)
    ]


def questions(texts: Sequence[str]) -> list[dict]:
    """Returns questions in SQuAD's form; of each sentence one for each kind of thing that is in it just once."""
    rows: list[dict] = []
    for sentence, words in _sentences(texts):
        for kind, question in KINDS.items():
            starts = [at for at, (*_, tag) in enumerate(words) if tag == f"B-{kind}"]
            if len(starts) != 1:
                continue
            last = at = starts[0]
            while last + 1 < len(words) and words[last + 1][-1] == f"I-{kind}":
                last += 1
            start, end = words[at][1], words[last][2]
            answers = {"text": [sentence[start:end]], "answer_start": [start]}
            rows.append({"id": str(len(rows)), "question": question, "context": sentence, "answers": answers})
    return rows


def telegrams(texts: Sequence[str], longest: int = 4, vocabulary: int = 100) -> list[dict[str, str]]:
    """Returns pieces of texts, of their most frequent words alone, with what is left of them without small words."""
    words = [word for text in texts for word in re.findall("[a-z]+", text.lower())]
    known = {word for word, _ in Counter(words).most_common(vocabulary)}
    words = [word for word in words if word in known]
    pieces = [words[at : at + longest] for at in range(0, len(words) - longest, longest)]
    return [
        {"text": " ".join(piece), "short": " ".join(word for word in piece if not _SMALL_WORD.fullmatch(word))}
        for piece in pieces
        if not all(map(_SMALL_WORD.fullmatch, piece))
    ]


def _sentences(texts: Sequence[str]) -> Iterator[tuple[str, list[tuple[str, int, int, str]]]]:
    """Yields sentences of four words or more, with each word, where it is, and its tag."""
    common = {word for text in texts for word in _WORD.findall(text) if word.islower()}
    for text in texts:
        for sentence in _SENTENCE.split(text):
            found = [(match[0], match.start(), match.end()) for match in _WORD.finditer(sentence)]
            if len(found) >= 4:
                kinds = [
                    _kind(word, at == 0 or found[at - 1][0] in '"“:', common) for at, (word, *_) in enumerate(found)
                ]
                for at, (word, *_) in enumerate(found):
                    if at and _AMOUNT.fullmatch(word) and kinds[at - 1] == "NUMBER":
                        kinds[at] = "NUMBER"
                pairs = zip(["O", *kinds], kinds, strict=False)
                tags = [own if own == "O" else f"{'I' if own == before else 'B'}-{own}" for before, own in pairs]
                yield sentence, [(*own, tag) for own, tag in zip(found, tags, strict=True)]


def _kind(word: str, begins: bool, common: set[str]) -> str:
    if _TIME.fullmatch(word):
        return "TIME"
    if word[0].isdigit():
        return "NUMBER"
    # what begins a sentence has a capital anyway, and is taken for a name where it is never seen without
    is_name = word[0].isupper() and word != "I" and not (begins and word.lower() in common)
    return "NAME" if is_name else "O"
