"""How a turn's statements reach the database without a thread, where that is faster."""
