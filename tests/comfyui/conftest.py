"""The tests of inside/ run only in the child processes that test_inside.py starts, which name their files."""

collect_ignore = ["inside"]
