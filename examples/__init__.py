"""A simulated robot from demonstrations to its control loop, and a policy behind Ray Serve."""

if __name__ == "examples":
    from duq.short_names import hand_over

    hand_over(__name__)
