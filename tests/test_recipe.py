"""Recipes: a signature as configuration, from TOML, from the command line, from the environment, and `embell train`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embell.cli.main import cli
from embell.errors import EmbellError, UsageError
from embell.training.recipe import command, configure, keys, to_toml


@dataclass(frozen=True)
class Pace:
    """How fast it goes.

    Attributes:
        batch: rows at a time,
            all of them together
        learning_rate: the highest one
        shuffle: mix the rows
        limit: stop there
    """

    batch: int = 32
    learning_rate: float = 1e-4
    shuffle: bool = True
    limit: int | None = 7


@dataclass(frozen=True)
class LongPace(Pace):
    """The same, for longer.

    Attributes:
        epochs: how often
    """

    epochs: int = field(default_factory=lambda: 3)


def toy(
    model: Path,
    *,
    data: tuple[Path, ...],
    pace: Pace = Pace(batch=16),
    loss: Literal["infonce", "cosent"] = "infonce",
    start: Literal["first", "last"] | None = None,
    prompt: str = 'say "{text}"',
    note: str | None = "kept",
    adapter: Path | None = None,
    depths: tuple[int, ...] = (2, 4),
    shares: tuple[float, ...] = (),
    targets: tuple[str, ...] | None = ("q", "v"),
    careful: bool = False,
) -> Path:
    """Train a toy.

    \b
    embell train toy --model DIR --data rows.jsonl

    Args:
        model: what to start from
        data: rows to learn from
        pace: a group needs no help of its own, and may have it
        loss: what is minimised
        start: where it begins; default: as it comes
        prompt: words around each text
        note: a remark
        adapter: an adapter
            over the model: a folder
        depths: depths that are trained

        shares: how much of each
        targets: parts of the model
        careful: look twice

    Raises nothing.
    """
    CALLS.append(dict(locals()))
    return Path("runs") / "model"


CALLS: list[dict[str, Any]] = []
NEEDED: dict[str, Any] = {"model": Path("m"), "data": (Path("d"),)}


def configured(toml: str, path: Path, **given: Any) -> dict[str, Any]:
    (path / "run.toml").write_text(toml, encoding="utf-8")
    return configure(toy, path / "run.toml", {**NEEDED, **given})


def call(*args: str, **env: str) -> Result:
    """`embell train toy ARGS`, under the settings of the real command."""
    root = click.Group("embell", commands={"train": click.Group("train", commands={"toy": command("toy", toy)})},
                       context_settings=cli.context_settings)  # fmt: skip
    CALLS.clear()
    return CliRunner().invoke(root, ["train", "toy", *args], env=env, prog_name="embell")


# --- the signature --------------------------------------------------------------------------------


def test_keys_are_the_signature_flattened() -> None:
    found = {key.name: key for key in keys(toy)}
    assert list(found)[:7] == ["model", "data", "batch", "learning_rate", "shuffle", "limit", "loss"]
    assert [key.name for key in found.values() if key.required] == ["model", "data"]
    assert {key.name for key in found.values() if key.group == "pace"} == {"batch", "learning_rate", "shuffle", "limit"}
    assert (found["batch"].default, found["batch"].type, found["batch"].flag) == (16, int, "--batch")
    assert found["batch"].help == "rows at a time, all of them together"
    assert found["adapter"].help == "an adapter over the model: a folder"


def test_a_dataclass_inherits_fields_and_their_help() -> None:
    def heir(pace: LongPace = LongPace()) -> Path:
        """Do it."""
        return Path()

    heir.__annotations__ = {"pace": LongPace, "return": Path}
    assert [(key.name, key.default) for key in keys(heir)][-2:] == [("limit", 7), ("epochs", 3)]
    assert configure(heir, None, {"epochs": 4}) == {"pace": LongPace(epochs=4)}


def recipe(annotation: Any, default: Any = ..., name: str = "size", args: str = "size: how large") -> Callable[..., Path]:
    """A recipe with this one parameter beside a `Pace`."""
    space: dict[str, Any] = {"Pace": Pace, "Path": Path, "annotation": annotation, "default": default}
    given = "" if default is ... else " = default"
    exec(f"def made(*, {name}: annotation{given}, pace: Pace = Pace()) -> Path: ...", space)
    space["made"].__doc__ = f"Do it.\n\n    Args:\n        {args}\n    "
    made: Callable[..., Path] = space["made"]
    return made


@dataclass
class Thawed:
    """Not frozen.

    Attributes:
        weight: how heavy
    """

    weight: int = 1


@dataclass(frozen=True)
class Silent:
    """Explains nothing."""

    weight: int = 1


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (recipe(dict[str, int]), "size: .*no type of a setting"),
        (recipe(int | str), "size: .*no type of a setting"),
        (recipe(tuple[int, int]), "size: .*no type of a setting"),
        (recipe(tuple[bool, ...]), "size: a tuple of bool"),
        (recipe(Literal[1, 2]), "size: .*no type of a setting"),
        (recipe(Literal["none", "all"] | None), "size: 'none' is a choice and also stands for None"),
        (recipe(int, 1.5), "size: the default is 1.5, not a whole number"),
        (recipe(int, True), "size: the default is true, not a whole number"),
        (recipe(tuple[int, ...], [1]), "size: the default is "),
        (recipe(str | None, "none"), "size: the default is 'none'"),
        (recipe(int, args="sise: how large"), "explains sise, which it does not have"),
        (recipe(int, args="size"), "'size' below Args: is not"),
        (recipe(int, args="size: how large\n        weight: how heavy"), "explains weight"),
        (recipe(int, name="batch", args="batch: again"), "batch: --batch is taken"),
        (recipe(int, name="no_shuffle", args="no_shuffle: again"), "shuffle: --no-shuffle is taken"),
        (recipe(str, name="config", args="config: a file"), "config: --config is taken"),
        (recipe(Thawed, name="thawed", args=""), "Thawed is not a frozen dataclass"),
        (recipe(Silent, Silent(), name="silent", args=""), "weight: the docstring does not explain it"),
    ],
)  # fmt: skip
def test_a_function_that_cannot_be_a_recipe_is_refused(made: Callable[..., Path], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        command("made", made)


def test_a_parameter_that_is_not_explained_is_refused() -> None:
    made = recipe(int)
    made.__doc__ = "Do it."
    with pytest.raises(TypeError, match="recipe made: size: the docstring does not explain it"):
        keys(made)


# --- TOML -----------------------------------------------------------------------------------------


def test_what_is_given_overrides_the_file_and_that_the_defaults(tmp_path: Path) -> None:
    made = configured(
        'recipe = "toy"\nbatch = 8\nlearning_rate = 1\nlimit = "none"\ndata = ["a", "b"]', tmp_path, data=["c"], batch=4
    )
    assert made["pace"] == Pace(batch=4, learning_rate=1.0, limit=None)
    assert type(made["pace"].learning_rate) is float
    assert (made["model"], made["data"], made["loss"], made["depths"]) == (Path("m"), (Path("c"),), "infonce", (2, 4))
    assert list(made) == list(configure(toy, None, NEEDED))


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("learning_rat = 1", "unknown key 'learning_rat', did you mean 'learning_rate'?"),
        ("learning-rate = 1", "unknown key 'learning-rate', did you mean 'learning_rate'?"),
        ("zzz = 1", "unknown key 'zzz', known are model, data, batch,"),
        ("[pace]\nbatch = 1", "unknown table [pace]; all keys stand at the top"),
        ('batch = "many"', 'batch is "many", not a whole number'),
        ("batch = true", "batch is true, not a whole number"),
        ("batch = 3.0", "batch is 3.0, not a whole number"),
        ('batch = "none"', 'batch is "none", not a whole number'),
        ("limit = 1.5", "limit is 1.5, not a whole number or none"),
        ("learning_rate = nan", "learning_rate is NaN, not a finite number"),
        ("learning_rate = -inf", "learning_rate is -Infinity, not a finite number"),
        ("learning_rate = true", "learning_rate is true, not a finite number"),
        (f"learning_rate = 1{'0' * 400}", "learning_rate is 1000"),
        ("shuffle = 1", "shuffle is 1, not true or false"),
        ('loss = "infonc"', "loss is \"infonc\", not one of infonce, cosent; did you mean 'infonce'?"),
        ("prompt = 1", "prompt is 1, not a text"),
        ('model = ""', 'model is "", not a path'),
        ('model = "a\\u0000b"', "not a path"),
        ('data = "a.jsonl"', 'data is "a.jsonl", not a list of paths; write ["a.jsonl"]'),
        ("depths = [1, 2.5]", "depths is [1, 2.5], not a list of whole numbers"),
        ("targets = [[]]", "targets is [[]], not a list of texts or none"),
        ("prompt = 2024-01-01", "prompt is \"2024-01-01\", not a text"),
        ('recipe = "distill"', 'recipe is "distill", and this is toy'),
        ("batch = ", "not valid TOML ("),
        ("batch = 1\nbatch = 2", "not valid TOML ("),
    ],
)  # fmt: skip
def test_a_fault_in_the_file_is_one_line(tmp_path: Path, toml: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        configured(toml, tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / 'run.toml'}: {message}") or message in str(raised.value)
    assert str(raised.value).startswith(f"{tmp_path / 'run.toml'}: ")
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml: no such file"):
        configure(toy, tmp_path / "none.toml", NEEDED)
    with pytest.raises(UsageError, match=r"cannot be read \(Is a directory\)"):
        configure(toy, tmp_path, NEEDED)
    (tmp_path / "latin.toml").write_bytes(b'prompt = "\xe9"')
    with pytest.raises(UsageError, match=r"latin\.toml: not valid TOML \(.*utf-8"):
        configure(toy, tmp_path / "latin.toml", NEEDED)


def test_what_is_given_is_checked_like_a_file() -> None:
    with pytest.raises(UsageError, match="toy: unknown key 'bach', did you mean 'batch'"):
        configure(toy, None, {**NEEDED, "bach": 1})
    with pytest.raises(UsageError, match=r"^--learning-rate is true, not a finite number$"):
        configure(toy, None, {**NEEDED, "learning_rate": True})
    with pytest.raises(UsageError, match="toy needs model and data: give --model and --data, or set"):
        configure(toy, None, {})


TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
WORD = TEXT | st.sampled_from(["none", '"', "\\", "\n\r\t", "\x7f\x00\x1f", "\\u0041", "'''", '"""', "é中\U0001f600\u2028"])
PATHS = WORD.filter(lambda text: "\0" not in text and text != "").map(Path)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.fixed_dictionaries(
    {
        "model": PATHS,
        "data": st.lists(PATHS).map(tuple),
        "pace": st.builds(Pace, st.integers(), NUMBER, st.booleans(), st.none() | st.integers()),
        "loss": st.sampled_from(["infonce", "cosent"]),
        "start": st.sampled_from([None, "first", "last"]),
        "prompt": WORD,
        "note": st.none() | WORD.filter(lambda text: text != "none"),
        "adapter": st.none() | PATHS,
        "depths": st.lists(st.integers()).map(tuple),
        "shares": st.lists(NUMBER).map(tuple),
        "targets": st.none() | st.lists(WORD).map(tuple),
        "careful": st.booleans(),
    }
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(VALUES)
def test_what_is_written_reads_back_the_same(tmp_path: Path, values: dict[str, Any]) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(to_toml(toy, values).encode())
    assert configure(toy, path, {}) == values


def test_every_setting_is_written_with_the_name_of_the_recipe() -> None:
    lines = to_toml(toy, configure(toy, None, NEEDED)).splitlines()
    assert lines[0] == 'recipe = "toy"'
    assert [line.split(" = ")[0] for line in lines[1:]] == [key.name for key in keys(toy)]


# --- the command ----------------------------------------------------------------------------------


def test_the_command_calls_the_recipe_and_prints_the_model() -> None:
    done = call("--model", "m", "--data", "a", "--data", "b", "--no-shuffle", "--limit", "none", "--depths", "-1", "--loss", "cosent",
                "--learning-rate", "2e-5", "--adapter", "none", "--targets", "none", "--careful", "--start", "none")  # fmt: skip
    assert (done.exit_code, done.stdout, done.stderr) == (0, "runs/model\n", "")
    wanted = configure(
        toy, None, {"model": "m", "data": ["a", "b"], "depths": [-1], "loss": "cosent", "targets": None, "careful": True}
    )
    (made,) = CALLS
    assert made == {**wanted, "pace": Pace(16, 2e-5, False, None)}


def test_flags_override_the_file_and_what_is_not_given_does_not(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        'model = "m"\ndata = ["d"]\nbatch = 8\nshuffle = false\ndepths = [1]\nnote = "none"\ncareful = true\n'
    )
    done = call("--config", str(tmp_path / "run.toml"), "--limit", "2", "--no-careful")
    assert done.exit_code == 0, done.output
    (made,) = CALLS
    assert made == {**configure(toy, None, {**NEEDED, "depths": [1], "note": None}), "pace": Pace(8, 1e-4, False, 2)}


def test_each_option_has_its_variable_between_file_and_flag(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('model = "m"\ndata = ["d"]\nbatch = 8\nlimit = 1\nlearning_rate = 1.0\n')
    env = {"EMBELL_TRAIN_TOY_CONFIG": str(tmp_path / "run.toml"), "EMBELL_TRAIN_TOY_BATCH": "5", "EMBELL_TRAIN_TOY_LIMIT": "none",
           "EMBELL_TRAIN_TOY_SHUFFLE": "no", "EMBELL_TRAIN_TOY_DATA": "a b:c", "EMBELL_TRAIN_TOY_DEPTHS": "3 4"}  # fmt: skip
    done = call("--learning-rate", "0.5", **env)
    assert done.exit_code == 0, done.output
    assert CALLS[0]["pace"] == Pace(5, 0.5, False, None)
    assert (CALLS[0]["data"], CALLS[0]["depths"]) == ((Path("a b"), Path("c")), (3, 4))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--batch", "many"), '--batch is "many", not a whole number'),
        (("--learning-rate", "nan"), "--learning-rate is NaN, not a finite number"),
        (("--loss", "infonc"), "did you mean 'infonce'?"),
        (("--model", "\udcff"), "not a path"),
        (("--note", "\udcff"), "not a text"),
    ],
)
def test_a_wrong_flag_is_refused(args: tuple[str, ...], message: str) -> None:
    done = call("--model", "m", "--data", "d", *args)
    assert isinstance(done.exception, UsageError)
    assert message in str(done.exception)
    assert CALLS == []


