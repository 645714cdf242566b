"""counted(): a number and its noun, for every sentence that users read; shown(): an amount that may be tiny or huge."""


def counted(number: int | str, noun: str) -> str:
    """Return the number and the noun, in the plural unless the number is shown as 1: "1 update", "2,000 updates".

    Args:
        number: The number, or how it is shown: a float needs its digits.
        noun: The noun in the singular. What ends like "branch" gets -es.
    """
    shown = number if isinstance(number, str) else f"{number:,}"
    ending = "es" if noun.endswith(("ch", "sh", "s", "x")) else "s"
    return f"{shown} {noun}{'' if shown == '1' else ending}"


def shown(amount: float, places: int) -> str:
    """Return an amount with so many places, or with two digits where these would show 0 or more than 15 digits.

    Args:
        amount: At least 0.
        places: Behind the point.
    """
    plain = amount == 0 or 0.5 * 10**-places < amount < 1e15
    return f"{amount:,.{places}f}" if plain else f"{amount:.2g}"
