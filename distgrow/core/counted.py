"""counted(): a number and its noun, for every sentence that users read."""


def counted(number: int | str, noun: str) -> str:
    """Return the number and the noun, in the plural unless the number is shown as 1: "1 update", "2,000 updates".

    Args:
        number: The number, or how it is shown: a float needs its digits.
        noun: The noun in the singular. What ends like "branch" gets -es.
    """
    shown = number if isinstance(number, str) else f"{number:,}"
    ending = "es" if noun.endswith(("ch", "sh", "s", "x")) else "s"
    return f"{shown} {noun}{'' if shown == '1' else ending}"
