"""What is measured: one module per kind of sale, each a function from a contest to its results."""
