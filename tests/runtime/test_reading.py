"""What errors repeat of a file is short, whatever the file holds."""

from duq.runtime.reading import listed


def test_names_are_listed_in_part_and_each_in_part():
    assert listed([]) == "" and listed(["b", 3], 2) == "b, 3"
    assert listed((f"x{number}" for number in range(5)), 3) == "x0, x1, x2, 2 more"
    assert listed(["x" * 5000, "y"]) == "x" * 97 + "..., y" and len(listed(["x" * 5000] * 5000)) < 1300
