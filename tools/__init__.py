"""Commands around the compiler and the runtime: duq-compare, or `python tools/compare.py` in a checkout."""

if __name__ == "tools":
    from duq.short_names import hand_over

    hand_over(__name__)
