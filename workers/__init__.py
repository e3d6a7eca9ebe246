"""The fleet: deciding lanes, charging winners, and the sweep that heals."""
