"""Export, import and copy sessions."""
