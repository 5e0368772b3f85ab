"""Sources: what the user named is resolved, downloaded if needed, and opened."""
