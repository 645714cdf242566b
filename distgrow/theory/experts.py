"""How many of T experts should be active, as plain arithmetic; knows no model.

Few active experts approximate a complex task badly; many are estimated badly from few samples. Symbols: k (`active`),
experts that a token uses; T (`experts`), all of them; c (`complexity`), p (`order`), a (`scale`) of the
approximation error a(c/k)^p; d (`dimension`) and m (`samples`) of the estimation error. The exact formula of the paper
(Zhao et al. 2024, arXiv 2410.13964) was not to be had: what stands here was derived for this project, and tests
hold it against brute force.
"""

import math

from distgrow.theory.numbers import check_positive


def error(active: float, complexity: float, order: float, scale: float, samples: float, dimension: float) -> float:
    """Return a(c/k)^p + √(kd/m), approximation and estimation error of k active experts, loss.

    Source: derived for this project, after Zhao et al. 2024, arXiv 2410.13964.
    """
    check_positive(active=active, samples=samples, dimension=dimension)
    return _approximation(active, complexity, order, scale) + math.sqrt(active * dimension / samples)


def best_active(complexity: float, order: float, scale: float, samples: float, dimension: float) -> float:
    """Return k* = (2pa·c^p)^(2/(2p+1))·(m/d)^(1/(2p+1)), the number of active experts with the least `error`.

    It is no whole number, and may exceed the experts that there are. It rises with the complexity and with the data.

    Source: derived for this project, after Zhao et al. 2024, arXiv 2410.13964.
    """
    check_positive(complexity=complexity, order=order, scale=scale, samples=samples, dimension=dimension)
    power = 1 / (2 * order + 1)
    return (2 * order * scale) ** (2 * power) * complexity ** (2 * order * power) * (samples / dimension) ** power


def routing_gap(active: int, experts: int, samples: float, dimension: float, confidence: float = 0.05) -> float:
    """Return 2√((2kd(1 + ln(T/k)) + d·ln(2m) + ln(4/δ))/(2m)), what choosing k of T experts adds to the gap.

    The gap is that between the expected loss and the loss of the m training samples. d is the Natarajan dimension of
    the router, δ (`confidence`) the chance that the bound does not hold. Its Rademacher term is left out.

    Source: Zhao, Wang & Wang 2024, arXiv 2403.17404, as others quote it.
    """
    check_positive(active=active, samples=samples, dimension=dimension, confidence=confidence)
    if active > experts:
        raise ValueError(f"active={active} exceeds experts={experts}")
    choices = 2 * active * dimension * (1 + math.log(experts / active))
    return 2 * math.sqrt((choices + dimension * math.log(2 * samples) + math.log(4 / confidence)) / (2 * samples))


def best_active_by_gap(
    experts: int,
    complexity: float,
    order: float,
    scale: float,
    samples: float,
    dimension: float,
    confidence: float = 0.05,
) -> int:
    """Return the k of 1 … T with the least a(c/k)^p + `routing_gap`, by trying all; the smaller one of equals.

    Source: derived for this project, after Zhao et al. 2024, arXiv 2410.13964.
    """

    def whole(active: int) -> float:
        gap = routing_gap(active, experts, samples, dimension, confidence)
        return _approximation(active, complexity, order, scale) + gap

    return min(range(1, experts + 1), key=whole)


def _approximation(active: float, complexity: float, order: float, scale: float) -> float:
    check_positive(complexity=complexity, order=order, scale=scale)
    return scale * (complexity / active) ** order
