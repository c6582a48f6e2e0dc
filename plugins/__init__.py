"""The duq operators: their meaning, their CUDA kernels, and the libraries and drivers under them."""

if __name__ == "plugins":
    from duq.short_names import hand_over

    hand_over(__name__)
