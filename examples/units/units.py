"""Functions as an agent's tools: no state, so no class. Nothing of pact_nemo is imported."""


def to_celsius(fahrenheit: float) -> float:
    """Temperature in degrees Celsius.

    Args:
        fahrenheit: the temperature in degrees Fahrenheit.
    """
    return round((fahrenheit - 32) / 1.8, 1)


def to_kilometres(miles: float) -> float:
    """Distance in kilometres.

    Args:
        miles: the distance in miles.
    """
    return round(miles * 1.609344, 2)