def test_a_misspelt_flag_is_answered_with_the_nearest() -> None:
    done = call("--model", "m", "--learning-rat", "1")
    assert done.exit_code == 2
    assert "Did you mean --learning-rate?" in done.stderr.replace("'", "")


def test_the_help_lists_every_key_in_its_group_with_its_default() -> None:
    done = call("--help")
    assert done.exit_code == 0
    text = " ".join(done.stdout.split())
    own, grouped = text.split("Pace options:")
    assert "Usage: embell train toy" in own
    assert "Train a toy. embell train toy --model DIR" in own
    assert "Args:" not in text
    assert "Raises" not in text
    for key in keys(toy):
        assert f"{key.flag} " in (grouped if key.group else own).replace("/", " ")
        assert key.help in text
    assert "a group needs no help" not in text
    for shown in (
        "what to start from [required]", "rows to learn from (repeatable) [required]", "--loss [infonce|cosent] what is minimised [default: infonce]",
        "--limit N|none stop there [default: 7]", "--shuffle / --no-shuffle mix the rows [default: shuffle]", "[default: no-careful]",
        "depths that are trained (repeatable) [default: 2, 4]", "an adapter over the model: a folder [default: none]", "how much of each (repeatable) --",
        "default: as it comes --",
        "relative to the current directory",
    ):  # fmt: skip
        assert shown in text
    assert max(map(len, done.stdout.splitlines())) <= 100


