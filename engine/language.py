"""Whether most of a corpus is in a language that the model was not trained on: one warning, from a small sample."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

SAMPLED = 200
"""The most texts that are kept."""
KEPT = 400
"""Characters kept of each text."""
SHORTEST = 20
"""Bytes of letters in UTF-8 that it takes to judge a text: 20 Latin letters, 10 Cyrillic ones, 7 Chinese characters."""
FEWEST = 5
"""Texts that must have been judged for a warning."""
ODDS = 100
"""How much likelier another language must be than all known ones together. Confidence alone would not do: Croatian shares
it with Bosnian, Hindi with Marathi, and a product title with a dozen languages."""
NO_LANGUAGE = "zxx"
"""The classifier's label for text in no language: keys, checksums, formulas."""

ALIASES = {"fil": "tl", "in": "id", "iw": "he", "nb": "no"}
_NAMES = (
    "af=Afrikaans am=Amharic ar=Arabic az=Azerbaijani be=Belarusian bg=Bulgarian bn=Bengali bs=Bosnian ca=Catalan cs=Czech "
    "cy=Welsh da=Danish de=German el=Greek en=English eo=Esperanto es=Spanish et=Estonian eu=Basque fa=Persian fi=Finnish "
    "fr=French ga=Irish gl=Galician gu=Gujarati ha=Hausa he=Hebrew hi=Hindi hr=Croatian hu=Hungarian hy=Armenian "
    "id=Indonesian is=Icelandic it=Italian ja=Japanese ka=Georgian kk=Kazakh km=Khmer kn=Kannada ko=Korean la=Latin "
    "lt=Lithuanian lv=Latvian mk=Macedonian ml=Malayalam mn=Mongolian mr=Marathi ms=Malay my=Burmese ne=Nepali nl=Dutch "
    "no=Norwegian pa=Punjabi pl=Polish ps=Pashto pt=Portuguese ro=Romanian ru=Russian si=Sinhala sk=Slovak sl=Slovene "
    "so=Somali sq=Albanian sr=Serbian sv=Swedish sw=Swahili ta=Tamil te=Telugu th=Thai tl=Tagalog tr=Turkish uk=Ukrainian "
    "ur=Urdu uz=Uzbek vi=Vietnamese yo=Yoruba zh=Chinese zu=Zulu"
)
NAMES = dict(pair.split("=") for pair in _NAMES.split())


class LanguageSample:
    """A sample of texts spread over a stream, to tell whether most are in a language the model was not trained on.

    `languages` are ISO 639-1 codes, region and script ignored; without any that the classifier knows there is no warning.
    The same stream always gives the same sample.
    """

    def __init__(self, languages: Sequence[str]) -> None:
        codes = (language.lower().replace("_", "-").split("-")[0] for language in languages)
        self._known = list(dict.fromkeys(ALIASES.get(code, code) for code in codes))
        self._draw = random.Random(0).random
        self._seen = 0
        self._texts: list[str] = []

    def see(self, text: str) -> None:
        """Take note of the next text of the stream; costs next to nothing."""
        self._seen += 1
        if len(self._texts) < SAMPLED:
            self._texts.append(_start(text))
        elif (at := int(self._draw() * self._seen)) < SAMPLED:
            self._texts[at] = _start(text)

    def warning(self) -> str | None:
        """One line if more than half of the sampled texts that can be judged are in other languages.

        Loads the classifier, which takes most of a second, unless there is too little to judge.
        """
        texts = [text for text in self._texts if len("".join(filter(str.isalpha, text)).encode()) >= SHORTEST]
        if not self._known or len(texts) < FEWEST:
            return None
        verdicts = _foreign(texts, self._known)
        others = Counter(verdict for verdict in verdicts if verdict)
        if len(verdicts) < FEWEST or 2 * others.total() <= len(verdicts):
            return None
        often = [code for code, count in others.most_common() if 10 * count >= others.total()] or [others.most_common(1)[0][0]]
        return (
            f"most texts ({others.total()} of {len(verdicts)} sampled) look like {_listed(often)}; this model was trained on "
            f"{_listed(self._known)}: results will be poor, use a multilingual model"
        )


def _start(text: str) -> str:
    """The part of a text that is kept: its beginning without white space before it."""
    return text[: 4 * KEPT].lstrip()[:KEPT]


def _foreign(texts: Iterable[str], known: Sequence[str]) -> list[str | None]:
    """For each text that is in a language, the code of that language if it is surely none of the known ones, else None."""
    identifier = _classifier()
    known = [code for code in known if code in identifier.labels]
    if not known:
        return []
    verdicts: list[str | None] = []
    for text in texts:
        likely: dict[str, float] = dict(identifier.rank(text))
        best = max(likely, key=likely.__getitem__)
        if best != NO_LANGUAGE:
            others = likely[NO_LANGUAGE] + sum(likely[code] for code in known)
            verdicts.append(best if likely[best] > ODDS * others else None)
    return verdicts


def _classifier() -> Any:
    """The classifier, read anew each time: it takes a hundred megabytes, and a run needs it once."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _listed(codes: Sequence[str]) -> str:
    """The names of languages, three at most."""
    return ", ".join(NAMES.get(code, code) for code in codes[:3]) + (" …" if len(codes) > 3 else "")
