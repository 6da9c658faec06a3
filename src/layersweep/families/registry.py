"""From a config.json's fields to the decoder they describe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from layersweep.families import tables
from layersweep.families.family import Family
from layersweep.families.fields import Fields, spell
from layersweep.families.foreign import HARMLESS, foreign_fields, unused_fields
from layersweep.families.names import Names
from layersweep.families.spec import Decoder
from layersweep.problems import Problem

if TYPE_CHECKING:
    from layersweep.families.generic.wanted import GenericNames

    AnyNames = Names | GenericNames


def _families() -> dict[str, Family]:
    """Every Family of every module in tables/, by model_type."""
    modules = (
        import_module(f"{tables.__name__}.{module.name}")
        for module in iter_modules(tables.__path__)
    )
    found = [one for module in modules for one in vars(module).values() if isinstance(one, Family)]
    return {family.model_type: family for family in sorted(found, key=lambda one: one.model_type)}


FAMILIES = _families()


@dataclass(frozen=True)
class Description:
    """`decoder` and `names` are None where there are `problems`; `unused`: fields that nothing
    looks at."""

    decoder: Decoder | None
    names: AnyNames | None
    problems: list[Problem]
    unused: tuple[str, ...] = ()


def describe(fields: Mapping[str, object], file: str, *, generic: bool = False) -> Description:
    """The decoder of the fields of a config.json, or everything that is wrong with them.

    `generic`: computed by transformers' own modules, as what is no family here always is.
    """
    f = Fields(fields, file)
    family = None if generic else _family(f)
    if family is None:
        return _by_modules(fields, f)
    f.defaults, f.aliases = family.defaults, family.aliases
    decoder = family.read(f)
    _check_aliases(f)
    _check_foreign(f)
    f.ignore("quantization_config")  # of how weights are stored, which checkpoint/ reads
    if f.problems:
        return Description(None, None, f.problems)
    decoder = replace(decoder, architecture=family.architecture, model_type=family.model_type)
    unused = (*unused_fields(fields, f.read), *f.unused)
    return Description(decoder, family.names, [], unused)


def _by_modules(fields: Mapping[str, object], f: Fields) -> Description:
    """As transformers computes it, if that knows it and it can run layer by layer."""
    kind = fields.get("model_type")
    if f.problems and kind in FAMILIES:  # whose architecture is another one
        return Description(None, None, f.problems)
    if f.fields.get("auto_map") is not None or not isinstance(kind, str):
        return Description(None, None, f.problems)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if kind not in CONFIG_MAPPING_NAMES:
        return Description(None, None, f.problems)
    from layersweep.families.generic.build import known_fields
    from layersweep.families.generic.describe import describe_modules
    from layersweep.families.generic.interfaces import Unsupported

    try:
        decoder, names = describe_modules(fields)
    except Unsupported as why:
        found = f"model_type '{kind}', where {why.where} has {why.found}"
        hint = why.hint or f"families of this package: {', '.join(FAMILIES)}"
        return Description(None, None, [Problem(f.file, None, found, why.needed, hint)])
    unread = known_fields(kind) | HARMLESS
    unused = (name for name, value in fields.items() if name not in unread and value is not None)
    return Description(decoder, names, [], tuple(unused))


def _family(f: Fields) -> Family | None:
    """By `architectures` and by `model_type`, which transformers goes by; both must agree."""
    names, model_type = f.get("architectures"), f.get("model_type")
    known = {family.architecture: family for family in FAMILIES.values()}
    found = None
    if names is None:
        found = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    elif isinstance(names, list) and len(names) == 1 and isinstance(names[0], str):
        found = known.get(names[0])
    if found is None:
        if f.fields.get("auto_map") is not None:
            hint = "a model that brings its own code is run only where transformers has it, too"
            f.problem("auto_map", f.fields["auto_map"], "nothing: such code is never run", hint)
        hint = f"these can be run: {', '.join(FAMILIES)}"
        if names is None:
            f.problem("model_type", model_type, f"one of {', '.join(FAMILIES)}", hint)
        else:
            f.problem("architectures", names, "the architecture of a decoder that can be run", hint)
    elif model_type is not None and model_type != found.model_type:
        if _borrows(model_type, found.architecture):
            return None
        f.problem("model_type", model_type, f"{spell(found.model_type)}, as architectures has it")
    return found


def _borrows(model_type: object, architecture: str) -> bool:
    """Whether a model_type of another name is computed by a family's architecture."""
    if not isinstance(model_type, str) or model_type in FAMILIES:
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return bool(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) == architecture)


def _check_aliases(f: Fields) -> None:
    for field, other in f.aliases.items():
        found, same = f.get(field), f.fields.get(other)
        f.read.add(other)
        if same is not None and same != found:
            f.problem(other, same, f"{field} = {spell(found)}, or nothing")


def _check_foreign(f: Fields) -> None:
    for name, plain in foreign_fields(f.fields, f.read):
        needed = " or ".join(["nothing", *map(spell, plain)])
        hint = f"{name} changes the maths in a way that this family is not computed with so far"
        f.problem(name, f.fields[name], needed, hint)
    types = [] if "layer_types" in f.read else f.get("layer_types") or []
    if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
        f.problem("layer_types", types, 'nothing, or "full_attention" for all')
