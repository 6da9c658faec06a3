"""The 16 levels of each 4-bit type: constants of the format, without torch."""

from __future__ import annotations

# Quantiles of the normal distribution with an exact zero: Dettmers et al. 2023 (QLoRA), appendix E.
NF4_CODE: tuple[float, ...] = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Bit 3 is the sign; the others select one of these magnitudes out of 12 (not in order of size).
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_CODE: tuple[float, ...] = tuple(
    sign * level / 12.0 if level else 0.0 for sign in (1.0, -1.0) for level in _FP4_TWELFTHS
)
CODES: dict[str, tuple[float, ...]] = {"nf4": NF4_CODE, "fp4": FP4_CODE}
