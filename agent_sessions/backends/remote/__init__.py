"""What stores outside the database have in common."""
