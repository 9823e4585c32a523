"""The colours of instances in pictures.

Any two differ by at least 0.11 in OKLab (Ottosson, 2020; white and black differ by 1), in normal vision and
in that of people without the red, green or blue cones (Machado et al., 2009). The seven colours of Okabe and
Ito have 0.076. Found by a search over RGB. Black text has a contrast of 4.5 : 1 or more on each.
"""

from __future__ import annotations

PALETTE = (
    (255, 34, 170),
    (187, 221, 0),
    (119, 204, 238),
    (170, 102, 17),
    (153, 68, 255),
    (51, 187, 0),
    (255, 153, 153),
    (0, 136, 119),
    (170, 136, 255),
    (136, 255, 170),
)
"""Red, green, blue."""


def colour_of(number: int, prompt_number: int, prompts: int) -> int:
    """The index of an instance's colour: one a prompt if there are several, else one an instance.

    Args:
        number: of the instance in the answer, from 1.
        prompt_number: of its prompt, from 1.
        prompts: how many the answer has.
    """
    return ((prompt_number if prompts > 1 else number) - 1) % len(PALETTE)
