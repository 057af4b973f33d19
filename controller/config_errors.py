"""One clear sentence out of what pydantic says of a run file."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


def first_sentence(error: ValidationError, model: type[BaseModel]) -> str:
    """Say what is wrong first of all, where, what was got and what is allowed."""
    errors = error.errors(include_url=False)
    # An unknown key is most often a misspelt one, and then explains why another is missing.
    errors.sort(key=lambda detail: detail["type"] != "extra_forbidden")
    sentence = _sentence(errors[0], model)
    if len(errors) > 1:
        sentence += f" (and {len(errors) - 1} more)"
    return sentence


def _sentence(detail: ErrorDetails, model: type[BaseModel]) -> str:
    keys, parent = _resolve(detail["loc"], model)
    key = ".".join(keys)
    kind, message, got = detail["type"], detail["msg"], _short(detail["input"])
    if kind == "extra_forbidden":
        return f"unknown key {key}; {_allowed(keys[-1], parent)}"
    if kind == "missing":
        return f"key {key} is missing; it must be set"
    if kind == "union_tag_not_found":
        return f"key {key}.name is missing; {_tags(detail)}"
    if kind == "union_tag_invalid":
        return f"{key}.name is {detail['ctx']['tag']!r}; {_tags(detail)}"
    if kind in ("value_error", "assertion_error"):
        reason = message.removeprefix("Value error, ")
        return f"{key}: {reason}" if key else reason
    return f"{key} {_rule(kind, message)}, got {got}"


_RULES = {
    "model_type": "must be a mapping of keys",
    "model_attributes_type": "must be a mapping of keys",
    "dict_type": "must be a mapping of keys",
    "tuple_type": "must be a list",
    "too_short": "must have at least one entry",
    "int_type": "must be a whole number",
    "path_type": "must be a path",
}


def _rule(kind: str, message: str) -> str:
    if kind in _RULES:
        return _RULES[kind]
    rule = message.replace("Input should be", "must be", 1)
    return f"{rule[:1].lower()}{rule[1:]}"


def _tags(detail: ErrorDetails) -> str:
    # A discriminator's tags come as one string: 'a', 'b'.
    expected = detail.get("ctx", {}).get("expected_tags", "")
    return f"it must be one of {expected}" if expected else "it says which kind is meant"


def _allowed(key: str, parent: type[BaseModel] | None) -> str:
    fields = parent.model_fields if parent is not None else {}
    known = [field.alias or name for name, field in fields.items()]
    nearest = difflib.get_close_matches(key, known, n=1)
    if nearest:
        return f"did you mean {nearest[0]}? Allowed here: {', '.join(known)}"
    return f"allowed here: {', '.join(known)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _resolve(
    location: tuple[int | str, ...], model: type[BaseModel]
) -> tuple[list[str], type[BaseModel] | None]:
    """Return the keys as the file has them, and the model that holds the last one.

    Pydantic's location also names which member of a union was tried; the file does not.
    """
    keys: list[str] = []
    annotation: Any = model
    parent: type[BaseModel] | None = None
    for part in location:
        member = _member(annotation, part)
        if member is not None:
            annotation = member
            continue
        holder = _only_model(annotation)
        if holder is not None:
            parent = holder
            field = holder.model_fields.get(str(part))
            annotation = field.annotation if field is not None else None
        else:
            parent = None
            annotation = _element(annotation)
            if annotation is None and keys and not isinstance(part, int):
                # Inside a plain union pydantic appends the name of a type, which is no key.
                continue
        keys.append(str(part))
    return keys, parent


def _options(annotation: Any) -> tuple[Any, ...]:
    origin = get_origin(annotation)
    if origin is Union or type(annotation).__name__ == "UnionType":
        return get_args(annotation)
    return ()


def _member(annotation: Any, tag: int | str) -> type[BaseModel] | None:
    """Return the member of a discriminated union that `tag` names, if it is one."""
    for option in _options(annotation):
        if isinstance(option, type) and issubclass(option, BaseModel):
            name = option.model_fields.get("name")
            if name is not None and tag in get_args(name.annotation):
                return option
    return None


def _only_model(annotation: Any) -> type[BaseModel] | None:
    for option in (annotation, *_options(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _element(annotation: Any) -> Any:
    """Return what a dict or a tuple holds, also if None is another choice."""
    for option in (annotation, *_options(annotation)):
        origin, arguments = get_origin(option), get_args(option)
        if origin is dict:
            return _plain(arguments[1])
        if origin in (tuple, list):
            return _plain(arguments[0])
    return None


def _plain(annotation: Any) -> Any:
    """Return a type without what it is annotated with."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
