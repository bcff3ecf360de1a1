"""Errors can be pickled without loss."""

import inspect
import pickle

import pytest

from claude_hitl_template import errors
from claude_hitl_template.errors import (
    ConfigError,
    EngineError,
    HitlError,
    InvalidInput,
    RateLimited,
    TooLarge,
)

SAMPLES: dict[type[HitlError], tuple[object, ...]] = {
    ConfigError: ("no folder", "make one"),
    InvalidInput: ("not a number", "limit"),
    TooLarge: ("too long", "content"),
    RateLimited: ("slow down", 2.5),
    EngineError: ("overloaded", "model_overloaded_error", False),
}
CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, HitlError)]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_an_error_survives_pickling_with_all_its_arguments(kind: type[HitlError]):
    error = kind(*SAMPLES.get(kind, ("what went wrong",)))
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert (back.args, vars(back), str(back)) == (error.args, vars(error), str(error))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_a_class_with_own_arguments_has_a_sample(kind: type[HitlError]):
    assert kind in SAMPLES or kind.__init__ is HitlError.__init__


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_the_message_alone_is_enough(kind: type[HitlError]):
    assert str(pickle.loads(pickle.dumps(kind("why")))) == "why"


def test_the_text_names_the_field_and_the_mend():
    assert str(InvalidInput("not a number", "limit")) == "limit: not a number"
    assert str(ConfigError("no folder", "make one")) == "no folder\n  Fix: make one"
