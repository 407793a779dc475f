"""The warning about a corpus in languages that the model was not trained on."""

from __future__ import annotations

import functools
import random
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from embell.engine import language as module
from embell.engine.language import KEPT, SAMPLED, LanguageSample

ENGLISH = [
    "The ferry leaves the island at seven in the morning and returns before dark.",
    "How do I reset the password of an account that has been locked?",
    "Return the index of the first item that is larger than the given value.\n\n:param items: a sorted list\n:rtype: int",
    "PARLIAMENT VOTES ON NEW RULES FOR FISHING IN COASTAL WATERS",
    "canon laser toner cartridge black 2500 pages cl-41x retail box",
    "Effects of sodium chloride and 2-methylpropanal on the oxidation of ascorbic acid in aqueous solution",
    "Garcia-Molina H., Müller J., Ivanov P. Locking in distributed databases. ACM Trans. Database Syst. 1994; 19(2): 117-165",
    "def load(path: str) -> dict:\n    with open(path) as file:\n        return json.load(file)",
]
FOREIGN = {
    "German": "Die Fähre verlässt die Insel um sieben Uhr morgens und kehrt vor Einbruch der Dunkelheit zurück.",
    "French": "Le bateau quitte l'île à sept heures du matin et revient avant la tombée de la nuit.",
    "Spanish": "El barco sale de la isla a las siete de la mañana y regresa antes de que anochezca.",
    "Turkish": "Vapur sabah yedide adadan ayrılıyor ve hava kararmadan önce geri dönüyor.",
    "Polish": "Prom odpływa z wyspy o siódmej rano i wraca przed zapadnięciem zmroku.",
    "Russian": "Паром уходит с острова в семь часов утра и возвращается до наступления темноты.",
    "Greek": "Το πλοίο φεύγει από το νησί στις επτά το πρωί και επιστρέφει πριν νυχτώσει.",
    "Arabic": "تغادر العبّارة الجزيرة في السابعة صباحا وتعود قبل حلول الظلام.",
    "Hebrew": "המעבורת יוצאת מהאי בשבע בבוקר וחוזרת לפני רדת החשכה.",
    "Hindi": "नाव सुबह सात बजे द्वीप से निकलती है और अंधेरा होने से पहले लौट आती है।",
    "Chinese": "渡轮早上七点离开小岛,天黑之前返回。",
    "Japanese": "フェリーは朝七時に島を出て、暗くなる前に戻ります。",
    "Korean": "여객선은 아침 일곱 시에 섬을 떠나 어두워지기 전에 돌아옵니다.",
    "Thai": "เรือข้ามฟากออกจากเกาะเวลาเจ็ดโมงเช้าและกลับมาก่อนค่ำ",
}
CODES = {"German": "de", "French": "fr", "Spanish": "es", "Russian": "ru", "Hindi": "hi", "Chinese": "zh"}
GERMAN = FOREIGN["German"]


