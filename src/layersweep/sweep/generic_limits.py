"""What cannot be asked of transformers' own layers, and what is simpler there than wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from layersweep.errors import Fallback, InputError
from layersweep.families.spec import Decoder
from layersweep.kv.arms import Arm
from layersweep.stream.blocks import BlockSpec
from layersweep.stream.generic_shapes import costs

KEEPS_NOTHING = (
    "answers token by token: found a decoder that transformers' own layers compute, needed a "
    "program of this package, since those keep nothing between two sweeps"
)


def check_modules(decoder: Decoder, arms: Sequence[Arm], *, generates: bool) -> None:
    """Raises InputError for arms and tasks that such a decoder cannot have."""
    if decoder.generic is None:
        return
    if generates:
        raise InputError(KEEPS_NOTHING, hint="--niah-mode teacher")
    coded = [arm.name for arm in arms if arm.codec is not None]
    if decoder.generic.exact_only and coded:
        raise InputError(
            f"--kv: found {coded[0]} for a {decoder.model_type}, needed exact arms alone: "
            f"{decoder.generic.exact_only}",
            hint="`layersweep plan` says which families have a program of their own",
        )


def module_fallbacks(decoder: Decoder, element: int) -> Iterator[Fallback]:
    """What is not as wanted, whatever is measured, in numbers of `element` bytes."""
    assert decoder.generic is not None
    if decoder.generic.text_of:
        used = f"its text part, a {decoder.model_type}"
        yield Fallback("model", f"a {decoder.generic.text_of}", used, "only text is measured")
    blind = [layer for layer in decoder.generic.layers if layer.attention and not layer.turning]
    if blind:
        yield Fallback(
            "keys", "before RoPE", "as attention sees them",
            f"nothing here undoes what {decoder.model_type} does to them by their positions",
        )  # fmt: skip
    if why := costs(decoder, element).guessed:
        yield Fallback("memory plan", "what lives at once, measured", "a generous guess", why)


def float_fallbacks(specs: Sequence[BlockSpec]) -> Iterator[Fallback]:
    """What `--weights nf4` leaves as it is: matrices of no linear layer, and routers."""
    left = {
        key: None
        for spec in specs
        if spec.layer is not None
        for key, placed in spec.weights.items()
        if len(placed.weight.shape) == 2 and not placed.packed
    }
    if left:
        names = ", ".join([*list(left)[:4], *(["..."] if len(left) > 4 else [])])
        yield Fallback(
            "--weights nf4", "every matrix of a layer in 4 bits", "some as they are stored",
            f"weights of linear layers are packed, routers excepted, not {names}",
        )  # fmt: skip
