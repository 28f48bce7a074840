"""The engine: requests in slots, the round, the measured budget."""