@pytest.fixture(autouse=True, scope="module")
def loaded_once() -> Iterator[None]:
    """Reading the classifier takes most of a second, too much for every test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_classifier", functools.cache(module._classifier))
        yield


def warning(texts: list[str], *languages: str) -> str | None:
    sample = LanguageSample(languages)
    for text in texts:
        sample.see(text)
    return sample.warning()


@pytest.mark.parametrize("language", FOREIGN)
def test_a_foreign_corpus_is_named(language: str) -> None:
    line = warning([FOREIGN[language]] * 10, "en")
    assert line == (
        f"most texts (10 of 10 sampled) look like {language}; this model was trained on English: "
        "results will be poor, use a multilingual model"
    )


@pytest.mark.parametrize("text", ENGLISH)
def test_english_of_every_kind_passes(text: str) -> None:
    assert warning([text] * 10, "en") is None


@pytest.mark.parametrize("language", CODES)
def test_a_language_that_the_model_knows_passes(language: str) -> None:
    assert warning([FOREIGN[language]] * 10, "en", CODES[language]) is None
    assert warning([ENGLISH[0]] * 10, CODES[language]) is not None


@pytest.mark.parametrize("code", ["zh-Hans", "zh_TW", "ZH"])
def test_region_script_and_case_of_a_code_do_not_matter(code: str) -> None:
    assert warning([FOREIGN["Chinese"]] * 10, code) is None
    assert warning([GERMAN] * 10, code) is not None


def test_norwegian_goes_by_either_code() -> None:
    text = "Fergen forlater øya klokken sju om morgenen og kommer tilbake før det blir mørkt."
    assert warning([text] * 10, "nb") is None
    assert warning([text] * 10, "no") is None
    assert warning([GERMAN] * 10, "nb") is not None


@pytest.mark.parametrize(("foreign", "warns"), [(10, False), (11, True)])
def test_more_than_half_must_be_foreign(foreign: int, warns: bool) -> None:
    texts = [GERMAN] * foreign + [ENGLISH[0]] * (20 - foreign)
    assert (warning(texts, "en") is not None) == warns


@pytest.mark.parametrize("text", ["", "12.50", "Straße", "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"])
def test_what_cannot_be_judged_does_not_count(text: str) -> None:
    line = warning([text] * 90 + [GERMAN] * 10, "en")
    assert line is not None
    assert "(10 of 10 sampled)" in line
    assert warning([text] * 100, "en") is None


@pytest.mark.parametrize("filler", [[], ["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"] * 9])
def test_a_handful_of_texts_does_not_warn(filler: list[str]) -> None:
    assert warning(filler + [GERMAN] * 4, "en") is None
    assert warning(filler + [GERMAN] * 5, "en") is not None


def test_uncertain_texts_count_as_known() -> None:
    assert warning(["Grand Hotel Central Park Restaurant"] * 10 + [GERMAN] * 9, "en") is None
    assert warning(["Hotel Bristol Restaurant Milano"] * 10, "en") is None


def test_a_text_that_may_be_in_no_language_counts_as_known() -> None:
    dna = (
        "GAGCATTTGTACTGAAACCGCATGTATAGCATCTGTTTGAAAGAACACAACTAGGGACCGTAGACTTATGTCCTGTAACCGCTGCAGGAAGGGCCCAGAGGAAAGCTGGAATAAAGGCCG"
    )
    assert warning([dna] * 10, "en") is None
    assert warning([dna] * 10 + [GERMAN] * 9, "en") is None


def test_related_languages_are_not_told_apart_at_any_price() -> None:
    assert warning(["Dobar dan, kako ste danas?"] * 10, "bs") is None


@pytest.mark.parametrize("languages", [(), ("xx",), ("xx", "tlh")])
def test_without_a_known_language_there_is_no_warning(languages: tuple[str, ...]) -> None:
    assert warning([GERMAN] * 10, *languages) is None


def test_at_most_three_languages_are_named_and_the_most_frequent_first() -> None:
    texts = [FOREIGN[language] for language in ("German", "French", "French", "Russian", "Hindi", "Thai", "Greek", "Turkish")]
    line = warning(texts * 2, "en")
    assert line is not None
    assert "\n" not in line
    assert "look like French, German, Russian …;" in line
    few = warning([GERMAN] * 50 + [FOREIGN["French"]], "en")
    assert few is not None
    assert "look like German;" in few, "a stray verdict is not worth a mention"


def test_the_beginning_of_a_text_is_judged() -> None:
    assert warning(["\n" * 1000 + ENGLISH[0] * 20 + GERMAN * 100] * 10, "en") is None
    assert warning(["\n" * 1000 + GERMAN * 20 + ENGLISH[0] * 100] * 10, "en") is not None


def test_broken_characters_do_no_harm() -> None:
    assert warning([GERMAN + "\ud800\x00" + GERMAN] * 10, "en") is not None


def test_the_sample_is_small_fair_and_always_the_same() -> None:
    def sampled() -> list[str]:
        sample = LanguageSample(("en",))
        for number in range(20_000):
            sample.see(f"{number} " + "x" * 10_000)
        return sample._texts

    texts = sampled()
    assert texts == sampled()
    assert len(texts) == SAMPLED
    assert max(map(len, texts)) <= KEPT
    numbers = [int(text.split()[0]) for text in texts]
    assert len(set(numbers)) == SAMPLED
    for tenth in range(10):
        assert 5 <= sum(number // 2000 == tenth for number in numbers) <= 40


def test_a_foreign_majority_late_in_the_stream_is_found() -> None:
    texts = [ENGLISH[0]] * 1000 + [GERMAN] * 3000
    assert warning(texts, "en") is not None
    random.Random(1).shuffle(texts)
    assert warning(texts, "en") is not None
    assert warning([GERMAN] * 1000 + [ENGLISH[0]] * 3000, "en") is None


def test_seeing_a_text_costs_next_to_nothing() -> None:
    sample = LanguageSample(("en",))
    text = GERMAN * 10_000
    started = time.process_time()
    for _ in range(100_000):
        sample.see(text)
    assert time.process_time() - started < 2


def test_the_classifier_is_loaded_only_to_judge() -> None:
    script = (
        "import sys; from embell.engine.language import LanguageSample\n"
        "sample = LanguageSample(('en',))\n"
        "for _ in range(9): sample.see('too short')\n"
        "assert sample.warning() is None and 'py3langid' not in sys.modules\n"
        "for _ in range(9): sample.see('This is long enough for a verdict.')\n"
        "assert 'py3langid' not in sys.modules\n"
        "assert sample.warning() is None and 'py3langid' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