# --- embell train ---------------------------------------------------------------------------------


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


def test_help_of_train_loads_no_torch() -> None:
    code = "import sys, embell.cli.main as m\nsys.argv = ['embell', 'train', '--help']\ntry: m.main()\nexcept SystemExit: pass\nprint('torch' in sys.modules, 'numpy' in sys.modules)"
    out = python(code)
    assert [line.split()[0] for line in out.split("Recipes:\n")[1].splitlines()[:4]] == [
        "contrastive",
        "graded",
        "distill",
        "pretrain",
    ]
    assert "embell train contrastive --model DIR --data pairs.jsonl --output RUN" in out
    assert out.splitlines()[-1] == "False False"


def test_recipe_machinery_loads_no_torch() -> None:
    assert python("import sys, embell.training.recipe\nprint('torch' in sys.modules, 'numpy' in sys.modules)") == "False False\n"


@pytest.mark.parametrize(
    ("recipe", "hint"),
    [("contrastiv", "Did you mean contrastive?"), ("zzz", "Known are contrastive, graded, distill, pretrain.")],
)
def test_a_recipe_that_does_not_exist_is_answered_with_those_that_do(recipe: str, hint: str) -> None:
    done = CliRunner().invoke(cli, ["train", recipe])
    assert done.exit_code == 2
    assert f"No such recipe '{recipe}'. {hint}" in done.stderr


def test_without_accelerate_the_install_line_is_told() -> None:
    code = "import sys\nsys.modules['accelerate'] = None\nfrom click.testing import CliRunner\nfrom embell.cli.main import cli\nprint(CliRunner().invoke(cli, ['train', 'graded', '--help']).exception, 'torch' in sys.modules)"
    assert python(code) == "training needs accelerate: pip install 'embell[train]' False\n"


def test_a_run_for_which_there_is_no_memory_says_so() -> None:
    def large(data: tuple[Path, ...] = ()) -> Path:
        """A recipe.

        Args:
            data: some
        """
        torch.empty(2**60, dtype=torch.uint8)
        return Path()

    done = CliRunner().invoke(command("large", large))
    assert isinstance(done.exception, EmbellError)
    assert str(done.exception).startswith("out of memory; give a smaller model")
