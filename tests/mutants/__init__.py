"""Mutants: every line that keeps a promise is taken away once, and the test named for it must fail.

A mutant is a patch, `NN-name.patch`. Above the diff it says which promise the line keeps and what breaks without it,
and which tests catch that:

    One decision per lane at a time. Without the lock two workers give out the same stock.

    Caught-by: tests/integration/test_decide.py::test_a_lane_that_is_taken_is_called_again_and_left

`make mutants` applies each patch to a copy of the tree and runs its tests there, having seen them green in an unchanged
copy. `make mutants ARGS="lane-lock nowait"` runs those whose names contain one of the words. A test that a mutant does
not turn red is a hole: give it a test that does, or take the line away for good.

When a line moved or changed so much that its patch does not apply any more (`tests/unit/test_mutants.py` says so):

    make mutants ARGS="--refresh lane-lock"

writes the patch anew by itself if what it takes away is still there; otherwise it names a copy of the tree, waits until
the line was taken away there by hand, and writes the difference under the words of the old patch. A new mutant begins
as a file with the words only, and is refreshed in the same way.
"""
