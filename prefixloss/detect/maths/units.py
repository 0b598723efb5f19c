"""Well-known units: what a quantity is measured in, and how many of the smallest listed unit each is, exactly."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    dimension: str
    size: Fraction


_SIZES = {
    "time": {
        "s sec second": "1",
        "min minute": "60",
        "h hr hour": "3600",
        "day": "86400",
        "week": "604800",
    },
    "length": {
        "mm millimeter millimetre": "0.001",
        "cm centimeter centimetre": "0.01",
        "m meter metre": "1",
        "km kilometer kilometre": "1000",
        "inch inches": "0.0254",
        "foot feet ft": "0.3048",
        "yard yd": "0.9144",
        "mile": "1609.344",
    },
    "mass": {
        "mg milligram": "0.001",
        "g gram": "1",
        "kg kilogram kilo": "1000",
        "oz ounce": "28.349523125",
        "lb pound": "453.59237",
    },
    "volume": {"ml milliliter millilitre": "1", "l liter litre": "1000"},
    "US volume": {"cup": "1", "pint": "2", "quart": "4", "gallon": "16"},
    "money": {"cent ¢": "1", "$ dollar": "100"},
    "number": {"dozen": "12"},
    "calendar": {"month": "1", "year": "12"},
}

UNITS = {
    name: Unit(dimension, Fraction(size))
    for dimension, sizes in _SIZES.items()
    for names, size in sizes.items()
    for spelled in names.split()
    for name in (spelled, f"{spelled}s")
}
