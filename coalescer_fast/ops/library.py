"""placeholder"""


def unavailable():
    return "not yet"
