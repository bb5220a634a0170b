"""What each field of ``adapter_config.json`` may hold; a text ``"false"`` is no boolean."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from loratool.errors import AdapterError

__all__ = [
    "DECIDING",
    "FORMS",
    "LARGEST_NUMBER",
    "Form",
    "is_number",
    "number_in",
    "wrong_fields",
]

LARGEST_NUMBER: Final = 1e30
"""What an alpha or a dropout may not reach."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a value has to be.

    Attributes:
        words: What was expected, for people.
        accepts: Whether a value is of this form; null, which means the default, is not asked.
    """

    words: str
    accepts: Callable[[Any], bool]


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool) or (type(value) is int and value in (0, 1))


def _is_whole(value: Any) -> bool:
    return type(value) is int


def is_number(value: Any) -> bool:
    """Whether a value is a finite number of a size that an alpha or a dropout may have."""
    is_any = isinstance(value, int | float) and not isinstance(value, bool)
    return is_any and abs(value) < LARGEST_NUMBER and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _list_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(accepts, value))


def _either(*forms: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(accepts(value) for accepts in forms)


def _is_token_table(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_list_of(_is_whole), value.values()))


def _each(names: str, form: Form) -> dict[str, Form]:
    return dict.fromkeys(names.split(), form)


def _is_range(value: Any) -> bool:
    return _list_of(_is_whole)(value) and len(value) == 2


FLAG: Final = Form("true or false", _is_flag)
WHOLE: Final = Form("a whole number", _is_whole)
NUMBER: Final = Form("a number", is_number)
TEXT: Final = Form("a text", _is_text)
OBJECT: Final = Form("an object", _is_object)
NAMES: Final = Form("a list of names", _either(_is_text, _list_of(_is_text)))
INITIAL: Final = Form("true, false or a name", _either(_is_flag, _is_text))

FORMS: Final[Mapping[str, Form]] = {
    **_each(
        """
        decompose_both ensure_weight_tying fan_in_fan_out inference_mode lora_bias merge_weights
        rank_dropout_scale save_projection use_dora use_effective_conv2d use_qalora use_rslora
        """,
        FLAG,
    ),
    **_each(
        """
        decompose_factor deltaT init_r projection_prng_key qalora_group_size r target_r tfinal
        tinit total_step
        """,
        WHOLE,
    ),
    **_each(
        """
        alpha beta1 beta2 d_initial lora_alpha lora_dropout module_dropout orth_reg_weight
        rank_dropout vera_dropout
        """,
        NUMBER,
    ),
    **_each(
        "base_model_name_or_path bias megatron_core peft_type peft_version revision task_type", TEXT
    ),
    **_each(
        """
        alpha_pattern arrow_config auto_mapping corda_config eva_config kasa_config loftq_config
        lora_ga_config megatron_config monteclora_config rank_pattern runtime_config velora_config
        """,
        OBJECT,
    ),
    **_each(
        "exclude_modules layers_pattern modules_to_save target_modules target_parameters", NAMES
    ),
    **_each("init_lora_weights init_weights", INITIAL),
    "alora_invocation_tokens": Form("a list of whole numbers", _list_of(_is_whole)),
    "enable_lora": Form("a list of true and false", _list_of(_is_flag)),
    "layer_replication": Form("a list of pairs of whole numbers", _list_of(_is_range)),
    "layers_to_transform": Form(
        "a whole number or a list of them", _either(_is_whole, _list_of(_is_whole))
    ),
    "trainable_token_indices": Form(
        "a list of whole numbers, or an object of such lists",
        _either(_list_of(_is_whole), _is_token_table),
    ),
    "use_bdlora": Form("an object", lambda value: _is_object(value) or value is False),
}
"""Fields of PEFT's configurations whose form is known, from the annotations of its classes."""

DECIDING: Final = frozenset(
    """
    alora_invocation_tokens alpha alpha_pattern arrow_config bias enable_lora
    ensure_weight_tying fan_in_fan_out init_lora_weights init_r layer_replication lora_alpha
    lora_bias modules_to_save peft_type qalora_group_size r rank_pattern target_modules
    target_parameters trainable_token_indices use_bdlora use_dora use_qalora use_rslora
    """.split()  # noqa: SIM905 - a list of strings is harder to read
)
"""Fields that say which weights change, or by what: wrong, they make a wrong result."""


def wrong_fields(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name of every field whose value has another form, and what is wrong with it."""
    for name, value in raw.items():
        form = FORMS.get(name)
        if form is not None and value is not None and not form.accepts(value):
            yield name, f"{name} is {value!r:.60}, expected {form.words}"


def number_in(config: Mapping[str, Any], name: str, *, where: object) -> float:
    """Return a number of a configuration, 0 where there is none.

    Raises:
        AdapterError: There is something else.
    """
    value = config.get(name)
    if value is None:
        return 0.0
    if not is_number(value):
        shown = reprlib.repr(value)
        raise AdapterError(
            where,
            f"{name} is {shown}, expected a number",
            hint="correct it, or delete the field",
            code="LT015",
        )
    return float(value)
