"""How long something took or will take, as a person says it."""


def spoken(seconds: float) -> str:
    """`seconds` in at most two units: "0.4 s", "12 s", "1 min 5 s", "2 h 3 min"."""
    if seconds < 1:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"
