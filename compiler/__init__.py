"""The duq compiler: a pi0 / pi0.5 checkpoint becomes one engine.plan (see compiler/pipeline.py)."""

if __name__ == "compiler":
    from duq.short_names import hand_over

    hand_over(__name__)
