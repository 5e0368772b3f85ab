"""Plans: every byte of an output, decided before a weight is read. Pure data."""
