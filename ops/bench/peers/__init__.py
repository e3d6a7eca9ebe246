"""What a shop would use instead, written plainly, as its users would, each at its best setting."""
