import enum
import typing
from typing import Any, Literal, Optional, Union

import pytest

from qwen_runtime.errors import RequestError
from qwen_runtime.text import tool_schema


class Unit(enum.Enum):
    CELSIUS = "c"
    KELVIN = 1


class Empty(enum.Enum):
    pass


def weather(city: str, days: int = 1, unit: Unit = Unit.KELVIN, deep: bool | None = None) -> str:
    """
    Tell the weather.

    It knows the future.

    Args:
        city: A place,
            anywhere.
        days: How far: in days (choices: [1, 2, " 3 "])
        unit: The unit

        deep (ignored): nothing
        deep: Look deep
    Returns:
        The weather.
    Raises:
        OSError: never
    """
    return f"{city}{days}{unit}{deep}"


def containers(
    a: list[str],
    b: dict[str, list[int]],
    c: tuple[int, str],
    d: Any,
    e: Optional[Union[int, str]],  # noqa: UP007, UP045  the old spelling is what is tested
    f: list[int] | None,
    g: int | list[str],
    h: Literal["x", 2, None],
    i: list | tuple,
    j: typing.List,  # noqa: UP006
    k: typing.Dict,  # noqa: UP006
    l: None = None,  # noqa: E741
):
    """Take everything.
    Args:
        a: 1
        b: 2
        c: 3
        d: 4
        e: 5
        f: 6
        g: 7
        h: 8
        i: 9
        j: 10
        k: 11
        l: 12"""


def custom_return() -> Unit | Empty:
    """Return what no schema can say."""
    return Unit.KELVIN


class Desk:
    def ask(self, what: str) -> dict[str, Any]:
        """Ask.

        Args:
            what: The question.

        Returns:
            dict: The answer.
        """
        return {what: 1}


@pytest.mark.parametrize("function", [weather, containers, custom_return, Desk().ask, Desk.ask])
def test_schema_equals_transformers(function):
    from transformers import utils

    expected = utils.get_json_schema(function)
    assert tool_schema(function) == expected
    assert str(tool_schema(function)) == str(expected)  # the order of keys reaches the prompt


def test_choices_and_descriptions_are_read_from_the_docstring():
    schema = tool_schema(weather)["function"]
    assert schema["description"] == "Tell the weather.\n\nIt knows the future."
    assert schema["parameters"]["properties"]["city"]["description"] == "A place, anywhere."
    assert schema["parameters"]["properties"]["days"]["enum"] == [1, 2, "3"]
    assert schema["parameters"]["required"] == ["city"]


def _documented(*arguments):
    lines = "".join(f"    {name}: it\n" for name in arguments)
    return f"Do it.\n\nArgs:\n{lines}"


def no_docstring(a: int):
    return a


def undescribed(a: int, b: int):
    return a + b


undescribed.__doc__ = _documented("a")


def no_hint(a):
    return a


no_hint.__doc__ = _documented("a")


def custom(a: "RequestError"):
    return a


custom.__doc__ = _documented("a")


def dangling(a: "Nowhere"):  # noqa: F821
    return a


dangling.__doc__ = _documented("a")


def endless(a: tuple[int, ...]):
    return a


endless.__doc__ = _documented("a")


def empty(a: Empty):
    return a


empty.__doc__ = _documented("a")


def sets(a: set[int]):
    return a


sets.__doc__ = _documented("a")


def bad_choices(a: str):
    """Do it.

    Args:
        a: it (choices: a, b)
    """
    return a


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_docstring, "no_docstring has no docstring"),
        (undescribed, "undescribed has no description of 'b'"),
        (no_hint, "no_hint has no type hint for 'a'"),
        (custom, "custom has a type hint for 'a' that JSON schema can't say: .*RequestError"),
        (dangling, r"dangling has a type hint that means nothing \(name 'Nowhere'"),
        (endless, r"endless has a type hint for 'a'.*use list\[...\]"),
        (empty, "empty has a type hint for 'a'.*its values must be int, float"),
        (sets, r"sets has a type hint for 'a'.*set\[int\]"),
        (bad_choices, "bad_choices lists choices of 'a' that are no JSON: a, b"),
        (len, "tools must hold JSON schemas .* got builtin_function_or_method"),
    ],
)
def test_a_function_that_does_not_describe_itself_is_refused(function, message):
    with pytest.raises(RequestError, match=message) as caught:
        tool_schema(function)
    assert caught.value.param == "tools"
