"""Output on the disk: files that are complete or absent, the writer, the journal and the manifest."""
