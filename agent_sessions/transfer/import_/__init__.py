"""Import sessions from other stores, and from our own export."""
